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

import rlhf_fast
from bench.trust import child
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.op_calls import CALLS, LEAVES, Arguments, Draw
from bench.trust.world import World
from rlhf_fast.ops.dispatch import backend

CALLS_EACH = 40  # calls of a case
TRIES = 15  # cases of each way, by operation
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
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
    call = ended.output.rpartition("call ")[2].partition("\n")[0]
    expect(ended.code >= 0, f"{name}: expected no signal, got {-ended.code} in call {call}")
    expect(ended.code != 3, f"call {call}: {ended.last}")
    expect(ended.code == 0, f"expected an error of the operation, got {ended.output[-300:]!r}")


def valid(name: str, rng: Random) -> None:
    """Values and gradients, against the reference in float64."""
    draw = Draw(rng)
    arguments = CALLS[name](draw)
    inplace = name in ("token_logprobs", "token_kl") and rng.random() < 0.3
    try:
        got, gradients = _call(name, arguments | ({"inplace_backward": True} if inplace else {}), rng)
    except ValueError as error:
        empty = not draw.B or not draw.T or draw.V == 1
        expect(empty or inplace, f"{name}: valid arguments {_shapes(arguments)} are refused: {error}")
        return
    with backend("reference"):
        wanted, truth = _call(name, {key: _double(value) for key, value in arguments.items()}, rng)
    for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a is None or b is None or name == "sample_tokens":
            continue
        _compare(f"{name}: result {place} of {_shapes(arguments)}", a, b, TOLERANCE[_working(a.dtype)])
    for key in gradients:
        _compare(f"{name}: gradient of {key} of {_shapes(arguments)}", gradients[key], truth[key], _loosest(arguments))
    if name == "sample_tokens" and got[0].numel():
        logits = arguments["logits"].double() / arguments["temperature"]
        expected = logits.log_softmax(-1).gather(1, got[0][:, None])[:, 0]
        _compare(f"{name}: logprobs of {_shapes(arguments)}", got[1], expected, TOLERANCE[_working(got[1].dtype)])


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
        _call(name, arguments, rng)
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
        _call(name, arguments | {key: wrong}, rng)
    except (ValueError, TypeError) as error:
        said = f"{name}: the error for {key}={_short(wrong)} does not name it: {type(error).__name__}: {error}"
        expect(key in str(error), " ".join(said.split())[:300])
    except Exception as error:
        said = f"{name}: {key}={_short(wrong)}: {type(error).__name__} instead of ValueError: {error}"
        raise Lost(" ".join(said.split())[:300]) from error


def _call(name: str, arguments: Arguments, rng: Random) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results, and the gradients of a weighted sum of what is differentiable in them."""
    leaves = {}
    for key in LEAVES:
        value = arguments.get(key)
        plain = isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
        if plain and not value.is_meta and not value.is_nested:
            leaves[key] = value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    given = arguments | leaves
    if arguments.get("inplace_backward"):
        given = given | {key: x * 1 for key, x in leaves.items()}  # a leaf's memory is not ours to overwrite
    found = getattr(rlhf_fast, name)(**given)
    results = list(found) if isinstance(found, tuple) else [found]
    total = sum(
        ((i + 1) * one.double()).sum() for i, one in enumerate(results) if isinstance(one, Tensor) and one.requires_grad
    )
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return [one.detach() if isinstance(one, Tensor) else one for one in results], gradients


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _working(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in TOLERANCE else torch.float64


def _loosest(arguments: Arguments) -> float:
    """The tolerance of gradients, which are rounded to the dtype of their leaf."""
    return max(TOLERANCE[v.dtype] for v in arguments.values() if isinstance(v, Tensor) and v.dtype in TOLERANCE)


def _compare(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    expect(got.shape == wanted.shape, f"{what}: shape {list(got.shape)}, expected {list(wanted.shape)}")
    if not got.numel() or not wanted.is_floating_point():
        expect(torch.equal(got.long(), wanted.long()) if got.numel() else True, f"{what}: other integers")
        return
    largest = torch.finfo(got.dtype).max
    fits = wanted.abs() < largest  # beyond it the dtype has no number
    error = ((got.double() - wanted)[fits]).abs().max().item() if fits.any() else 0.0
    scale = max(1.0, wanted[fits].abs().max().item() if fits.any() else 1.0)
    expect(error <= tolerance * scale, f"{what}: off by {error:.2g}, expected at most {tolerance * scale:.2g}")


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


def _shapes(arguments: Arguments) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in arguments.items())


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        try:
            shape = "x".join(map(str, value.shape))
        except RuntimeError:
            shape = "nested"
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}] {value.layout} {value.device}".replace(
            "torch.strided cpu", ""
        )
    return str(value)[:30]


KIND = Kind(
    "fuzz of every operation against float64: right, or an error that names the argument",
    tuple(CALLS),
    tuple(CALLS),
    cases,
)
