"""The error of a run that cannot go on, although its config is right."""

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_fast.training.ending import Ended


class Stopped(RuntimeError):
    """A check of the run does not hold, or a function of the user raised an exception. One sentence says which.

    The command prints the sentence, as for a wrong config, and ends with exit code 1.
    """


class Diverged(Stopped):
    """The run's numbers are not what they must be: weights or gradients that are not finite, drifting log-probs.

    The run adds which checkpoint is good, and how to go on. remedy: what may help, such as "a smaller learning_rate".
    """

    def __init__(self, sentence: str, remedy: str = "a smaller learning_rate") -> None:
        super().__init__(sentence)
        self.remedy = remedy


@contextmanager
def by_reward() -> Iterator[None]:
    """Inside, the user's reward function works: `is_by_reward` is true of an exception that it raises or causes."""
    try:
        yield
    except Ended:  # a signal to the process
        raise
    except BaseException as error:
        error.__dict__["by_reward"] = True
        raise


def is_by_reward(error: BaseException | None) -> bool:
    """Whether a reward function, which the user may mend, made this exception."""
    return getattr(error, "by_reward", False)
