"""Listeners hear what a run does. A logger is a listener; so is a benchmark that counts steps.

    class Printer(Listener):
        def log(self, step, row):
            print(step, row)

    sft.train(config, listeners=[Printer()])

Left out on purpose: changing a run. A listener that raises ends the run with its error.
"""

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
