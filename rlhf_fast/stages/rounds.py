"""The rounds of a run: sampled and trained in turn, or one round ahead.

One round ahead, a server samples round t + 1 while round t trains:

    weights after update     0       0       1       2
    sampled round            1       2       3       4
    beside the training of   -       1       2       3

Round t + 1 always comes from the weights after update t - 1, however fast either side is, so that the same seeds give
the same run. Its completions are one update older than the policy that learns from them. `training.mismatch` weighs
them by pi / mu, the policy of now over the policy that has sampled.

A checkpoint after step t has the rows of round t + 1, because the weights that sampled them are gone. Where the server
did not finish that round, the files of these weights stay in the run's directory, and a resumed run samples from them.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from rlhf_fast.ranks import current
from rlhf_fast.rollout.generate import Generation
from rlhf_fast.rollout.sampler import Sampler
from rlhf_fast.rollout.vllm.client import ServerError
from rlhf_fast.rollout.vllm.rows import Row
from rlhf_fast.rollout.vllm.sampler import Asked, VLLMSampler

Model = TypeVar("Model")
Result = TypeVar("Result")
Rows = list[list[Row]]  # of every request


class InTurn:
    """Every round is sampled by the weights that train on it. All processes make the same calls.

    question: the arguments of the sampler's call for this process's prompts of a round, counted from 1.

        for step in steps:
            generation = rounds.take(step)
            ...  # training
            rounds.settle(step)
    """

    def __init__(self, sampler: Sampler, question: Callable[[int], dict[str, Any]]) -> None:
        self.sampler, self.question = sampler, question

    @property
    def states(self) -> dict[str, Any]:
        """What a checkpoint has to carry."""
        return {}

    def take(self, step: int) -> Generation:
        """The completions of round `step`."""
        self.sampler.refresh()
        return self.sampler(**self.question(step))

    def settle(self, step: int) -> None:
        """After the training of round `step`, before its checkpoint."""

    def guard(self, evaluator: Callable[[Model], Result] | None) -> Callable[[Model], Result] | None:
        """The evaluator, which pushes weights to a server."""
        return evaluator

    def close(self) -> None:
        """After the run, also where an exception ends it."""


class Ahead(InTurn):
    """Round t + 1 is sampled while round t trains. last: the number of the last round.

    A round that the server does not give raises ServerError in the next evaluation or the next `take`, when the step
    before it and its checkpoint are complete.
    """

    def __init__(self, sampler: VLLMSampler, question: Callable[[int], dict[str, Any]], *, last: int) -> None:
        super().__init__(sampler, question)
        self.sampler, self.last, self.ranks = sampler, last, current()
        self._step, self._rows = 0, list[Rows]()  # the round that trains, or trains next; the rows of every process
        self._coming: Future[Rows] | None = None
        self._failed: ServerError | None = None
        self._owed = True  # whether the files of an earlier push may have to give a round that is not here
        self._pool = ThreadPoolExecutor(1)

    @property
    def states(self) -> dict[str, Any]:
        """As in `InTurn`."""
        return {"rounds": self}

    def take(self, step: int) -> Generation:
        """The completions of round `step`. The server gets the weights of now, and begins with the next round."""
        self._check()
        asked = self._ask(step)
        if self._step != step:
            self._step, self._rows = step, self.ranks.gather(self._first(step, asked))
        self._owed = False
        if step < self.last:
            self.sampler.refresh()
            self.sampler.server.note(step + 1)
            self._coming = self._pool.submit(self.sampler.rows, self._ask(step + 1), self.sampler.server.reload)
        return self.sampler.generation(asked, self._own(asked))

    def settle(self, step: int) -> None:
        """Waits for the round behind `step`. A checkpoint has it from now on."""
        if self._coming is None:
            return
        try:
            rows, failed = self._coming.result(), None
        except ServerError as error:
            rows, failed = None, error
        self._coming = None
        every = self.ranks.gather((rows, str(failed)))
        self._step, self._rows = step + 1, [found for found, _ in every if found is not None]
        lost = [said for found, said in every if found is None]
        if lost:
            self._step, self._rows, self._owed = 0, [], True
            self._failed = failed or ServerError(lost[0])

    def guard(self, evaluator: Callable[[Model], Result] | None) -> Callable[[Model], Result] | None:
        """As in `InTurn`; the evaluator does not push weights in the place of those that a lost round needs."""
        if evaluator is None:
            return None

        def guarded(model: Model) -> Result:
            self._check()
            return evaluator(model)

        return guarded

    def close(self) -> None:
        """Ends the requests that are under way. The files stay where a lost round is sampled from them."""
        if self._coming is not None:
            self.sampler.server.client.break_off()
            self._coming.exception()
        self._pool.shutdown()
        if not self._owed:
            self.sampler.server.forget()

    def state_dict(self) -> dict[str, Any]:
        """The rows of the round that trains next; without rows where the server did not give it."""
        requests = [rows for own in self._rows for rows in own]
        return {"step": self._step, "rows": [[[*row] for row in rows] for rows in requests]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `state_dict` has written it, by any number of processes."""
        rows = [[Row(*row) for row in rows] for rows in state["rows"]]
        self._step, self._rows = state["step"], [rows] if rows else []

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _ask(self, step: int) -> Asked:
        return self.sampler.ask(**self.question(step))

    def _first(self, step: int, asked: Asked) -> Rows:
        """The rows of a round that no round before has asked for."""
        server, self._owed = self.sampler.server, step > 1
        if step == 1 or not server.restored(step):
            if step > 1 and self.ranks.first:
                warnings.warn(
                    f"rollouts_ahead: the rows of round {step} are lost with the weights that sampled them; the "
                    "checkpoint's weights sample it anew",
                    stacklevel=2,
                )
            self.sampler.refresh()
        return self.sampler.rows(asked, server.reload)

    def _own(self, asked: Asked) -> Rows:
        """This process's requests among those of all processes, whose prompts are in order."""
        every = [rows for own in self._rows for rows in own]
        each = len(asked.requests) // max(1, len(asked.ids))
        part = self.ranks.part(len(every) // each)
        return [*every[part.start * each : part.stop * each]]


def rounds(sampler: Sampler, question: Callable[[int], dict[str, Any]], *, ahead: int, last: int) -> InTurn:
    """The rounds as a config asks for them. ahead: rounds, 0 or 1. last: the number of the last round."""
    if not ahead:
        return InTurn(sampler, question)
    assert isinstance(sampler, VLLMSampler)  # the config refuses any other
    return Ahead(sampler, question, last=last)
