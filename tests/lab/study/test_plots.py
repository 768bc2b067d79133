"""The figures of the studies: what their labels say, by hand."""

from rlhf_fast.lab.study.plots import frontier_figure, winrate_figure
from rlhf_fast.lab.study.variance_plots import training_figure

FLAT = {"mean": [0.5, 0.6], "se": [0.01, 0.01]}


def test_a_frontier_names_its_reward_and_shows_every_method_s_marker():
    points = {"PPO": [[0, 0.0, 0.5], [1, 1.5, 0.7]], "DPO": [[0, 0.0, 0.5], [1, 9.0, 0.9]]}
    record = {
        "reward_name": "positive",
        "kl": [1.0, 2.0],
        "methods": {name: {"envelope": FLAT} for name in points},
        "runs": [{"method": name, "points": cloud} for name, cloud in points.items()],
    }
    figure = frontier_figure(record)
    assert figure.axes[0].get_ylabel() == "positive on held-out prompts"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["PPO", "DPO"]
    assert [handle.get_marker() for handle in legend.legend_handles] == ["o", "v"]


def test_equal_numbers_of_a_win_rate_have_one_colour():
    names = "PPO", "DPO", "SFT"
    shares = {
        "PPO": {"DPO": 0.8018, "SFT": 0.95},
        "DPO": {"PPO": 0.1982, "SFT": 0.7967},
        "SFT": {"PPO": 0.05, "DPO": 0.2033},
    }
    rates = {a: {b: {"mean": share} for b, share in row.items()} for a, row in shares.items()}
    texts = winrate_figure({"methods": list(names), "win_rate": rates}).axes[0].texts
    shown = {(text.get_text(), text.get_color()) for text in texts}
    assert shown == {("80", "black"), ("95", "white"), ("20", "black"), ("5", "white")}


def test_ticks_of_a_variance_are_plain_numbers():
    measured = {"norm": FLAT, "variance": FLAT, "variance at equal decoding": FLAT}
    figure = training_figure(
        {"rounds": [0, 60], "panels": {"plain": {"ReMax": measured}, "constant": {"ReMax": measured}}}
    )
    figure.draw_without_rendering()
    labels = {text.get_text() for axes in figure.axes for text in axes.get_yticklabels(which="both")}
    assert labels - {""} and all("$" not in label for label in labels)
