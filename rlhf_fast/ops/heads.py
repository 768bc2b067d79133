"""The last linear layer of a language model, one chunk of tokens at a time.

A chunk's logits go into a buffer, a kernel passes over them, and their gradient goes into the sums of the gradients by
hidden states, weight and bias. The next chunk takes the buffer over, so that nothing holds [N, V]; a memory budget
sizes the chunks. Masked tokens reach no matmul.

Logits and sums are float32 (float64 for float64 input) whatever the input, because a sum over tokens in half precision
loses digits.

Leaves out the matmuls, which are in `rlhf_fast.ops.head_layers`, and the losses, which are in `rlhf_fast.ops.linear*`.

Shapes: N tokens, n of them counted, C in a chunk, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.dispatch import contiguous
from rlhf_fast.ops.head_layers import Layer, layer_of
from rlhf_fast.ops.logprobs import gradient_cpu
from rlhf_fast.ops.reference import IGNORED_ID, no_autocast

MEMORY_BUDGET = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Bytes of working memory by device type, beyond inputs and gradients, where the caller names none."""
FEWEST_ROWS = 32
"""The fewest rows of a chunk, however small the budget: fewer take as long, because a matmul reads the whole weight."""


def full_precision(kernel: Callable) -> Callable:
    """Decorator: turns autocast off, which would round the logits to half precision."""

    @functools.wraps(kernel)
    def call(hidden: Tensor, *args: object) -> object:
        with no_autocast(hidden):
            return kernel(hidden, *args)

    return call


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that keeps a gradient until the backward pass multiplies it, by a loss scaler's factor for example.

    For float16 that is float32: a mean over 20,000 tokens makes entries that float16 would round to 0.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class Gradients(NamedTuple):
    """Gradients by hidden [..., H], weight [V, H] and bias [V], in their dtypes (or `kept_dtype`).

    A gradient that nobody asked for is an empty tensor.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Chunk(NamedTuple):
    """C counted tokens, with their logits and what `token_logprobs` returns for these."""

    rows: Tensor  # [C] of the flattened tokens
    hidden: Tensor  # [C, H], the dtype of the matmuls
    ids: Tensor  # [C]
    logits: Tensor  # [C, V], a view of the buffer
    logprobs: Tensor  # [C]
    entropy: Tensor  # [C]
    stats: Tensor  # [C, 2]


def chunk_rows(n: int, layers: list[Layer], budget: int) -> int:
    """Rows per chunk: n tokens make chunks of one size, and the layers' logits of a chunk fit the budget in bytes."""
    budget -= sum(layer.tile_bytes for layer in layers)
    most = max(FEWEST_ROWS, budget // sum(layer.row_bytes for layer in layers))
    return -(-n // -(-n // most)) if n else 1


def working_bytes(
    tokens: int, n: int, hidden: torch.dtype, layer: Layer, budget: int, wanted: tuple[bool, bool]
) -> int:
    """Bytes that a loss from hidden states adds to memory at its peak, its results and gradients included.

    tokens: all of them; n: those that count. hidden: their dtype. wanted: gradients by hidden and by weight.
    """
    V, H = layer.weight.shape
    C, wide = chunk_rows(n, [layer], budget), layer.dtype.itemsize
    widened = layer.tile * H * wide * (layer.weight.dtype != layer.operands)
    states = tokens * H * (hidden.itemsize + kept_dtype(hidden).itemsize * wanted[0])  # a contiguous copy, the gradient
    sums = V * H * wide * wanted[1]
    chunk = C * H * (layer.operands.itemsize + wide * any(wanted))
    rounded = V * H * layer.weight.dtype.itemsize * wanted[1] * (kept_dtype(layer.weight.dtype) != layer.dtype)
    per_token = 40 * tokens  # row numbers, log-probs, entropies, weights
    return C * layer.row_bytes + states + sums + max(widened + chunk, rounded) + per_token


class Head:
    """The layer on the tokens whose id is not -100, with the sums of its gradients.

    beside: another layer, of the same compute dtype, whose logits of the same tokens share the budget.
    scaled_later: the backward pass will multiply the gradients, so that they stay in `kept_dtype` until then.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        softcap: float,
        budget: int,
        wanted: tuple[bool, ...] = (False, False, False),
        beside: Layer | None = None,
        scaled_later: bool = False,
    ) -> None:
        self.shape, self.dtypes = hidden.shape, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        kept = tuple(None if x is None else kept_dtype(x) for x in self.dtypes)
        self.grad_dtypes = kept if scaled_later else self.dtypes
        self.hidden, self.ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1)
        self.temperature, self.softcap = temperature, softcap
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32
        if beside is not None:
            self.dtype = beside.dtype
        self.rows = (self.ids != IGNORED_ID).nonzero().squeeze(1)
        self.layer = layer_of(weight, bias, hidden.dtype, self.dtype)
        layers = [self.layer] if beside is None else [self.layer, beside]
        n = len(self.rows)
        self.chunk_rows = chunk_rows(n, layers, budget)
        for layer in layers:
            layer.allocate(min(self.chunk_rows, n))
        shape = self.hidden.shape
        self.grad_hidden = self.hidden.new_zeros(shape, dtype=self.grad_dtypes[0]) if wanted[0] else None
        self.grad_weight = weight.new_zeros(weight.shape, dtype=self.dtype) if wanted[1] else None
        self.grad_bias = bias.new_zeros(len(bias), dtype=self.dtype) if wanted[2] and bias is not None else None
        self.makes_gradients = any(x is not None for x in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk of the counted tokens with its logits and log-probs. The next chunk overwrites the logits."""
        for part in self.rows.split(self.chunk_rows):
            yield self.forward(part)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, ids and logits of a chunk."""
        hidden = self.hidden.index_select(0, rows).to(self.layer.operands)
        return hidden, self.ids.index_select(0, rows), self.layer.logits(hidden)

    def forward(self, rows: Tensor) -> Chunk:
        """The chunk of these rows [C], places in the flattened batch. It overwrites the logits of the last chunk."""
        hidden, ids, logits = self.gather(rows)
        out = torch.ops.rlhf_fast.token_logprobs(logits, ids, self.temperature, self.softcap, False)
        return Chunk(rows, hidden, ids, logits, *out)

    def backward(self, chunk: Chunk, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> None:
        """Add the gradients of sum(grad_logprobs * logprobs + grad_entropy * entropy); overwrites the logits."""
        self.add_gradients(chunk.rows, chunk.hidden, self._grad_logits(chunk, grad_logprobs, grad_entropy))

    def add_gradients(self, rows: Tensor, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add what the gradient by a chunk's logits gives. A row comes once: its gradient by hidden is overwritten."""
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.dtype)
        operand = self.layer.operand(grad_logits)
        if self.grad_hidden is not None:
            self.grad_hidden.index_copy_(0, rows, self.layer.times_weight(operand).to(self.grad_hidden.dtype))
        if self.grad_weight is not None:
            self.layer.add_product(self.grad_weight, operand, hidden)

    def slope(self, chunk: Chunk) -> Tensor:
        """d logprobs / d hidden, [C, H] in the dtype of hidden; overwrites the logits."""
        grad_logits = self._grad_logits(chunk, torch.ones_like(chunk.logprobs), None)
        return self.layer.times_weight(self.layer.operand(grad_logits)).to(self.dtypes[0])

    def gradients(self) -> Gradients:
        """The sums over all chunks so far, in the dtypes of the inputs or in `kept_dtype`."""
        sums = self.grad_hidden, self.grad_weight, self.grad_bias
        hidden, weight, bias = (
            self.hidden.new_empty(0) if x is None else x.to(dtype)
            for x, dtype in zip(sums, self.grad_dtypes, strict=True)
        )
        return Gradients(hidden if self.grad_hidden is None else hidden.view(self.shape), weight, bias)

    def _grad_logits(self, chunk: Chunk, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
        rounded = self.layer.over_logits(len(chunk.rows))
        if rounded is not None:
            per_row = contiguous(chunk.ids, chunk.logprobs, chunk.entropy, chunk.stats, grad_logprobs, grad_entropy)
            gradient_cpu(rounded, chunk.logits, self.temperature, self.softcap, *per_row)
            return rounded
        torch.ops.rlhf_fast.token_logprobs_backward_(
            chunk.logits, chunk.ids, chunk.logprobs, chunk.entropy, chunk.stats, grad_logprobs, grad_entropy,
            self.temperature, self.softcap,
        )  # fmt: skip
        return chunk.logits


def pack_rows(tokens: Tensor, number: int, T: int, most: int) -> list[Tensor]:
    """Counted tokens [n] of [B, T], ascending, in packs of whole items: as many as `most` tokens allow, at least one.

    Rows i, number + i, ... are one item: a row of its own where number = B, a pair where number = B / 2.
    """
    if not len(tokens):
        return []
    item = tokens // T % number
    tokens = tokens[torch.argsort(item, stable=True)]
    packs = [0]
    for count in torch.bincount(item, minlength=number).tolist():
        if packs[-1] and packs[-1] + count > most:
            packs.append(0)
        packs[-1] += count
    return list(tokens.split(packs))


def loss_in_forward(
    head: Head,
    packs: list[Tensor] | None,
    coefficients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor]:
    """Add a loss's gradients to `head`, each pack's while its logits are there; returns (logprobs, entropy) [N].

    coefficients(rows, logprobs, entropy), all [n], gives (d loss / d logprobs, d loss / d entropy or None) of one pack.
    packs: the rows of each; None: every chunk is one. A pack larger than a chunk has its logits computed twice.
    """
    logprobs, entropy = (head.hidden.new_zeros(len(head.ids), dtype=head.dtype) for _ in range(2))
    if not head.makes_gradients:  # an evaluation
        for chunk in head.chunks():
            logprobs[chunk.rows], entropy[chunk.rows] = chunk.logprobs, chunk.entropy
        return logprobs, entropy
    for rows in head.rows.split(head.chunk_rows) if packs is None else packs:
        parts = rows.split(head.chunk_rows)
        for part in parts:
            chunk = head.forward(part)
            logprobs[part], entropy[part] = chunk.logprobs, chunk.entropy
        by_logprobs, by_entropy = coefficients(rows, logprobs[rows], entropy[rows])
        start = 0
        for part in parts:
            if len(parts) > 1:
                chunk = head.forward(part)
            here = slice(start, start + len(part))
            head.backward(chunk, by_logprobs[here], None if by_entropy is None else by_entropy[here])
            start += len(part)
    return logprobs, entropy
