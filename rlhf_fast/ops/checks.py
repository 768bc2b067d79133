"""Argument checks shared by the operations: ValueError with the argument's name, what was expected and what came.

They read shapes, dtypes and devices only, so that they cost microseconds and never wait for a device.
"""

import math

import torch
from torch import Tensor

from rlhf_fast.ops.private import is_fake

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def is_readable(x: Tensor) -> bool:
    """Whether its numbers are there, and asking for them waits for no device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(x)


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError "name: expected ..., got ..." unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_floats(first: str, *, optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """Every tensor is floating point and has the shape and device of the one named `first`; `optional` may be None."""
    like = tensors[first]
    for name, x in tensors.items():
        check_like(name, x, first, like)
    for name, x in (optional or {}).items():
        if x is not None:
            check_like(name, x, first, like)


def check_like(name: str, x: Tensor, first: str, like: Tensor) -> None:
    """A floating point tensor with the shape and device of the one named `first`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {x.dtype}")
    if x is like:
        return
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)} as {first}, got {list(x.shape)}")
    check_device(name, x, first, like)


def check_device(name: str, x: Tensor, first: str, like: Tensor) -> None:
    """The device of the tensor named `first`."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as {first}, got {x.device}")


def check_dims(name: str, x: Tensor, dims: str) -> None:
    """`dims` spells the axes, one letter each: "BT" wants two."""
    if x.dim() != len(dims):
        raise ValueError(f"{name}: expected shape [{', '.join(dims)}], got {list(x.shape)}")


def check_mask(mask: Tensor, first: str, like: Tensor, name: str = "mask") -> None:
    """A bool tensor with the shape and device of the tensor named `first`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(
            f"{name}: expected a bool tensor (True = counts), got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    if mask.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)} as {first}, got {list(mask.shape)}")
    check_device(name, mask, first, like)


def check_per_row(name: str, x: Tensor, first: str, like_BT: Tensor) -> None:
    """A floating point [B] vector beside a [B, T] tensor."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != like_BT.shape[:1]:
        raise ValueError(f"{name}: expected shape [{like_BT.shape[0]}], one per row of {first}, got {list(x.shape)}")
    check_device(name, x, first, like_BT)


def check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    """One of the names in a list."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """A number > 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_clip(name: str, value: float | None) -> None:
    """A bound > 0, or None for no bound."""
    if value is not None and not value > 0:
        raise ValueError(f"{name}: expected a number > 0 or None, got {value}")
