"""One trained model: its optimizer, learning-rate schedule, clipping and autocast.

`Learner` turns the gradients of micro-batches into one optimizer step. `take_step` takes this step. The stages write
the loop over micro-batches.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast.config import StageConfig
from rlhf_fast.lm.passes import idle
from rlhf_fast.lm.sharding import full, is_part, is_sharded
from rlhf_fast.ranks import current
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.in_backward import InBackward, norm_of
from rlhf_fast.training.memory import static_bytes
from rlhf_fast.training.moments import check_state
from rlhf_fast.training.optimizers import MOMENT_BYTES, MasterWeights, load_state, lr_factor, make_optimizer
from rlhf_fast.training.stopped import Diverged
from rlhf_fast.training.tally import Tally
from rlhf_fast.training.tensor_bytes import plain_tensors


class Learner:
    """One trained model with its optimizer, learning-rate schedule, clipping and autocast.

    parameters: the parameters to train; default: all parameters of `model` that require gradients.
    A model in shards is sharded before: its parameters are then those of this process's part.
    With config.optimizer_in_backward the weights move during backward, and `apply` only closes the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: StageConfig,
        total_steps: int,
        *,
        learning_rate: float | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.model, self.max_grad_norm, self.bf16 = model, config.max_grad_norm, config.bf16
        self.static_bytes: dict[str, int] = {}
        self._moment_bytes = MOMENT_BYTES[config.optimizer]
        self.ranks = current()
        self.parameters = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
        self.optimizer = make_optimizer(config, self.parameters, learning_rate or config.learning_rate)
        factor = lr_factor(config.lr_schedule, config.warmup_steps, total_steps)
        groups = self.optimizer.inner if isinstance(self.optimizer, MasterWeights) else self.optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(groups, factor)
        self.in_backward, self.spoilt = None, False
        self._moving, self._counted = False, False  # a resumed run counts anew, as its shards may be others
        if config.optimizer_in_backward:
            alone = parameters is None and not is_sharded(model)
            self.in_backward = InBackward(self.parameters, self.optimizer, alone=alone)
        if config.gradient_checkpointing:
            checkpoint_activations(model)

    def autocast(self) -> torch.autocast:
        """The precision of this model's passes, as a context."""
        return autocast(self.model.device, self.bf16)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch's loss."""
        loss.backward()
        if self.in_backward is not None:
            self.in_backward.finish()

    def clip(self) -> Tensor:
        """The norm of the accumulated gradients, 0-dim and on the device. Clips the gradients to max_grad_norm.

        With several processes the gradients are first added up over all processes. Those of a model in shards have been
        added up in the backward pass.
        """
        if self.in_backward is not None:
            return self.in_backward.take_norm(self.model.device)
        self.ranks.add_gradients([p for p in self.parameters if not is_part(p)])
        if isinstance(self.optimizer, MasterWeights):  # clips fp32 gradients, because a product in bf16 is rounded
            norms = [norm_of(p.grad) for p in self.parameters if p.grad is not None]
            norm = full(torch.stack(norms).norm()) if norms else torch.zeros((), device=self.model.device)
            if self.max_grad_norm:
                self.optimizer.factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            return norm
        return full(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf))

    def idle(self) -> None:
        """A training pass that counts nothing, made while other processes make passes over their rows."""
        with self.autocast():
            nothing = idle(self.model)
        self.backward(nothing)

    def check(self, norm: float) -> None:
        """Diverged unless the norm of the gradients is finite. Call it before `apply`."""
        if not math.isfinite(norm):
            self.spoilt = self.in_backward is not None
            left = "spoilt" if self.spoilt else "left as they are"
            raise Diverged(f"gradient norm is {norm}; the weights were {left}")

    def apply(self) -> None:
        """Moves the weights by the clipped gradients and clears the gradients."""
        self._moving = True
        first, weights = not self._counted, {"": nn.ParameterList(self.parameters)}
        gradients = static_bytes(weights)[""]["gradients"] if first else 0  # a step may drop them
        if self.in_backward is None:
            self.optimizer.step()
        if first:
            held = static_bytes(weights, {"": self.optimizer})[""]
            self.static_bytes = {"gradients": gradients, "optimizer": held["optimizer"]}
            self._counted = True
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self._moving = False

    @property
    def whole(self) -> bool:
        """Whether the weights hold whole updates alone: nothing that moves weights broke off half-way."""
        return not (self.spoilt or self._moving or (self.in_backward is not None and self.in_backward.norms))

    @property
    def bytes_to_come(self) -> int:
        """Bytes of the optimizer's moments, which the first step makes."""
        own = (numbers.numel() for parameter in self.parameters for numbers in plain_tensors(parameter.detach()))
        return round(sum(own) * self._moment_bytes)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """The state of optimizer and schedule; the model's weights are not part of it.

        Of a model in shards it has this process's parts of the tensors.
        """
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "static_bytes": self.static_bytes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict` with whole tensors, or with tensors without data (`state_files`).

        Raises ValueError where it is that of other weights or of another optimizer.
        """
        names = {p: f"weight {i}" for i, p in enumerate(self.parameters)}
        check_state(self.optimizer, state["optimizer"], names | {p: name for name, p in self.model.named_parameters()})
        if isinstance(self.optimizer, MasterWeights):
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            load_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.static_bytes = state["static_bytes"]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the model's layers run again in the backward pass, so that it holds fewer activations."""
    # transformers 5 renamed this method; the old name warns where the new name exists
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """The precision of passes, as a context: bfloat16 autocast with `bf16`, else the weights' own dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def training_passes(rows: Sequence[int], size: int | None, *learners: Learner) -> Iterator[slice]:
    """The micro-batches of this process, one after the other, for a pass of every learner over each of them.

    rows: of every process, in their order. size: rows of a micro-batch; None: all of them.
    Where a model is in shards, all processes have to make equally many passes. A process with fewer micro-batches than
    another makes idle passes behind them.
    """
    parts = micro_batches(rows[current().rank], size)
    yield from parts
    most = max(len(micro_batches(count, size)) for count in rows)
    in_shards = [learner for learner in learners if is_sharded(learner.model)]
    for _ in range(most - len(parts)):
        for learner in in_shards:
            learner.idle()


def take_step(
    tally: Tally, learners: Mapping[str, Learner], check: Callable[[dict[str, float]], None] | None = None
) -> dict[str, float]:
    """One optimizer step of every learner; returns the numbers of `tally` with the gradient norms.

    learners: name of the gradient norm -> learner. check: called with the numbers before any weight moves.
    The step waits for the device once, when it reads the numbers.
    Raises Diverged where a norm is not finite; no learner has moved its weights then.
    """
    for name, learner in learners.items():
        tally.same(name, learner.clip())
    numbers = tally.read()
    for name, learner in learners.items():
        learner.check(numbers[name])
    if check is not None:
        check(numbers)
    for learner in learners.values():
        learner.apply()
    return numbers
