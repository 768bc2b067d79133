"""`rlhf-fast card`: a model card, README.md for the hub, made from what a run left in its directory."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub

from rlhf_fast.config import CardConfig
from rlhf_fast.data.files import write_text
from rlhf_fast.methods import STAGES, Stage
from rlhf_fast.report.curves import CURVES, make_curves
from rlhf_fast.report.plots import MethodRun
from rlhf_fast.report.report import load_run
from rlhf_fast.training.checkpoint import FINISHED
from rlhf_fast.training.made import FREE
from rlhf_fast.training.metrics import format_value, markdown_table

CARD, FIGURES = "README.md", "figures"
_MARK = "<!-- made by rlhf-fast card -->"
_SHOWN = ("held_out", "scores", "kl", "accuracy", "loss")  # the curves of a card, where the run has them
_SOURCES = {
    "ppo": "1707.06347",
    "remax": "2310.10505",
    "rloo": "2402.14740",
    "grpo": "2402.03300",
    "dpo": "2305.18290",
    "kto": "2402.01306",
    "online-dpo": "2402.04792",
}
"""Method -> its paper on arXiv."""


def run(config: CardConfig) -> None:
    """Writes README.md and the figures that it shows into `config.dir`."""
    directory = Path(config.dir)
    if not (directory / FINISHED).is_file():
        raise ValueError(f"dir: expected the output directory of a finished run, found no {FINISHED} in {directory}")
    target = directory / CARD
    if target.is_file() and _MARK not in target.read_text():
        raise ValueError(f"dir: expected no {CARD} of somebody else, found {target}; move it away first")
    found = load_run("", directory)
    name, stage = next((name, stage) for name, stage in STAGES.items() if stage.title == found.record["stage"])
    figures = _write_figures(found, stage, directory)
    write_text(target, str(make_card(config, found, name, stage, figures)))


def make_card(
    config: CardConfig, found: MethodRun, name: str, stage: Stage, figures: dict[str, str]
) -> huggingface_hub.ModelCard:
    """The card. figures: title of a curve -> path of its picture. ValueError for metadata that the hub refuses."""
    settings, base = found.record["config"], config.base_model or _hub_name(found.record["config"]["model"])
    licence = config.license or _licence_of(settings["model"])
    adapter = bool(settings.get("lora_rank"))
    scores = "reward" in stage.roles[:1]
    data = huggingface_hub.ModelCardData(
        base_model=base,
        datasets=config.datasets or None,
        library_name="peft" if adapter else "transformers",
        license=licence,
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["rlhf", "rlhf_fast", name],
    )
    title = config.title or f"{Path(base or settings['model']).name}, {stage.title}"
    parts = [
        f"# {title}",
        _MARK,
        f"{_link(base, settings['model'])} trained by {stage.title} ({stage.help})"
        + (f", [arXiv {_SOURCES[name]}](https://arxiv.org/abs/{_SOURCES[name]})," if name in _SOURCES else "")
        + f" with rlhf_fast {found.record['environment']['rlhf_fast']}.",
        "## How to load it\n\n```python\n"
        + _loading(config.repo or "DIRECTORY_OR_NAME", base, adapter, scores)
        + "```",
        "## Data\n\n" + _data(found, config),
        "## Figures\n\n"
        + (_figures(found) or "No held-out rows were given.")
        + "".join(f"\n\n![{caption}]({path})" for caption, path in figures.items()),
        "## Settings\n\n" + markdown_table([{"setting": k, "value": v} for k, v in _settings(settings).items()]),
        "## Made with\n\n" + _made_with(found),
        "## Licences\n\n"
        f"The model's licence: {licence or 'not stated; look at the card of its base'}. "
        f"The data's licence: {config.data_license or 'not stated; look at its source'}.",
    ]
    text = "\n\n".join(parts)
    return huggingface_hub.ModelCard(f"---\n{data}\n---\n\n{text}\n")


def _link(base: str | None, model: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(model).name}`"


def _hub_name(model: str) -> str | None:
    """The model's name on the hub; None of a directory, whose name says nothing there."""
    return None if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "~")) else model


def _licence_of(model: str) -> str | None:
    """The licence in the card of a base model's directory."""
    card = Path(model) / CARD
    found = huggingface_hub.metadata_load(card) if card.is_file() else None
    return found.get("license") if found else None


def _loading(place: str, base: str | None, adapter: bool, scores: bool) -> str:
    kind = "SequenceClassification" if scores else "CausalLM"
    if adapter:
        return (
            f"from peft import AutoPeftModelFor{kind}\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelFor{kind}.from_pretrained("{place}")  # an adapter on {base or "the base model"}\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
        )
    return (
        f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f'model = AutoModelFor{kind}.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    )


def _data(found: MethodRun, config: CardConfig) -> str:
    names = config.datasets or [Path(str(found.record["config"]["train_data"])).name]
    rows = found.record.get("rows")
    return f"{', '.join(f'`{name}`' for name in names)}" + (f", {rows:,} rows." if rows else ".")


def _figures(found: MethodRun) -> str:
    """The held-out figures, before and after where the run evaluated its start."""
    before, after = (found.evaluations[0], found.final) if found.evaluations else ({}, found.record)
    rows = []
    for key, value in after.items():
        if key.startswith("eval/") and not key.endswith("_se") and isinstance(value, int | float):
            row: dict[str, Any] = {"held out": key[5:].replace("_", " ")}
            if before:
                row["before"] = _with_error(before, key)
            rows.append({**row, "after": _with_error(after, key)})
    return markdown_table(rows) if rows else ""


def _with_error(row: dict[str, Any], key: str) -> Any:
    return (row[key], row[f"{key}_se"]) if key in row and f"{key}_se" in row else row.get(key)


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """The settings on which numbers depend; those that are not set, and paths of this machine, are left out."""
    return {
        key: json.dumps(value) if not isinstance(value, str) else value
        for key, value in config.items()
        if key not in FREE and value not in (None, [], {}, "") and "/" not in str(value)
    }


def _made_with(found: MethodRun) -> str:
    machine = found.record["environment"]
    return (
        f"{found.history[-1]['step']:,} steps in {format_value('seconds', found.record['train_seconds'])} on "
        f"{machine['device']}; torch {machine['torch']}, transformers {machine['transformers']}, "
        f"Python {machine['python']}."
    )


def _write_figures(found: MethodRun, stage: Stage, directory: Path) -> dict[str, str]:
    """The curves as directory/figures/*.png; title -> path within the directory."""
    named = MethodRun(name=stage.title, history=found.history)
    drawn = {name: figure for name, figure in make_curves([named]).items() if name in _SHOWN}
    paths = {}
    for name, figure in drawn.items():
        path = directory / FIGURES / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        paths[CURVES[name].title] = f"{FIGURES}/{name}.png"
    return paths
