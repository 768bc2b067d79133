"""The optimizers and learning-rate schedules that the stages offer.

Half-precision weights are trained through fp32 copies (`MasterWeights`), because an update of 1e-6 of a weight is less
than a bf16 number can show, so that most steps would change nothing.

Left out: optimizers other than AdamW.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.config import StageConfig
from rlhf_fast.lm.dtypes import HALVES
from rlhf_fast.lm.eight_bits import import_bitsandbytes
from rlhf_fast.lm.state_files import parts_of

MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}  # of a weight; a byte each, an fp32 scale per 256 of them
_BETAS = (0.9, 0.95)


class MasterWeights:
    """An optimizer of half-precision weights, which it steps through fp32 copies of the weights.

    A step takes one weight at a time: the gradient becomes fp32 and is dropped, the copy moves, and the weight is the
    copy rounded. Small weights come first, so that their gradients have left room when a large gradient becomes fp32.
    Weights that are fp32 already are their own copies.

    inner: the optimizer of the copies, which also has the parameter groups and the learning rate.
    factor: 0-dim tensor that gradients are multiplied by once they are fp32, such as the factor of clipping, or None.
    """

    def __init__(
        self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        self.masters = masters
        pairs = zip(parameters, masters, strict=True)
        self.pairs = sorted(pairs, key=lambda pair: pair[0].numel())
        self.inner = make(masters)
        self.factor: Tensor | None = None

    @property
    def state(self) -> dict[str, Any]:
        """Everything that the optimizer holds, for the count of bytes."""
        return {"masters": self.masters, "inner": self.inner.state}

    @torch.no_grad()
    def step(self) -> None:
        """Moves every weight that has a gradient, and drops the gradients."""
        for parameter, master in self.pairs:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            master.grad = gradient.float()
            del gradient
            if self.factor is not None:
                master.grad *= self.factor
            self.inner.step()  # moves this copy alone: no other has a gradient at this moment
            master.grad = None
            if parameter.dtype != master.dtype:
                parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        for parameter, _ in self.pairs:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The copies and the state of the optimizer that moves them."""
        return {"masters": [master.detach() for master in self.masters], "inner": self.inner.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict` with whole tensors, and the weights as the copies rounded."""
        saved = parts_of(list(zip(state["masters"], self.masters, strict=True)))
        for master, copy in zip(self.masters, saved, strict=True):
            master.copy_(copy)
        for parameter, master in self.pairs:
            parameter.copy_(master)
        load_state(self.inner, state["inner"])


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of a state with whole tensors. Of a weight in shards it keeps this process's part."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    found = [
        (moments, name, weight)
        for number, weight in zip(numbers, weights, strict=True)
        if (moments := state["state"].get(number))
        for name, moment in moments.items()
        if isinstance(moment, Tensor) and moment.shape == weight.shape
    ]
    own = parts_of([(moments[name], weight) for moments, name, weight in found])
    for (moments, name, _), moment in zip(found, own, strict=True):
        moments[name] = moment
    optimizer.load_state_dict(state)


def make_optimizer(
    config: StageConfig, parameters: list[nn.Parameter], lr: float
) -> torch.optim.Optimizer | MasterWeights:
    """AdamW of the kind `config.optimizer`, with fp32 copies where weights are bf16; matrices alone decay.

    Raises ValueError where the kind needs a package that is missing or does not run on the parameters' device.
    """
    make = partial(_adamw, config, lr=lr)
    return MasterWeights(parameters, make) if any(p.dtype in HALVES for p in parameters) else make(parameters)


def _adamw(config: StageConfig, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=_BETAS, fused=True)
    return _adamw_8bit(groups, lr)


def _adamw_8bit(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    if find_spec("bitsandbytes") is None:
        raise ValueError("optimizer: expected bitsandbytes for adamw_8bit, not there: pip install 'rlhf-fast[8bit]'")
    device = groups[0]["params"][0].device
    # Whether bitsandbytes runs depends on its build and on the device, so a trial step is taken. It has 4096 weights,
    # the fewest that bitsandbytes keeps in 8 bits.
    import_bitsandbytes()
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportPrivateImportUsage]

        trial = nn.Parameter(torch.zeros(64, 64, device=device))
        trial.grad = torch.ones_like(trial)
        AdamW8bit([trial]).step()
    except Exception as error:
        raise ValueError(f"optimizer: expected adamw_8bit to run on {device}, bitsandbytes says: {error}") from error
    return AdamW8bit(groups, lr=lr, betas=_BETAS)


def lr_factor(schedule: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The schedule as a function: step from 0 on -> factor of the peak learning rate.

    schedule: constant, linear or cosine, after `warmup_steps` steps of linear warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

    return factor
