"""A pytest plugin for TRL's own tests: data sets from TRL's generator, and our change in every trainer that trains.

TRL_CHANGE: "no"; "heads" for `accelerate_trainer(packed=False)`; "packed" for the whole change, with gradient
checkpointing off. TRL_ROWS: the directory of the data sets. TRL_OUTCOMES: the JSON file of outcomes.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

CHANGE = os.environ["TRL_CHANGE"]
outcomes: dict[str, str] = {}
changed: set[str] = set()
refused: dict[str, str] = {}
current = ""
usual_load, usual_train = datasets.load_dataset, transformers.Trainer.train


def load_dataset(
    path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False, **other: Any
):
    """The data set from disk where TRL's generator has made it."""
    directory = Path(os.environ["TRL_ROWS"]) / path / (name or "default")
    if not directory.exists():
        return usual_load(path, name, split=split, streaming=streaming, **other)
    rows = datasets.load_from_disk(str(directory))
    if streaming:
        rows = datasets.IterableDatasetDict({key: part.to_iterable_dataset() for key, part in rows.items()})
    if split is None:
        return rows
    part, _, slice_ = split.partition("[:")
    return rows[part].select(range(int(slice_.rstrip("]")))) if slice_ else rows[part]


def train(self: transformers.Trainer, *args: Any, **options: Any) -> Any:
    """Trainer.train with our change inside."""
    from rlhf_fast.integrations.trl import accelerate_trainer

    if not type(self).__module__.startswith("trl."):
        return usual_train(self, *args, **options)
    try:
        handle = accelerate_trainer(self, packed=CHANGE == "packed")
    except ValueError as error:
        refused[current] = str(error)
        return usual_train(self, *args, **options)
    changed.add(current)
    if CHANGE == "packed":
        self.args.gradient_checkpointing = self.args.activation_checkpointing = False
        self.model.gradient_checkpointing_disable()
    with handle:
        return usual_train(self, *args, **options)


def absent(name: str) -> Any:
    """Tests of a neighbouring commit ask for optional packages that this TRL does not know."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda *_, **__: False
    raise AttributeError(name)


vars(import_module("trl.import_utils"))["__getattr__"] = absent
datasets.load_dataset = load_dataset
if CHANGE != "no":
    transformers.Trainer.train = train


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    global current
    current = item.nodeid


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    found = {"outcomes": outcomes, "changed": sorted(changed), "refused": refused}
    Path(os.environ["TRL_OUTCOMES"]).write_text(json.dumps(found, indent=1))
