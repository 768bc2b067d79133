"""The optimizers and learning-rate schedules that the stages offer.

Left out: optimizers other than AdamW.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from rlhf_fast.config import StageConfig

_BETAS = (0.9, 0.95)


def make_optimizer(config: StageConfig, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW of the kind `config.optimizer`; weight decay applies to matrices alone.

    Raises ValueError where the kind needs a package that is missing or does not run on the parameters' device.
    """
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=_BETAS, fused=True)
    return _adamw_8bit(groups, lr)


def _adamw_8bit(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    if find_spec("bitsandbytes") is None:
        raise ValueError('optimizer: expected bitsandbytes for adamw_8bit, not installed: pip install -e ".[8bit]"')
    device = groups[0]["params"][0].device
    # Whether bitsandbytes runs depends on its build and on the device, so a trial step is taken. It has 4096 weights,
    # the fewest that bitsandbytes keeps in 8 bits.
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
