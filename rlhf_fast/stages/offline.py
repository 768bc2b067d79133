"""The loop of every offline stage: shuffled batches of rows, one optimizer step for each batch.

A step takes its batch a micro-batch at a time. With several processes each takes its share of the batch. The stage
gives a function for a micro-batch's loss. The stage's held-out rows are evaluated after every epoch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.config import OfflineConfig, RewardConfig, SFTConfig
from rlhf_fast.data.encoding import Encoded
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.room import EVALUATIONS, check_room
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import shard, whole, whole_bytes
from rlhf_fast.ranks import current
from rlhf_fast.training.batches import OfflineBatches
from rlhf_fast.training.evaluation import Evaluator
from rlhf_fast.training.learner import Learner, autocast, take_step, training_passes
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally


class Loss(Protocol):
    """The loss of a micro-batch, which is the micro-batch's part of its batch's mean."""

    def __call__(self, rows: list[int], whole: Any, tally: Tally, /) -> Tensor:
        """rows: indices of examples. whole: what `Offline.whole` made of the batch, such as its number of rows.
        tally: gets the step's numbers."""
        ...


class Offline:
    """One offline stage: the model it trains, its batches, and the loop.

    batches: the indices of the rows of every step.
    role: the name of the trained model in run.json.
    whole: makes of a batch's rows what the losses of its micro-batches need; default: the number of rows.
    held_out: evaluates the held-out rows and returns their metrics; called after every epoch.
    frozen, evaluator, show, listeners: as in `Run`.
    """

    def __init__(
        self,
        config: SFTConfig | RewardConfig | OfflineConfig,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batches: OfflineBatches,
        *,
        role: str = "policy",
        whole: Callable[[list[int]], Any] = len,
        held_out: Callable[[Run], dict[str, float]] | None = None,
        frozen: dict[str, PreTrainedModel | None] | None = None,
        evaluator: Evaluator | None = None,
        show: tuple[str, ...] = ("loss",),
        listeners: Sequence[Listener] = (),
    ) -> None:
        if config.batch_size < current().size:
            processes = current().size
            raise ValueError(f"batch_size: expected a row for each of {processes} processes, got {config.batch_size}")
        self.config, self.batches, self.whole, self.held_out = config, batches, whole, held_out
        shard(model, config.shard_trained, checkpointing=config.gradient_checkpointing)
        self.learner = Learner(model, config, batches.steps)
        if held_out is not None or evaluator is not None:
            later = self.learner.bytes_to_come
            check_room(whole_bytes(model), role, EVALUATIONS, model.device, later=later)
        self.run = Run(
            config,
            name,
            batches.steps,
            learners={role: self.learner},
            tokenizer=tokenizer,
            frozen=frozen,
            evaluator=evaluator,
            show=show,
            listeners=listeners,
        )

    @contextmanager
    def training(self, data: Encoded) -> Iterator[Run]:
        """The run over the rows of `data`. The stage calls `steps` inside.

        The stage may do more inside, before and after the steps. The trained model is written at the end.
        """
        with self.run as run:
            run.note(rows=len(data.examples), truncated_rows=data.truncated)
            run.note(cut_prompts=data.cut_prompts, cut_answers=data.cut_answers)
            if data.truncated:
                ends = f"{data.cut_prompts} lost the start of their prompt, {data.cut_answers} the end of an answer"
                run.logger.say(f"{run.description}: {ends}")
            yield run
            run.finish()

    def steps(self, loss: Loss) -> None:
        """Takes every step of every epoch."""
        run, learner = self.run, self.learner
        for step in run.steps():
            batch, tally = self.batches(step), Tally()
            whole, mine = self.whole(batch), current().share(batch)
            for rows in training_passes(current().shares(len(batch)), self.config.micro_batch_size, learner):
                with run.meter.phase("policy_update"):
                    with learner.autocast():
                        part = loss([*mine[rows]], whole, tally)
                    learner.backward(part)
                del part
            with run.meter.phase("optimizer"):
                metrics = take_step(tally, {"grad_norm": learner})
            metrics["lr"] = learner.lr
            if self.held_out is not None and step % self.batches.per_epoch == 0:
                with run.meter.phase("evaluation"):
                    metrics |= self.held_out(run)
            run.end_step(step, metrics)


@torch.no_grad()
def summed_logprobs(objectives: Objectives, parts: Iterable[Sequences], bf16: bool) -> list[Tensor]:
    """The log-probs [B] of the B responses of every part, summed over the tokens of a response.

    All processes call it where the model is in shards.
    """
    with whole(objectives.model), autocast(objectives.model.device, bf16):
        return [objectives.logprobs(part).logprobs.sum(dim=1) for part in parts]
