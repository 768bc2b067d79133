"""The report shows the numbers it was given, in the table, the JSON and the figures, and loads nothing."""

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from rlhf_fast.report import plots
from rlhf_fast.report.plots import MethodRun
from rlhf_fast.report.report import load_run, write_plots, write_report

MIB = 2**20
PROMPTS = ["the film", "the cast", "a slow"]
START = [{"prompt": p, "completion": f"was <b>{p}</b> & dull .", "reward": 0.1 * i} for i, p in enumerate(PROMPTS)]
VARIANCE = {"SFT model": {"REINFORCE": {"variance": 0.5}, "ReMax": {"variance": 0.125}}}


def evaluation(reward: float, kl: float) -> dict[str, float]:
    values = {"reward": reward, "kl": kl, "length": 20.0, "entropy": 1.5}
    return {f"eval/{k}": v for k, v in values.items()} | {f"eval/{k}_se": v / 100 for k, v in values.items()}


def make_run(name: str, gain: float) -> MethodRun:
    history = [
        {"step": 0, "time/total": 0.0, **evaluation(0.5, 0.0)},
        {
            "step": 1,
            "time/rollout": 0.3,
            "time/policy_update": 0.1,
            "time/step": 0.5,
            "time/total": 0.5,
            "memory/rollout": 400 * MIB,
            "memory/policy_update": 500 * MIB,
            "memory/evaluation": 900 * MIB,
        },
        {
            "step": 2,
            "time/rollout": 0.1,
            "time/policy_update": 0.3,
            "time/evaluation": 5.0,
            "time/step": 5.5,
            "time/total": 1.0,
            "memory/policy_update": 450 * MIB,
            **evaluation(0.5 + gain, 4.0),
        },
    ]
    static = {
        "policy": {"weights": 10 * MIB, "gradients": 10 * MIB, "optimizer": 20 * MIB},
        "reference": {"weights": 10 * MIB, "gradients": 0, "optimizer": 0},
    }
    samples = [row | {"completion": f"{name} loved it", "reward": row["reward"] + gain} for row in START]
    samples[0]["reward"] += 0.3
    return MethodRun(name=name, history=history, static_bytes=static, samples=samples)


@pytest.fixture
def runs() -> list[MethodRun]:
    return [make_run("PPO", 0.3), make_run("ReMax", 0.2)]


class Page(HTMLParser):
    """Checks that tags are balanced and collects table rows, image sources and every other reference."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.images, self.references, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        assert tag not in ("script", "link", "iframe") and "href" not in attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()


def test_report(tmp_path, runs):
    path = tmp_path / "out" / "report.html"
    write_report(path, runs, title="A <b> title", samples=START, notes=["Two threads."], gradient_variance=VARIANCE)
    text = path.read_text()
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "A <b> title" in page.text and "Two threads." in page.text
    assert page.rows[:4] == [
        ["method", "true reward", "gain over SFT", "KL to SFT", "length", "entropy"],
        ["SFT", "0.5000 ± 0.0050", "-", "0.000 ± 0.000", "20.00 ± 0.20", "1.500 ± 0.015"],
        ["PPO", "0.8000 ± 0.0080", "0.40 ± 0.10", "4.000 ± 0.040", "20.00 ± 0.20", "1.500 ± 0.015"],
        ["ReMax", "0.7000 ± 0.0070", "0.30 ± 0.10", "4.000 ± 0.040", "20.00 ± 0.20", "1.500 ± 0.015"],
    ]
    assert page.rows[4:7] == [
        ["method", "steps", "step time", "training time", "model memory", "peak memory"],
        ["PPO", "2", "500 ms", "1.0 s", "50.0 MiB", "500.0 MiB"],
        ["ReMax", "2", "500 ms", "1.0 s", "50.0 MiB", "500.0 MiB"],
    ]
    assert page.rows[7:10] == [
        ["SFT", "was <b>the film</b> & dull .", "0.000"],
        ["PPO", "PPO loved it", "0.600"],
        ["ReMax", "ReMax loved it", "0.500"],
    ]
    assert len(page.images) == 6
    for source in page.images:
        svg = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_json_holds_what_is_shown(tmp_path, runs):
    runs[1].history[-1]["eval/entropy_se"] = math.nan
    write_report(tmp_path / "report.html", runs, title="t", samples=START, gradient_variance=VARIANCE)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["quality"][1]["true reward"] == [0.8, 0.008]
    # the gains over the prompts are 0.6, 0.3 and 0.3: mean 0.4, standard error 0.1
    assert report["quality"][1]["gain over SFT"] == pytest.approx([0.4, 0.1], rel=1e-12)
    assert report["quality"][2]["entropy"] == [1.5, None]
    method = report["methods"]["PPO"]
    assert method["color"] == "#0072B2"
    assert [row["eval/reward"] for row in method["evaluations"]] == [0.5, 0.8]
    assert method["seconds_per_step"] == pytest.approx({"rollout": 0.2, "policy_update": 0.2, "other": 0.1})
    assert method["peak_bytes"] == {"rollout": 400 * MIB, "policy_update": 500 * MIB}
    assert method["static_bytes"] == runs[0].static_bytes
    assert report["gradient_variance"] == VARIANCE
    assert [row["prompt"] for row in report["samples"]] == PROMPTS
    assert report["samples"][2]["completions"][1] == {"method": "PPO", "completion": "PPO loved it", "reward": 0.5}


def test_a_few_samples_are_shown_from_the_lowest_to_the_highest(tmp_path, runs):
    start = [{"prompt": str(i), "completion": "", "reward": (7 * i) % 20 / 20} for i in range(20)]
    runs = [dataclasses.replace(run, samples=start) for run in runs]
    write_report(tmp_path / "report.html", runs, title="t", samples=start)
    shown = json.loads((tmp_path / "report.json").read_text())["samples"]
    assert [row["completions"][0]["reward"] for row in shown] == [0, 0.25, 0.5, 0.7, 0.95]


def test_a_conversation_is_shown_by_its_messages(tmp_path, runs):
    parts = [{"type": "image"}, {"type": "text", "text": "Is <b> blue?"}]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    called = {"role": "assistant", "content": None}
    start = [
        {"prompt": "<|system|>Be brief.<|end|>", "messages": [*said, called], "completion": "Yes", "reward": 0.1},
        {"prompt": "The film", "completion": "was", "reward": 0.9},
    ]
    runs = [dataclasses.replace(run, samples=start) for run in runs]
    write_report(tmp_path / "report.html", runs, title="t", samples=start)
    shown = json.loads((tmp_path / "report.json").read_text())["samples"]
    assert [row["prompt"] for row in shown] == [
        "system: Be brief.\nuser: [image] Is <b> blue?\nassistant: ", "The film"
    ]  # fmt: skip
    html = (tmp_path / "report.html").read_text()
    assert "user: [image] Is &lt;b&gt; blue?\nassistant: </p>" in html and "The film …</p>" in html


def test_unpaired_gain_and_no_samples(tmp_path, runs):
    write_report(tmp_path / "report.html", runs, title="t", reward_name="model score")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["quality"][1]["gain over SFT"] == pytest.approx([0.3, math.hypot(0.005, 0.008)])
    page = Page((tmp_path / "report.html").read_text())
    assert page.rows[0][1] == "model score" and "true reward" not in page.text
    assert len(page.images) == 5 and "Completions before" not in page.text


def test_plots_are_written_and_the_same_every_time(tmp_path, runs):
    paths = write_plots(tmp_path / "plots", runs, VARIANCE)
    names = ["reward_kl", "reward_time", "step_time", "static_memory", "peak_memory", "gradient_variance"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    for name in ("a", "b"):
        write_report(tmp_path / f"{name}.html", runs, title="t", gradient_variance=VARIANCE)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_figures_draw_the_numbers(runs):
    figures = plots.make_plots(runs, VARIANCE)
    lines = {line.get_label(): line for line in figures["reward_kl"].axes[0].lines}
    assert lines["PPO"].get_xydata().tolist() == [[0.0, 0.5], [4.0, 0.8]]
    assert lines["start"].get_xydata().tolist() == [[0.0, 0.5]]
    assert lines["PPO"].get_color() == "#0072B2" and lines["ReMax"].get_color() == "#D55E00"
    lines = {line.get_label(): line for line in figures["reward_time"].axes[0].lines}
    assert lines["ReMax"].get_xydata().tolist() == [[0.0, 0.5], [1.0, 0.7]]

    bars = figures["step_time"].axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([200, 200, 100] * 2)
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 200, 400] * 2)
    bars = figures["static_memory"].axes[0].patches
    assert [bar.get_width() for bar in bars] == [10, 10, 20, 10] * 2
    assert {line.get_label(): line.get_xdata().tolist() for line in figures["peak_memory"].axes[0].lines[:2]} == {
        "PPO": [400, 500],
        "ReMax": [400, 500],
    }
    assert [bar.get_height() for bar in figures["gradient_variance"].axes[0].patches] == [0.5, 0.125]


@pytest.mark.parametrize("name", ["reward_kl", "reward_time", "step_time", "static_memory", "peak_memory"])
def test_legend_covers_no_data(name, runs):
    figure = plots.make_plots(runs)[name]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend, area = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.y0 >= area.y1 and legend.x1 <= figure.bbox.x1
    assert axes.get_xlabel() and re.search(r"\(.+\)|reward", axes.get_xlabel())


def test_load_run(tmp_path, runs):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in runs[0].history))
    (tmp_path / "run.json").write_text(json.dumps({"static_bytes": runs[0].static_bytes}))
    (tmp_path / "samples.json").write_text(json.dumps(runs[0].samples))
    record = {"static_bytes": runs[0].static_bytes}
    assert load_run("PPO", tmp_path) == dataclasses.replace(runs[0], record=record)


def test_bad_input(tmp_path, runs):
    with pytest.raises(ValueError, match="runs: expected at least one, got none"):
        write_report(tmp_path / "r.html", [], title="t")
    with pytest.raises(ValueError, match="history: expected rows of metrics in the run of DPO, got none"):
        MethodRun(name="DPO", history=[])
    with pytest.raises(ValueError, match="samples: expected the prompts of PPO's samples in the same order"):
        write_report(tmp_path / "r.html", runs, title="t", samples=START[::-1])
    assert not list(tmp_path.iterdir())


def test_a_run_in_several_processes_shows_each_of_them(tmp_path, runs):
    def process(weights: int, peak: int) -> dict:
        static = {"policy": {"weights": weights * MIB, "gradients": 3 * MIB, "optimizer": 6 * MIB}}
        return {"static_bytes": static, "phases": {"rollout": {"peak_bytes": peak * MIB}, "steps": 2}}

    several = dataclasses.replace(runs[0], record={"processes": [process(4, 400), process(4, 390), process(2, 390)]})
    write_report(tmp_path / "report.html", [several, runs[1]], title="t")
    page, report = Page((tmp_path / "report.html").read_text()), json.loads((tmp_path / "report.json").read_text())
    at = page.rows.index(["method", "process", "policy memory"])
    assert page.rows[at + 1 : at + 6] == [
        ["PPO", "0-1", "13.0 MiB"],
        ["PPO", "2", "11.0 MiB"],
        ["method", "process", "rollout memory"],
        ["PPO", "0", "400.0 MiB"],
        ["PPO", "1-2", "390.0 MiB"],
    ]
    assert report["processes"]["held"][1] == {"method": "PPO", "process": "2", "policy bytes": 11 * MIB}
    write_report(tmp_path / "report.html", runs, title="t")
    assert "each process" not in Page((tmp_path / "report.html").read_text()).text
