"""Every name has a colour and a marker, also one that no table has: no figure fails at the end of hours of runs."""

import pytest

from rlhf_fast.lab.compare import plots as compare_plots
from rlhf_fast.lab.study import exact_plots, plots, variance_plots
from rlhf_fast.report.plots import MethodRun, make_plots
from rlhf_fast.report.styles import STYLES, Style, styles_of

FLAT = {"mean": [0.5, 0.6], "se": [0.01, 0.01]}
RATE = {"mean": 0.5, "se": 0.01}
NAMES = ("PPO", "New", "Newer")


def test_unknown_names_take_what_no_known_name_has():
    known = {"PPO": Style("#0072B2", "o"), "ReMax": Style("#D55E00", "s")}  # not the table's, which grows
    styles = styles_of(["New", "PPO", "Newer", "New"], known)
    assert list(styles) == ["New", "PPO", "Newer"]
    assert styles == {"New": Style("#117733", "*"), "PPO": Style("#0072B2", "o"), "Newer": Style("#AA4499", "p")}
    known["Taken"] = Style("#117733", "*")
    assert styles_of(["Taken", "New"], known)["New"] == styles_of(["New"], known)["New"] == Style("#AA4499", "p")
    del known["Taken"]
    many = styles_of((f"new {i}" for i in range(9)), known)
    assert len(set(many.values())) == 8 and many["new 8"] == many["new 0"]
    assert styles_of([]) == {}


def test_known_names_keep_their_style_whoever_is_beside_them():
    expected = {
        "PPO": Style("#0072B2", "o"), "ReMax": Style("#D55E00", "s"), "REINFORCE": Style("#CC79A7", "^"),
        "RLOO": Style("#009E73", "D"), "GRPO": Style("#882255", "X"), "DPO": Style("#E69F00", "v"),
    }  # fmt: skip
    assert styles_of(expected) == expected
    assert all(styles_of(["New", name])[name] == style for name, style in STYLES.items())


def colors(axes) -> dict[str, str]:
    return {line.get_label(): line.get_color() for line in axes.lines if not line.get_label().startswith("_")}


def test_compared_runs():
    point = {"seconds": 1.0, "prompts": 2, "reward": 0.5, "reward_se": 0.1}
    names = ("PPO", "PPO, small critic", "New", "New, LoRA 4", "Newer")
    figure = compare_plots.reward([{"name": name, "reward": {"curve": [point]}} for name in names])
    assert list(colors(figure.axes[0]).values()) == ["#0072B2", "#0072B2", "#117733", "#117733", "#AA4499"]


def test_a_report():
    evaluation = {"step": 1, "time/step": 1.0, "eval/reward": 0.5, "eval/kl": 1.0, "memory/rollout": 1}
    figures = make_plots(
        [MethodRun(name=name, history=[evaluation]) for name in NAMES], {"SFT": {"New": {"variance": 1}}}
    )
    for name in ("reward_kl", "reward_time", "peak_memory"):
        assert [colors(figures[name].axes[0])[of] for of in NAMES] == ["#0072B2", "#117733", "#AA4499"]


@pytest.mark.parametrize("figure_of", [plots.frontier_figure, plots.temperature_figure, plots.convergence_figure])
def test_studies(figure_of):
    method = {"envelope": FLAT, "0.5": RATE, "1": RATE}
    if figure_of is plots.temperature_figure:
        method = {"0.5": RATE, "1": RATE}
    if figure_of is plots.convergence_figure:
        method = {"win_rate": [RATE, RATE], "step": [0, 5], "seconds": [RATE, RATE]}
    runs = [{"method": name, "points": [[0, 0.0, 0.5], [1, 1.5, 0.7]]} for name in NAMES]
    record = {"reward_name": "r", "kl": [1.0, 2.0], "methods": dict.fromkeys(NAMES, method), "runs": runs}
    assert list(colors(figure_of(record).axes[-1]).values())[:3] == ["#0072B2", "#117733", "#AA4499"]


def test_a_shift_shows_every_method_but_the_start_and_the_rows():
    figures = dict.fromkeys((*NAMES, "SFT", "rows' completions"), {"gain_over_sft": RATE})
    axes = plots.shift_figure({"reward_name": "r", "domains": {"own": figures, "shifted": figures}}).axes[0]
    assert {text.get_text() for text in axes.get_xticklabels()} == set(NAMES)


def test_gradient_variances():
    measured = {"norm": FLAT, "variance": FLAT, "variance at equal decoding": FLAT}
    panel = {"ReMax": measured, "value model": measured, "New": measured}
    figure = variance_plots.training_figure({"rounds": [0, 60], "panels": {"plain": panel, "constant": panel}})
    shown = colors(figure.axes[0])
    assert shown == {"ReMax": "#D55E00", "value model": "#0072B2", "New": "#117733"}
    case = {
        "p": [0.1, 0.9],
        "variance": dict.fromkeys(("RLOO, k = 2", "New"), [1, 2]),
        "crossover": 1,
        "r1": 0,
        "r2": 1,
    }
    figure = variance_plots.bandit_figure({"two_armed": [case, case]})
    assert colors(figure.axes[0]) == {"RLOO, k = 2": "#88CCAA", "New": "#117733"}


def test_the_exact_study(tmp_path):
    runs = [{"method": name, "seed": 0, "points": [[0, 0.0, 0.5], [1, 1.5, 0.7]]} for name in NAMES]
    methods = dict.fromkeys(NAMES, {"envelope": FLAT})
    record = {"frontier": {"kl": [1.0, 2.0], "reward": [0.6, 0.9]}, "area_to": 2.0, "methods": methods, "runs": runs}
    exact_plots.write_plot(tmp_path / "exact.png", record)
    assert (tmp_path / "exact.png").read_bytes().startswith(b"\x89PNG")
