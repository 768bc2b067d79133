"""Which back end runs an operation, and the library that holds the operators.

`TABLE` says for each device type which operations have a kernel and which back end runs it; everything else runs
`rlhf_fast.reference`. The environment variable RLHF_FAST_BACKEND and the context manager `backend` override the table
(tests, bench, bug reports); an operation that the named back end lacks runs the reference.

A compiled core that is missing is replaced by the reference, with one warning. One that is there but does not load
is an error: a broken build must not pass for a slow one.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

LIBRARY = torch.library.Library("rlhf_fast", "DEF")

BACKENDS = ("reference", "cpu", "triton", "cuda")

COMPILED = importlib.util.find_spec("rlhf_fast._cpu") is not None
if COMPILED:
    from rlhf_fast import _cpu
else:
    _cpu = None
    warnings.warn(
        "rlhf_fast._cpu is not built: CPU tensors run the slower plain PyTorch reference. "
        "Reinstall with a C++ compiler present (`pip install -e .`).",
        stacklevel=2,
    )

_CPU_OPS = (
    "token_logprobs",
    "sample_tokens",
    "kl_penalty",
    "shape_rewards",
    "gae",
    "discounted_returns",
    "whiten",
    "remax_returns",
    "rloo_advantages",
    "grpo_advantages",
    "ppo_loss",
    "ppo_value_loss",
    "reinforce_loss",
    "reward_loss",
    "ranking_loss",
    "dpo_loss",
    "linear_token_logprobs",
    "linear_sft_loss",
    "linear_reinforce_loss",
    "linear_ppo_loss",
    "linear_dpo_loss",
)
TABLE: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys(_CPU_OPS, "cpu") if COMPILED else {},
    "cuda": {},
}


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_override = _known(os.environ.get("RLHF_FAST_BACKEND") or None, "RLHF_FAST_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on the named back end ("reference", "cpu", "triton" or "cuda").

    The override is global to the process, not to a thread. Raises ValueError for an unknown name.
    """
    global _override
    before, _override = _override, _known(name, "backend")
    try:
        yield
    finally:
        _override = before


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Whether a kernel, not the reference, runs this operation on this tensor."""
    chosen = TABLE.get(tensor.device.type, {}).get(op, "reference")
    return chosen != "reference" and _override in (None, chosen)


# What every launch of a compiled kernel needs

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def code(x: Tensor) -> int:
    """The compiled core's number for a dtype."""
    return _CODES[x.dtype]


def pointer(x: Tensor | None) -> int:
    """The address the compiled core reads or writes; 0 for an absent tensor."""
    return 0 if x is None else x.data_ptr()


def threads(x: Tensor) -> int:
    """Threads for a kernel that passes over x: one per 32,768 elements, as in torch's own CPU kernels."""
    return max(1, min(torch.get_num_threads(), x.numel() // 32_768))


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def common_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """float64 if one of them is, else float32: the small kernels take one dtype."""
    if all(x is None or x.dtype is torch.float32 for x in tensors):
        return tensors
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x if x is None else x.to(dtype) for x in tensors)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.contiguous() for x in tensors)
