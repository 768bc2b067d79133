"""Fuzz of every public operation in processes of its own: right to 1e-5 of float64, or an error that names an argument.

`valid` compares values and gradients with the reference in float64 on the same numbers. `special` puts NaN, infinities
and huge numbers into the arguments, and `corrupted` puts something wrong in the place of one argument. Neither may end
the process, and an error is a ValueError or TypeError; where one argument is corrupted it names this argument.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from bench.trust import child
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.op_calls import CALLS, Draw
from bench.trust.op_checks import call, short, valid
from bench.trust.world import World

CALLS_EACH = 40  # calls of a case
TRIES = 15  # cases of each way, by operation
_HUGE = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-42, 65504.0, 3e4)


def cases(world: World, target: str) -> Iterator[Case]:
    """TRIES of each way."""
    for way, number in itertools.product((valid, special, corrupted), range(TRIES)):
        yield Case(
            f"{target}/{way.__name__} {number}", lambda directory, rng, way=way: fuzz(target, way, directory, rng)
        )


def fuzz(name: str, way: Any, directory: Path, rng: Random) -> None:
    """CALLS_EACH calls in a process of their own, which says what it is about to do."""
    seed = rng.getrandbits(40)

    def action() -> int:
        torch.set_num_threads(1)
        for number in range(CALLS_EACH):
            print(f"call {number}", flush=True)
            try:
                way(name, Random(f"{seed}/{number}"))
            except Lost as lost:
                print(lost, flush=True)
                return 3
        return 0

    ended = child.run(action, directory / "log", 60)
    last = ended.output.rpartition("call ")[2].partition("\n")[0]
    expect(ended.code >= 0, f"{name}: expected no signal, got {-ended.code} in call {last}")
    expect(ended.code != 3, f"call {last}: {ended.last}")
    expect(ended.code == 0, f"expected an error of the operation, got {ended.output[-300:]!r}")


def special(name: str, rng: Random) -> None:
    """Some numbers of some arguments are NaN, infinite or huge."""
    arguments = CALLS[name](Draw(rng))
    floats = [key for key, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
    for key in rng.sample(floats, rng.randint(1, len(floats))):
        changed = arguments[key].clone()
        if changed.numel():
            flat = changed.view(-1) if changed.is_contiguous() else changed.reshape(-1)
            flat[[rng.randrange(flat.numel()) for _ in range(rng.randint(1, 4))]] = rng.choice(_HUGE)
            arguments[key] = flat.reshape(changed.shape)
    try:
        call(name, arguments, rng)
    except (ValueError, TypeError):
        return
    except Exception as error:
        raise Lost(f"{name}: {type(error).__name__} instead of ValueError: {error}") from error


def corrupted(name: str, rng: Random) -> None:
    """Something wrong in the place of one argument."""
    arguments = CALLS[name](Draw(rng))
    key = rng.choice(sorted(arguments))
    wrong = _wrong(arguments[key], rng)
    try:
        call(name, arguments | {key: wrong}, rng)
    except (ValueError, TypeError) as error:
        said = f"{name}: the error for {key}={short(wrong)} does not name it: {type(error).__name__}: {error}"
        expect(key in str(error), " ".join(said.split())[:300])
    except Exception as error:
        said = f"{name}: {key}={short(wrong)}: {type(error).__name__} instead of ValueError: {error}"
        raise Lost(" ".join(said.split())[:300]) from error


def _wrong(value: Any, rng: Random) -> Any:
    """Something else than the argument was."""
    others = [
        None,
        1.5,
        -1,
        "text",
        [1.0, 2.0],
        {"a": 1},
        math.nan,
        math.inf,
        10**400,
        1j,
        object(),
        torch.tensor([1.0, 2.0]),
    ]
    if isinstance(value, Tensor):
        x = value
        changes = [
            lambda: x.unsqueeze(0),
            lambda: x.flatten()[:-1] if x.numel() else x.new_zeros(3),
            lambda: x.to(torch.complex64),
            lambda: x.to(torch.int16),
            lambda: x.bool(),
            lambda: x.to(torch.float8_e4m3fn) if x.is_floating_point() else x.float(),
            lambda: x.to("meta"),
            lambda: x.to_sparse(),
            lambda: torch.nested.nested_tensor([x, x]),
            lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
            lambda: x.tolist(),
            lambda: x.numpy() if x.dtype != torch.bfloat16 else x.tolist(),
            lambda: x[..., :0],
            lambda: x.new_zeros(()) if x.dim() else x.new_zeros(2),
        ]
        if rng.random() < 0.8:
            try:
                return rng.choice(changes)()
            except (RuntimeError, IndexError):  # torch has no such tensor of this shape or dtype
                return None
    return rng.choice(others)


KIND = Kind(
    "fuzz of every operation against float64: right, or an error that names the argument",
    tuple(CALLS),
    tuple(CALLS),
    cases,
)
