"""A comparison of methods as one self-contained HTML file, and the same numbers as JSON and PNG.

The HTML loads nothing from elsewhere: figures are inlined as SVG. Left out: statistics over seeds; every figure is of
one run per method, its errors are over held-out prompts.
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

from rlhf_fast.data.files import write_text
from rlhf_fast.report.plots import START_COLOR, MethodRun, make_plots
from rlhf_fast.training.metrics import format_value, read_metrics

CAPTIONS = {
    "reward_kl": "What each method bought: {reward} against the distance from the SFT model, one point per "
    "evaluation. Up and to the left is better; error bars are one standard error over prompts.",
    "reward_time": "What it took: {reward} against training time, bands one standard error over prompts.",
    "step_time": "Where a step's time goes, averaged over the run.",
    "static_memory": "What the models hold between steps: weights, gradients and optimizer state of each role.",
    "peak_memory": "Peak memory while each phase runs; on a CPU that is the whole process, Python and torch included.",
    "gradient_variance": "Total variance of the policy gradient over batches sampled from the same policy.",
}
_QUALITY = (
    "Held-out prompts, mean ± standard error over prompts. KL in nats per completion, length in tokens, entropy in "
    "nats per token."
)
_COST = "Time without evaluation. Model memory: weights, gradients and optimizer state; peak: the largest of any phase."
_SHOWN = 5  # prompts with everyone's completion
_EVALUATION = (
    "step",
    "time/total",
    *(f"eval/{k}{e}" for k in ("reward", "kl", "win_rate", "length", "entropy") for e in ("", "_se")),
)


def load_run(name: str, directory: str | os.PathLike) -> MethodRun:
    """The run a stage left in `directory`: metrics.jsonl, run.json and samples.json."""
    directory = Path(directory)
    return MethodRun(
        name=name,
        history=read_metrics(directory / "metrics.jsonl"),
        static_bytes=json.loads((directory / "run.json").read_text())["static_bytes"],
        samples=json.loads((directory / "samples.json").read_text()),
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
) -> None:
    """Writes the HTML report to `path` and everything it shows to the .json beside it.

    samples: the start's completions, rows of prompt, completion and reward in the order of the runs' samples; with
    them gains are paired by prompt, and a few prompts are printed with all completions.
    notes: paragraphs below the title (setting, hardware, command).
    gradient_variance: where measured -> method -> {"variance", ...}.
    reward_name: what the evaluations' reward is called ("score of the reward model", say).
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    for run in runs:
        if samples and [row["prompt"] for row in run.samples] != [row["prompt"] for row in samples]:
            raise ValueError(f"samples: expected the prompts of {run.name}'s samples in the same order")
    report = {
        "title": title,
        "notes": list(notes),
        "quality": quality_table(runs, samples, reward_name),
        "cost": cost_table(runs),
        "methods": {
            run.name: {
                "color": run.color,
                "evaluations": [{k: row[k] for k in _EVALUATION if k in row} for row in run.evaluations],
                "seconds_per_step": run.seconds_per_step,
                "static_bytes": run.static_bytes,
                "peak_bytes": run.peak_bytes,
            }
            for run in runs
        },
        "gradient_variance": gradient_variance,
        "samples": _sample_table(runs, samples),
    }
    figures = {
        name: _svg_uri(figure) for name, figure in make_plots(runs, gradient_variance, reward_name=reward_name).items()
    }
    html = _TEMPLATE.render(
        **report,
        tables=[
            ("What each method bought", report["quality"], _QUALITY),
            ("What it cost", report["cost"], _COST),
        ],
        figures=figures,
        captions={name: caption.format(reward=reward_name) for name, caption in CAPTIONS.items()},
        reward_name=reward_name,
        colors={run.name: run.color for run in runs} | {"SFT": START_COLOR},
    )
    write_text(Path(path).with_suffix(".json"), json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    write_text(path, html)


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
    runs: Sequence[MethodRun], samples: Sequence[Mapping[str, Any]] = (), reward_name: str = "true reward"
) -> list[dict[str, Any]]:
    """What each method bought: a row for the start and one per method, (mean, standard error) over held-out prompts.

    The gain's error is that of the mean paired difference when the start's `samples` are given, else that of two
    independent means.
    """
    start = runs[0].evaluations[0]
    rows: list[dict[str, Any]] = [{"method": "SFT", reward_name: _pair(start, "reward"), "gain over SFT": None}]
    for run in runs:
        if samples:
            gain = _mean_and_se([b["reward"] - a["reward"] for a, b in zip(samples, run.samples, strict=True)])
        else:
            (before, error), (after, new_error) = _pair(start, "reward"), _pair(run.final, "reward")
            gain = (after - before, math.hypot(error, new_error))
        rows.append({"method": run.name, reward_name: _pair(run.final, "reward"), "gain over SFT": gain})
    for row, evaluation in zip(rows, [start, *(run.final for run in runs)], strict=True):
        row |= {"KL to SFT": _pair(evaluation, "kl"), "length": _pair(evaluation, "length")}
        row["entropy"] = _pair(evaluation, "entropy")
        if "eval/win_rate" in evaluation:
            row["wins over the rows' completions"] = _pair(evaluation, "win_rate")
    return rows


def cost_table(runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """What each method cost, a row per method."""
    return [
        {
            "method": run.name,
            "steps": run.final["step"],
            "step seconds": sum(run.seconds_per_step.values()),
            "training seconds": run.final.get("time/total"),
            "model bytes": sum(sum(kinds.values()) for kinds in run.static_bytes.values()),
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


def _sample_table(runs: Sequence[MethodRun], samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Some prompts, spread from the lowest to the highest reward of the start, with everyone's completion."""
    order = sorted(range(len(samples)), key=lambda i: samples[i]["reward"])
    count = min(_SHOWN, len(order))
    chosen = [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]
    rows = {"SFT": samples, **{run.name: run.samples for run in runs}}
    return [
        {
            "prompt": samples[i]["prompt"],
            "completions": [
                {"method": name, "completion": of[i]["completion"], "reward": of[i]["reward"]}
                for name, of in rows.items()
            ],
        }
        for i in chosen
    ]


def _svg_uri(figure: Any) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rlhf_fast"}):  # same run, same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ENVIRONMENT = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
)
_ENVIRONMENT.globals["show"] = format_value
_TEMPLATE = _ENVIRONMENT.from_string("""{% macro dot(method) %}
<span class="dot" style="background: {{ colors[method] }}"></span>
{%- endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5f6368; --line: #e3e3e3; }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 68rem; color: var(--ink); background: #fff;
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
p { max-width: 44rem; margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
figcaption, .soft { color: var(--soft); font-size: .88rem; }
.samples td { white-space: normal; text-align: left; vertical-align: top; }
.samples td:first-child { white-space: nowrap; }
.samples td:last-child { text-align: right; padding-right: 0; white-space: nowrap; }
.samples { width: 100%; margin: .2rem 0 1.8rem; }
@media (max-width: 40rem) {
  .samples tr { display: grid; grid-template-columns: 1fr auto; border-bottom: 1px solid var(--line); }
  .samples td { border: 0; padding: .3rem 0; }
  .samples td:nth-child(2) { grid-row: 2; grid-column: 1 / -1; padding-top: 0; }
}
.prompt { font-weight: 600; max-width: none; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% for heading, table, explanation in tables %}
<h2>{{ heading }}</h2>
<div class="scroll">
<table>
<thead><tr>
{% for column in table[0] %}
<th scope="col">{{ column|replace(" bytes", " memory")|replace(" seconds", " time") }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table %}
<tr>
{% for column, value in row.items() %}
<td>{% if column == "method" %}{{ dot(value) }}{% endif %}{{ show(column, value) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="soft">{{ explanation }}</p>
{% endfor %}
<h2>In pictures</h2>
<div class="figures">
{% for name, uri in figures.items() %}
<figure id="{{ name }}">
<img src="{{ uri }}" alt="{{ captions[name] }}"><figcaption>{{ captions[name] }}</figcaption>
</figure>
{% endfor %}
</div>
{% if samples %}
<h2>Completions before and after</h2>
<p class="soft">Held-out prompts, from the lowest to the highest reward of the SFT model's completion; the number is the
{{ reward_name }}.</p>
{% for sample in samples %}
<p class="prompt">{{ sample.prompt }} …</p>
<table class="samples"><tbody>
{% for row in sample.completions %}
<tr><td>{{ dot(row.method) }}{{ row.method }}</td><td>{{ row.completion }}</td>
<td>{{ "%.3f"|format(row.reward) }}</td></tr>
{% endfor %}
</tbody></table>
{% endfor %}
{% endif %}
</body>
</html>
""")
