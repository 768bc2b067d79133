"""The inputs on which `bench.exactness` looks at errors: ordinary ones, and those on which implementations go wrong.

Shapes: N tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The inputs of one trial with N tokens."""

    tensors: tuple[Tensor, ...]  # logits [N, V], or hidden [N, H] and weight [V, H]; the gradient is by the first
    ids: Tensor  # [N]
    by_logprobs: Tensor  # [N], the gradient of the combination
    by_entropy: Tensor  # [N]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A named way to make inputs. relative: errors are relative, however small the truth."""

    name: str
    shape: str
    make_inputs: Callable[[], tuple[Inputs, dict[str, Any]]]  # and the options
    relative: bool = False


# What the logits are like


def _trial(name: str, shape: str, make: Callable[[], tuple], relative: bool) -> Trial:
    def make_inputs() -> tuple[Inputs, dict[str, Any]]:
        torch.manual_seed(0)
        tensors, ids, options = make()
        return Inputs(tensors, ids, torch.randn(len(ids)), torch.randn(len(ids))), options

    return Trial(name=name, shape=shape, make_inputs=make_inputs, relative=relative)


def log_sum_others(z: Tensor, ids: Tensor) -> Tensor:
    """log sum exp of a row's logits but the target's, [N] float64."""
    return z.double().scatter(1, ids[:, None], -math.inf).logsumexp(1)


def logits_trials(tokens: int = 16, vocabulary: int = 5120) -> list[Trial]:
    """The trials from logits. tokens, vocabulary: of the trials that have no shape of their own."""

    def trial(
        name: str,
        change: Callable[[Tensor, Tensor], Tensor] = lambda z, ids: z,
        *,
        n: int = tokens,
        v: int = vocabulary,
        dtype: torch.dtype = torch.float32,
        first_id: int = 0,
        relative: bool = False,
        **options: float,
    ) -> Trial:
        def make() -> tuple:
            ids = torch.randint(first_id, v, (n,))
            return (change(3 * torch.randn(n, v), ids).to(dtype),), ids, options

        return _trial(name, f"[{n}, {v}]", make, relative)

    def without(columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, ids: z.index_fill(1, torch.arange(columns), -math.inf)

    def all_but_one(z: Tensor, ids: Tensor) -> Tensor:
        return torch.full_like(z, -math.inf).scatter(1, ids[:, None], z.gather(1, ids[:, None]))

    def ahead(z: Tensor, ids: Tensor) -> Tensor:
        return z.scatter(1, ids[:, None], (log_sum_others(z, ids) + 25).to(z.dtype)[:, None])

    return [
        trial("fp32"),
        trial("bf16", dtype=torch.bfloat16),
        trial("offset +1000", lambda z, ids: z + 1000),
        trial("one -inf", without(1), first_id=1),
        trial("first 4096 -inf", without(4096), first_id=4096),
        trial("first 40000 -inf", without(40000), n=4, v=50257, first_id=40000),
        trial("all but one -inf", all_but_one),
        trial("25 nats ahead", ahead, relative=True),
        trial("softcap 30", lambda z, ids: 6 * z, softcap=30.0),
        trial("temperature 0.1", temperature=0.1),
        trial("V = 4999", v=4999),
        trial("V = 50257", n=4, v=50257),
    ]


def hidden_trials(tokens: int = 16, vocabulary: int = 5120) -> list[Trial]:
    """The same trials from hidden states; a bias shapes the logits.

    The inputs lie on a grid on which logits are exact in float32, even at +1000, because the trials are about what
    follows the matmul.
    """

    def trial(
        name: str,
        bias: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        n: int = tokens,
        v: int = vocabulary,
        scale: float = 2.0,
        dtype: torch.dtype = torch.float32,
        first_id: int = 0,
        one_target: bool = False,
        relative: bool = False,
        **options: float,
    ) -> Trial:
        def make() -> tuple:
            hidden, weight = _on_grid(scale * torch.randn(n, 64), 2**-4), _on_grid(torch.randn(v, 64) / 8, 2**-6)
            ids = torch.randint(first_id, v, (n,))
            ids = ids[:1].expand(n).clone() if one_target else ids
            given = {} if bias is None else {"bias": bias(hidden @ weight.t(), ids)}
            return (hidden.to(dtype), weight.to(dtype)), ids, given | options

        return _trial(name, f"[{n}, 64] x [{v}, 64]", make, relative)

    def without(columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, ids: torch.zeros_like(z[0]).index_fill(0, torch.arange(columns), -math.inf)

    def all_but_one(z: Tensor, ids: Tensor) -> Tensor:
        return torch.full_like(z[0], -math.inf).index_fill(0, ids[:1], 0.0)

    def ahead(z: Tensor, ids: Tensor) -> Tensor:
        behind = (log_sum_others(z, ids) - z.gather(1, ids[:, None])[:, 0]).max().item()
        return torch.zeros_like(z[0]).index_fill(0, ids[:1], math.ceil(behind) + 25.0)

    return [
        trial("fp32"),
        trial("bf16", dtype=torch.bfloat16),
        trial("offset +1000", lambda z, ids: torch.full_like(z[0], 1000.0)),
        trial("one -inf", without(1), first_id=1),
        trial("first 4096 -inf", without(4096), first_id=4096),
        trial("first 40000 -inf", without(40000), n=4, v=50257, first_id=40000),
        trial("all but one -inf", all_but_one, one_target=True),
        trial("25 nats ahead", ahead, scale=0.5, one_target=True, relative=True),
        trial("softcap 30", scale=16.0, softcap=30.0),
        trial("temperature 0.1", temperature=0.1),
        trial("V = 4999", v=4999),
        trial("V = 50257", n=4, v=50257),
    ]


def _on_grid(x: Tensor, step: float) -> Tensor:
    return torch.round(x / step) * step
