"""The matmuls of a step: those that the profiler lists, and those inside the attention kernels, by formula.

Attention counts as the matmuls that the plain formula takes: two in a forward pass (scores, weighted values), five in a
backward pass (both again, and three for the gradients), each for every row and head. Where a row's tokens see the
tokens before them alone, (n + 1) / 2n of the square of n tokens counts.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.steps.trace import ATTENTION, HEAD_MATMUL, MATMUL, MATMULS, Event, is_matmul, walk

GROUPS = (MATMUL, ATTENTION, HEAD_MATMUL)
_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Product(NamedTuple):
    """A matmul [batch, m, k] x [batch, k, n]. left, right: whether the operand lies in memory transposed.

    dtype: its name in torch.
    """

    batch: int
    m: int
    k: int
    n: int
    left: bool
    right: bool
    dtype: str


class Attention(NamedTuple):
    """A call of one of our attention kernels. queries, keys: tokens of each row; heads: of queries; key_heads: of keys.

    backward: whether a backward pass follows.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    dtype: str
    backward: bool


Counts = dict[str, dict[Product, float]]  # group -> matmul -> how often it runs


def count(window: Event, calls: Iterable[Attention]) -> Counts:
    """The matmuls of a window. calls: of our attention kernels inside it."""
    found: Counts = {group: {} for group in GROUPS}

    def add(group: str, product: Product, times: float) -> None:
        if min(product[:4]) > 0:
            found[group][product] = found[group].get(product, 0.0) + times

    for event, group in walk(window):
        if is_matmul(event):
            add(group if group in found else MATMUL, _of_operator(event), 1.0)
        elif event.name.startswith(_FLASH):
            for product, times in _of_flash(event):
                add(ATTENTION, product, times)
    for call in calls:
        for product, times in of_attention(call):
            add(ATTENTION, product, times)
    return found


def of_attention(call: Attention) -> Iterator[tuple[Product, float]]:
    """The matmuls of a call and of its backward pass. Rows of one token a row, as in decoding, share a matmul."""
    group, D = call.heads // call.key_heads, call.head_dim
    if max(call.queries) == 1:
        rows, longest = len(call.queries), max(call.keys)
        seen = sum(call.keys) / (rows * longest)
        yield from _pair(rows * call.key_heads, group, longest, D, call.dtype, seen, backward=call.backward)
        return
    for n in call.queries:
        yield from _pair(call.heads, n, n, D, call.dtype, (n + 1) / (2 * n), backward=call.backward)


def _pair(
    batch: int, queries: int, keys: int, D: int, dtype: str, part: float, *, backward: bool
) -> Iterator[tuple[Product, float]]:
    """The matmuls of one attention, of which this part counts. backward: those of its backward pass too."""
    scores = Product(batch, queries, D, keys, False, True, dtype)
    values = Product(batch, queries, keys, D, False, False, dtype)
    by_keys = Product(batch, keys, queries, D, True, False, dtype)
    yield scores, part * (3 if backward else 1)  # the scores, in the backward pass again, and the weights' gradient
    yield values, part * (2 if backward else 1)  # the values, and the queries' gradient
    if backward:
        yield by_keys, part * 2  # the gradients of keys and values


def _of_flash(event: Event) -> Iterator[tuple[Product, float]]:
    """Those of torch's own attention. Its backward operator takes the gradient in front of the same arguments."""
    backward = event.name.endswith("_backward")
    (rows, heads, queries, D), (_, _, keys, _) = event.args["Input Dims"][backward : backward + 2]
    part = (keys + 1) / (2 * keys) if queries == keys else 1.0
    both = dict(_pair(rows * heads, queries, keys, D, _dtype(event, int(backward)), part, backward=backward))
    if backward:  # without the two of the forward pass
        both = {product: times - part * (not product.left) for product, times in both.items()}
    yield from both.items()


def _of_operator(event: Event) -> Product:
    first, second = MATMULS[event.name]
    a, b = event.args["Input Dims"][first], event.args["Input Dims"][second]
    left, right = (_is_transposed(event.args["Input Strides"][i]) for i in (first, second))
    return Product(a[0] if len(a) == 3 else 1, a[-2], a[-1], b[-1], left, right, _dtype(event, first))


def _is_transposed(strides: list[int]) -> bool:
    return strides[-2] == 1 and strides[-1] > 1


def _dtype(event: Event, argument: int) -> str:
    name = event.args["Input type"][argument]
    return {"float": "float32", "c10::BFloat16": "bfloat16", "double": "float64", "c10::Half": "float16"}[name]
