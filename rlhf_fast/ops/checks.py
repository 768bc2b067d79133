"""Argument checks shared by the operations: ValueError with the argument's name, what was expected and what came.

They read shapes, dtypes, layouts and devices only, so that they cost microseconds and never wait for a device.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.private import is_fake

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
NUMBERS = (*FLOATS, *INTEGERS, torch.int16, torch.int8, torch.uint8)
_REAL = (float, int, torch.SymFloat, torch.SymInt)  # the latter two while torch.compile or export traces
_LARGEST = 2**1000  # integers beyond do not fit a float64
_SHOWN = 80  # characters of a wrong value that a message repeats


def is_readable(x: Tensor) -> bool:
    """Whether its numbers are there, and asking for them waits for no device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(x)


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError "name: expected ..., got ..." unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def shown(value: object) -> str:
    """What a message says of a wrong value: a tensor's shape, else the value itself, cut short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # such as an integer of 5,000 digits
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# Tensors


def check_tensor(name: str, x: Any) -> None:
    """A tensor whose numbers lie in memory one after another, by strides: not sparse, nested or of another library."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise ValueError(f"{name}: expected a dense tensor (torch.strided), got {kind}")


def check_dtype(name: str, x: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """A tensor of one of these dtypes; by default floating point."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        check_tensor(name, x)
    if x.dtype not in dtypes:
        kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        expected = f"{', '.join(kinds[:-1])} or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
        raise ValueError(f"{name}: expected dtype {expected}, got {x.dtype}")


def check_whole(name: str, x: Tensor) -> None:
    """No DTensor: a sharded weight that is made whole out here would get no gradient from the other processes."""
    if hasattr(x, "full_tensor"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor; call the loss inside the forward of its FSDP module"
        )


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
    check_dtype(name, x)
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
    check_tensor(name, x)
    if x.dim() != len(dims):
        raise ValueError(f"{name}: expected shape [{', '.join(dims)}], got {list(x.shape)}")


def check_mask(mask: Tensor, first: str, like: Tensor, name: str = "mask") -> None:
    """A bool tensor with the shape and device of the tensor named `first`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(
            f"{name}: expected a bool tensor (True = counts), got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    check_tensor(name, mask)
    if mask.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)} as {first}, got {list(mask.shape)}")
    check_device(name, mask, first, like)


def check_per_row(name: str, x: Tensor, first: str, like_BT: Tensor) -> None:
    """A floating point [B] vector beside a [B, T] tensor."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    check_tensor(name, x)
    if x.shape != like_BT.shape[:1]:
        raise ValueError(f"{name}: expected shape [{like_BT.shape[0]}], one per row of {first}, got {list(x.shape)}")
    check_device(name, x, first, like_BT)


def check_scalar(name: str, x: Tensor, like: Tensor) -> None:
    """A 0-dim tensor of real numbers on the CPU, from where every kernel takes it, or on the device of `like`."""
    check_dtype(name, x, NUMBERS)
    expect(x.dim() == 0, name, "a number or a 0-dim tensor", f"shape {list(x.shape)}")
    if x.device.type != "cpu" and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} or cpu, got {x.device}")


# Options


def is_finite(value: float) -> bool:
    """For `check_number`: torch.compile cannot trace math.isfinite."""
    return -math.inf < value < math.inf


def check_number(
    name: str, value: Any, expected: str = "a finite number", holds: Callable[[float], bool] = is_finite
) -> None:
    """A real number that float64 holds and for which `holds` is true: no bool, tensor or text."""
    known = type(value) is float or _is_number(value)  # the first test alone costs half as much
    if not (known and holds(value)):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def check_integer(name: str, value: Any, at_least: int, expected: str) -> None:
    """An integer of at most 63 bits."""
    whole = isinstance(value, (int, torch.SymInt, numbers.Integral))
    if isinstance(value, bool) or not whole or not at_least <= value < 2**63:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """True or False, of Python or numpy."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")


def check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    """One of the names in a list."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(options)}, got {shown(value)}")


def check_positive(name: str, value: float) -> None:
    """A number > 0 and finite."""
    if not (type(value) is float and 0 < value < math.inf):
        check_number(name, value, "a finite number > 0", lambda x: 0 < x < math.inf)


def check_temperature(value: float) -> None:
    """A number > 0 that float32 can multiply by and divide by."""
    check_positive("temperature", value)
    if not 1e-37 <= value <= 1e37:
        raise ValueError(f"temperature: expected a number from 1e-37 to 1e37, got {shown(value)}")


def check_clip(name: str, value: float | None) -> None:
    """A bound > 0, or None for no bound."""
    if value is not None:
        check_number(name, value, "a number > 0 or None", lambda x: x > 0)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if not isinstance(value, _REAL):
        return isinstance(value, numbers.Real)  # numpy's
    return not isinstance(value, int) or -_LARGEST < value < _LARGEST
