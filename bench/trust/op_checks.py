"""One call of a public operation, right or not: values and gradients against the reference in float64."""

from random import Random
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from bench.trust.kind import expect
from bench.trust.op_calls import CALLS, LEAVES, Arguments, Draw
from rlhf_fast.ops.dispatch import backend

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def valid(name: str, rng: Random, device: torch.device | None = None) -> None:
    """Values and gradients, against the reference in float64. device: where the arguments are; default: the CPU."""
    draw = Draw(rng)
    arguments = CALLS[name](draw)
    if device is not None:
        arguments = {key: _on(device, value) for key, value in arguments.items()}
    inplace = name in ("token_logprobs", "token_kl") and rng.random() < 0.3
    try:
        got, gradients = call(name, arguments | ({"inplace_backward": True} if inplace else {}), rng)
    except ValueError as error:
        empty = not draw.B or not draw.T or draw.V == 1
        expect(empty or inplace, f"{name}: valid arguments {shapes(arguments)} are refused: {error}")
        return
    with backend("reference"):
        wanted, truth = call(name, {key: _double(value) for key, value in arguments.items()}, rng)
    for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a is None or b is None or name == "sample_tokens":
            continue
        _compare(f"{name}: result {place} of {shapes(arguments)}", a, b, TOLERANCE[_working(a.dtype)])
    for key in gradients:
        _compare(f"{name}: gradient of {key} of {shapes(arguments)}", gradients[key], truth[key], _loosest(arguments))
    if name == "sample_tokens" and got[0].numel():
        logits = arguments["logits"].double() / arguments["temperature"]
        expected = logits.log_softmax(-1).gather(1, got[0][:, None])[:, 0]
        _compare(f"{name}: logprobs of {shapes(arguments)}", got[1], expected, TOLERANCE[_working(got[1].dtype)])


def call(name: str, arguments: Arguments, rng: Random) -> tuple[list[Tensor], dict[str, Tensor]]:
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


def _on(device: torch.device, value: Any) -> Any:
    """The same numbers in the same layout there."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    storage = value.new_empty(0).set_(value.untyped_storage()).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


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


def shapes(arguments: Arguments) -> str:
    return ", ".join(f"{key}={short(value)}" for key, value in arguments.items())


def short(value: Any) -> str:
    if isinstance(value, Tensor):
        try:
            shape = "x".join(map(str, value.shape))
        except RuntimeError:
            shape = "nested"
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}] {value.layout} {value.device}".replace(
            "torch.strided cpu", ""
        )
    return str(value)[:30]
