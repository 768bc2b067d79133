"""Trackers: listeners that send a run's config, metrics, samples and files to wandb, trackio, TensorBoard or MLflow.

Metrics have the names that transformers' Trainer, and so TRL, gives them there: `train/rewards/chosen`, `eval/reward`.
A run that goes on after a checkpoint goes on in the tracker too, because a file in output_dir keeps the run's name
there. The first process alone tracks.

Left out: settings of a tracker's own. Its environment variables hold (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_SPACE_ID, ...).
"""

import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_fast.config.fields import describe
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_json
from rlhf_fast.methods import load
from rlhf_fast.training.listeners import Listener, Running
from rlhf_fast.training.reward_files import load_file, load_module

PROJECT = "rlhf_fast"  # where the tracker's own variable names no other
NOTE = "trackers.json"  # in output_dir: tracker -> the run's name there
_FILES = ("run.json", "report.html")  # what a finished run leaves for its readers
_CALLS = {"begin", "collected", "log", "end"}


def trackers(names: Sequence[str]) -> list[Listener]:
    """A listener for each name: of TRACKERS, or a class as package.module:Class or file.py:Class.

    Raises ValueError, naming `track`, where the package or the class is missing.
    """
    return [TRACKERS[name]() if name in TRACKERS else _own(name) for name in names]


def _own(name: str) -> Listener:
    place, _, attribute = name.rpartition(":")
    if not place:
        known = ", ".join(TRACKERS)
        raise ValueError(f"track: expected one of {known}, or package.module:Class, got {name!r}")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else load_module(place)
        listener = getattr(module, attribute)()
    except (ImportError, AttributeError, OSError, TypeError) as error:
        raise ValueError(f"track: expected a class without arguments at {name}, got {error}") from error
    if missing := sorted(call for call in _CALLS if not callable(getattr(listener, call, None))):
        raise ValueError(f"track: expected a `Listener` at {name}, got an object without {', '.join(missing)}")
    return listener


def tracked(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics under the names that Trainer gives them."""
    return {
        key if key.startswith("eval/") else f"train/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float)
    }


class Tracker(Listener, ABC):
    """What the trackers have in common."""

    name = ""  # in `track`
    package = ""  # what pip installs
    module = ""  # what Python imports

    def __init__(self) -> None:
        self.imported = _imported(self.module or self.name, self.name, self.package or self.name)
        self.directory, self.first_step = Path(), 1

    def begin(self, run: Running) -> None:
        """Starts a run of the tracker, or goes on with the run that this output_dir had."""
        self.directory, self.first_step = Path(run.config.output_dir), run.first_step
        note = self.directory / NOTE
        known = read_json(note) if note.is_file() and run.first_step > 1 else {}
        known[self.name] = self.open(self.directory.resolve().name, describe(run.config), known.get(self.name))
        write_json(note, known)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Sends the numbers of the row."""
        self.write(tracked(row), step)

    def end(self) -> None:
        """Sends the samples and files of a run that has finished, and closes the tracker's run."""
        try:
            if (self.directory / "run.json").is_file():
                self._finished()
        finally:
            self.close()

    def _finished(self) -> None:
        load("report.runs:write_one")(self.directory)
        if (self.directory / "samples.json").is_file():
            columns, rows = _samples(self.directory)
            self.table("samples", columns, rows)
        for file in _FILES:
            if (self.directory / file).is_file():
                self.file(self.directory / file)

    @abstractmethod
    def open(self, name: str, config: dict[str, Any], earlier: Any) -> Any:
        """Starts the run `name`, or goes on with the run `earlier`; returns what finds it again."""

    @abstractmethod
    def write(self, numbers: dict[str, float], step: int) -> None:
        """Sends the numbers of a step."""

    @abstractmethod
    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Sends a table."""

    @abstractmethod
    def file(self, path: Path) -> None:
        """Sends a file."""

    @abstractmethod
    def close(self) -> None:
        """Ends the run there."""


class WandB(Tracker):
    """Weights & Biases. WANDB_MODE=offline writes to output_dir/wandb."""

    name = "wandb"

    def open(self, name: str, config: dict[str, Any], earlier: Any) -> Any:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        options = {"id": earlier, "resume": "allow"} if earlier else {}
        self.run = self.imported.init(
            project=project, name=name, config=config, dir=str(self.directory), reinit="create_new", **options
        )
        return self.run.id

    def write(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.run.log({name: self.imported.Table(columns=columns, data=rows)})

    def file(self, path: Path) -> None:
        artifact = self.imported.Artifact(f"{self.run.id}-{path.stem}", type=path.stem)
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """trackio: a local store, or a Space of the hub where TRACKIO_SPACE_ID names it."""

    name = "trackio"

    def open(self, name: str, config: dict[str, Any], earlier: Any) -> Any:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        options = {"resume": "allow"} if earlier else {}
        self.run = self.imported.init(
            project=project,
            name=earlier or name,
            config=json.loads(json.dumps(config)),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            **options,
        )
        return self.run.name

    def write(self, numbers: dict[str, float], step: int) -> None:
        self.imported.log(numbers, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.imported.log({name: self.imported.Table(columns=columns, data=rows)})

    def file(self, path: Path) -> None:
        self.imported.log_artifact(str(path), name=f"{self.run.name}-{path.stem}", type=path.stem)

    def close(self) -> None:
        self.imported.finish()


class TensorBoard(Tracker):
    """Event files in output_dir/tensorboard."""

    name, module = "tensorboard", "torch.utils.tensorboard"

    def open(self, name: str, config: dict[str, Any], earlier: Any) -> Any:
        """Opens an event file. A run that goes on hides the events of the steps that it takes again."""
        directory, first = self.directory / "tensorboard", self.first_step
        for stale in () if first > 1 else directory.glob("events.out.tfevents.*"):
            stale.unlink()  # else TensorBoard would show an earlier run's curves as curves of this run
        self.writer = self.imported.SummaryWriter(str(directory), purge_step=first if first > 1 else None)
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")
        return "tensorboard"

    def write(self, numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
        self.writer.add_text(name, text)

    def file(self, path: Path) -> None:
        """TensorBoard keeps no files; they lie beside its own."""

    def close(self) -> None:
        self.writer.close()


class MLflow(Tracker):
    """MLflow, at MLFLOW_TRACKING_URI or in ./mlruns."""

    name = "mlflow"

    def open(self, name: str, config: dict[str, Any], earlier: Any) -> Any:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            self.imported.set_experiment(PROJECT)
        run = self.imported.start_run(run_id=earlier) if earlier else self.imported.start_run(run_name=name)
        if not earlier:
            self.imported.log_params(config)
        return run.info.run_id

    def write(self, numbers: dict[str, float], step: int) -> None:
        self.imported.log_metrics(numbers, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.imported.log_table(
            {column: [row[i] for row in rows] for i, column in enumerate(columns)}, artifact_file=f"{name}.json"
        )

    def file(self, path: Path) -> None:
        self.imported.log_artifact(str(path))

    def close(self) -> None:
        self.imported.end_run()


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (WandB, Trackio, TensorBoard, MLflow)}
"""Name in `track` -> tracker."""


def _imported(module: str, name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"track: expected the package {package} for {name}, found none; pip install {package}"
        ) from error


def _samples(directory: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the held-out prompts: the completion and reward of the start, where known, and of the end."""
    after = read_json(directory / "samples.json", list)
    before = directory / "samples_before.json"
    start = read_json(before, list) if before.is_file() else []
    if len(start) != len(after):
        return ["prompt", "completion", "reward"], [[r["prompt"], r["completion"], r["reward"]] for r in after]
    columns = ["prompt", "completion before", "completion after", "reward before", "reward after"]
    pairs = zip(start, after, strict=True)
    return columns, [[b["prompt"], a["completion"], b["completion"], a["reward"], b["reward"]] for a, b in pairs]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
