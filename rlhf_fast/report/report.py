"""A comparison of methods as one self-contained HTML file, and the same numbers as JSON and PNG.

The HTML is `report.html.jinja`, filled in. It loads nothing from elsewhere: figures are inlined as SVG. Left out:
statistics over seeds. Every figure is of one run per method, and its errors are over held-out prompts.
"""

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_text
from rlhf_fast.report import processes
from rlhf_fast.report.curves import CURVES, make_curves
from rlhf_fast.report.plots import START_COLOR, MethodRun, make_plots
from rlhf_fast.report.settings import differences, held_out
from rlhf_fast.report.styles import styles_of
from rlhf_fast.training.metrics import format_value, read_metrics

CAPTIONS = {
    "reward_kl": "What each method bought: {reward} against the distance from the start, one point per "
    "evaluation. Up and to the left is better; error bars are one standard error over prompts.",
    "reward_time": "What it took: {reward} against training time, bands one standard error over prompts.",
    "step_time": "Where a step's time goes, averaged over the run.",
    "static_memory": "What the models hold between steps: weights, gradients and optimizer state of each role.",
    "peak_memory": "Peak memory while each phase runs; on a CPU that is the whole process, Python and torch included.",
    "gradient_variance": "Total variance of the policy gradient over batches sampled from the same policy.",
}
_CURVES = "{title}, over the steps. The thin line is each step, the thick line the mean of its neighbours."
_QUALITY = (
    "Held-out prompts, mean ± standard error over prompts. KL in nats per completion, length in tokens, entropy in "
    "nats per token."
)
_HELD_OUT = "Held-out rows after training, mean ± standard error over rows where it is known."
_SETTINGS = "Settings that are not the same in all runs."
_COST = (
    "Time without evaluation. Model memory: weights, gradients and optimizer state; peak: the largest of any phase. Of "
    "several processes the first one's."
)
_HELD = "Weights, gradients and optimizer state of each role between steps."
_PEAKS = "The largest memory while each phase runs; on a CPU that is the whole process, Python and torch included."
_TEMPLATE = "report.html.jinja"  # beside this file
_SHOWN = 5  # prompts, each with the completions of all methods
_EVALUATION = (
    "step",
    "time/total",
    *(f"eval/{k}{e}" for k in ("reward", "kl", "win_rate", "length", "entropy") for e in ("", "_se")),
)


def load_run(name: str, directory: str | os.PathLike) -> MethodRun:
    """The run of a stage in `directory`: metrics.jsonl, and run.json and samples.json where they are there."""
    directory = Path(directory)
    record = read_json(directory / "run.json") if (directory / "run.json").is_file() else {}
    return MethodRun(
        name=name,
        history=read_metrics(directory / "metrics.jsonl"),
        static_bytes=record.get("static_bytes", {}),
        samples=read_json(directory / "samples.json", list) if (directory / "samples.json").is_file() else [],
        record=record,
    )


def write_report(
    path: str | os.PathLike,
    runs: Sequence[MethodRun],
    *,
    title: str,
    samples: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    gradient_variance: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    reward_name: str = "true reward",
    start: str = "SFT",
) -> None:
    """Writes the HTML report to `path` and everything that it shows to the .json beside it.

    samples: the start's completions, rows of prompt, completion and reward in the order of the runs' samples; with
    them gains are paired by prompt, and a few prompts are printed with all completions.
    notes: paragraphs below the title (setting, hardware, command).
    gradient_variance: where measured -> method -> {"variance", ...}.
    reward_name: the name of the evaluations' reward, such as "score of the reward model".
    start: the name of the model that all methods start from.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    for run in runs:
        if samples and run.samples and [row["prompt"] for row in run.samples] != [row["prompt"] for row in samples]:
            raise ValueError(f"samples: expected the prompts of {run.name}'s samples in the same order")
    styles, evaluated = styles_of(run.name for run in runs), [run for run in runs if run.evaluations]
    report = {
        "title": title,
        "notes": list(notes),
        "quality": quality_table(evaluated, samples, reward_name, start) if evaluated else [],
        "held_out": held_out(runs),
        "cost": cost_table(runs),
        "processes": {"held": processes.held(runs), "peaks": processes.peaks(runs)},
        "settings": differences(runs),
        "methods": {
            run.name: {
                "color": styles[run.name].color,
                "evaluations": [{k: row[k] for k in _EVALUATION if k in row} for row in run.evaluations],
                "seconds_per_step": run.seconds_per_step,
                "static_bytes": run.static_bytes,
                "peak_bytes": run.peak_bytes,
            }
            for run in runs
        },
        "gradient_variance": gradient_variance,
        "samples": _sample_table([run for run in evaluated if run.samples], samples, start),
    }
    drawn = make_plots(runs, gradient_variance, reward_name=reward_name) | _curves(runs)
    captions = CAPTIONS | {name: _CURVES.format(title=_capitalised(curve.title)) for name, curve in CURVES.items()}
    tables = [
        ("What each method bought", report["quality"], _QUALITY),
        ("On held-out rows", report["held_out"], _HELD_OUT),
        ("What it cost", report["cost"], _COST),
        ("What each process held", report["processes"]["held"], _HELD),
        ("Peaks of each process", report["processes"]["peaks"], _PEAKS),
        ("What differs between the runs", report["settings"], _SETTINGS),
    ]
    html = _template().render(
        **report,
        tables=[table for table in tables if table[1]],
        figures={name: _svg_uri(figure) for name, figure in drawn.items()},
        captions={name: caption.format(reward=reward_name) for name, caption in captions.items()},
        reward_name=reward_name,
        colors={name: style.color for name, style in styles.items()} | {start: START_COLOR},
        start=start,
    )
    write_text(Path(path).with_suffix(".json"), json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    write_text(path, html)


def _curves(runs: Sequence[MethodRun]) -> dict[str, Any]:
    """The curves over the steps. Held-out rewards are drawn over time and KL already."""
    return {name: figure for name, figure in make_curves(runs).items() if name != "held_out"}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_plots(
    directory: str | os.PathLike,
    runs: Sequence[MethodRun],
    gradient_variance: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    *,
    reward_name: str = "true reward",
) -> list[Path]:
    """Writes every figure to directory/<name>.png and returns the paths."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in make_plots(runs, gradient_variance, reward_name=reward_name).items():
        paths.append(Path(directory) / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def quality_table(
    runs: Sequence[MethodRun],
    samples: Sequence[Mapping[str, Any]] = (),
    reward_name: str = "true reward",
    start: str = "SFT",
) -> list[dict[str, Any]]:
    """What each method bought: a row for the start and one per method, (mean, standard error) over held-out prompts.

    The gain's error is the standard error of the mean paired difference where the start's `samples` are given, else of
    the difference of two independent means.
    """
    first = runs[0].evaluations[0]
    rows: list[dict[str, Any]] = [{"method": start, reward_name: _pair(first, "reward"), f"gain over {start}": None}]
    for run in runs:
        if samples and run.samples:
            gain = _mean_and_se([b["reward"] - a["reward"] for a, b in zip(samples, run.samples, strict=True)])
        else:
            before, after = _pair(first, "reward"), _pair(run.final, "reward")
            assert before is not None and after is not None  # an evaluation is a row with a reward
            gain = (after[0] - before[0], math.hypot(before[1], after[1]))
        rows.append({"method": run.name, reward_name: _pair(run.final, "reward"), f"gain over {start}": gain})
    for row, evaluation in zip(rows, [first, *(run.final for run in runs)], strict=True):
        row |= {f"KL to {start}": _pair(evaluation, "kl"), "length": _pair(evaluation, "length")}
        row["entropy"] = _pair(evaluation, "entropy")
        if "eval/win_rate" in evaluation:
            row["wins over the rows' completions"] = _pair(evaluation, "win_rate")
    return rows


def cost_table(runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """What each method cost, a row per method."""
    return [
        {
            "method": run.name,
            "steps": run.history[-1]["step"],
            "step seconds": sum(run.seconds_per_step.values()),
            "training seconds": run.history[-1].get("time/total"),
            "model bytes": sum(sum(kinds.values()) for kinds in run.static_bytes.values()) or None,
            "peak bytes": max(run.peak_bytes.values(), default=None),
        }
        for run in runs
    ]


def _pair(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    value = row.get(f"eval/{key}")
    return None if value is None else (value, row.get(f"eval/{key}_se", 0.0))


def _mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def _sample_table(runs: Sequence[MethodRun], samples: Sequence[Mapping[str, Any]], start: str) -> list[dict[str, Any]]:
    """Some prompts, spread from the lowest to the highest reward of the start, with everyone's completion."""
    order = sorted(range(len(samples)), key=lambda i: samples[i]["reward"])
    count = min(_SHOWN, len(order))
    chosen = [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]
    rows = {start: samples, **{run.name: run.samples for run in runs}}
    return [
        {
            "prompt": _readable(samples[i]),
            "goes_on": "messages" not in samples[i],
            "completions": [
                {"method": name, "completion": of[i]["completion"], "reward": of[i]["reward"]}
                for name, of in rows.items()
            ],
        }
        for i in chosen
    ]


def _readable(sample: Mapping[str, Any]) -> str:
    """The prompt of a sample; of a conversation a line per message, without the chat template's tokens."""
    if "messages" not in sample:
        return sample["prompt"]
    return "\n".join(f"{message['role']}: {_content(message.get('content'))}" for message in sample["messages"])


def _content(content: Any) -> str:
    """The text of a message's content, which may be parts, or nothing beside a call of a tool."""
    if isinstance(content, list):
        return " ".join(part.get("text") or f"[{part.get('type', 'part')}]" for part in content)
    return content or ""


def _svg_uri(figure: Any) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rlhf_fast"}):  # same run, same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("rlhf_fast.report", package_path="")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["show"] = format_value
    return environment.get_template(_TEMPLATE)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
