"""The optimizers and learning-rate schedules the stages offer.

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
    """AdamW of the kind `config.optimizer`, weight decay on matrices only."""
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
    try:  # a step on 4096 weights, the least it keeps in 8 bits: whether it runs depends on its build and the device
        from bitsandbytes.optim import AdamW8bit

        trial = nn.Parameter(torch.zeros(64, 64, device=device))
        trial.grad = torch.ones_like(trial)
        AdamW8bit([trial]).step()
    except Exception as error:
        raise ValueError(f"optimizer: expected adamw_8bit to run on {device}, bitsandbytes says: {error}") from error
    return AdamW8bit(groups, lr=lr, betas=_BETAS)


def lr_factor(schedule: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Step -> what the peak learning rate is multiplied by."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

    return factor
