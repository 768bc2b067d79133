"""Listeners hear what a run does. A logger is a listener; so is a benchmark that counts steps.

    class Printer(Listener):
        def log(self, step, row):
            print(step, row)

    sft.train(config, listeners=[Printer()])

Left out on purpose: changing a run. A listener that raises ends the run with its error.
"""

from pathlib import Path
from typing import Any, Protocol

from rlhf_fast.config import StageConfig
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.meter import Meter


class Running(Protocol):
    """What a listener may read of a run."""

    config: StageConfig
    first_step: int  # the run's next step: 1, or the step after the checkpoint it goes on from
    learners: dict[str, Learner]  # by role; the first is the stage's product
    meter: Meter


class Listener:
    """Every method does nothing here; a subclass overrides the methods that it needs."""

    def begin(self, run: Running) -> None:
        """The run starts, or goes on after a checkpoint."""

    def collected(self, step: int, experience: Any) -> None:
        """An online method has sampled and scored the `Experience` of a round."""

    def log(self, step: int, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl: numbers and strings by name. Step 0 is the evaluation before the first step.

        The names differ between stages: the loss is "loss" of an offline stage, "loss/policy_avg" of an online stage.
        """

    def end(self) -> None:
        """The run is over, also when an error ended it. A listener whose `begin` has failed gets no `end`."""


class TensorBoard(Listener):
    """Scalars as event files in output_dir/tensorboard.

    Raises ValueError where the tensorboard package is missing.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(
                "tensorboard: expected the tensorboard package, found none; pip install 'rlhf-fast[tensorboard]'"
            ) from error
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def begin(self, run: Running) -> None:
        """Opens an event file. A run that goes on hides the events of the steps that it takes again."""
        directory, last = Path(run.config.output_dir) / "tensorboard", run.first_step - 1
        for stale in () if last else directory.glob("events.out.tfevents.*"):
            stale.unlink()  # else TensorBoard would show an earlier run's curves as curves of this run
        self._writer = self._open(str(directory), purge_step=last + 1 if last else None)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """Writes every number of the row but the step as a scalar."""
        assert self._writer is not None  # a run calls `begin` first
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def end(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
