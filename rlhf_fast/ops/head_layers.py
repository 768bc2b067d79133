"""The matmuls of a fused head on one chunk of tokens: its logits, and what their gradient gives.

Logits and sums are float32 (float64 for float64 input) whatever the input. Three kinds of layers differ in what their
matmuls read:

    Layer       the dtype of the logits; a half-precision weight is widened one tile at a time
    MixedLayer  bfloat16, on a GPU; the gradient by the logits is rounded to bfloat16 once, into a second buffer
    UnitLayer   bfloat16, by a CPU's unit for it (AMX, vdpbf16ps); the rounded gradient lies over the logits

Leaves out the chunks and the passes over the logits: they are in `rlhf_fast.ops.heads`.

Shapes: C tokens of a chunk, H hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_fast.ops import dispatch

TILE_BYTES = 16 << 20
"""The size of one tile of a half-precision weight, once widened."""
LINE = 16
"""Floats of a cache line. The rows of a UnitLayer's logits begin at one."""
PACKED_BYTES = 4 << 20
"""Of a factor that a UnitLayer's matmul reads, packed; `kPacked` of csrc/cpu/matmul_bf16.cpp."""


class Layer:
    """A weight and a bias, and the buffer of their logits in `dtype`. `operands` is the dtype that matmuls read."""

    operands: torch.dtype

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.operands = self._operands()
        V, H = weight.shape
        self.tile = V if weight.dtype == self.operands else max(1, min(V, TILE_BYTES // (H * dtype.itemsize)))
        self.tile_bytes = self.tile * H * dtype.itemsize if self.tile < V else 0
        self.row_bytes = V * dtype.itemsize

    def _operands(self) -> torch.dtype:
        return self.dtype

    def allocate(self, rows: int) -> None:
        """Make the buffer [rows, V] of the logits."""
        self.buffer = self.weight.new_empty((rows, self.weight.shape[0]), dtype=self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, V], a view of the buffer."""
        logits = self.buffer[: len(hidden)]
        self._multiply(hidden, logits)
        if self.bias is not None:
            logits += self.bias
        return logits

    def over_logits(self, rows: int) -> Tensor | None:
        """[rows, V] in `operands`, over the logits, for a kernel to write their gradient; None: in their dtype."""
        return None

    def operand(self, grad_logits: Tensor) -> Tensor:
        """The gradient in the dtype that matmuls read."""
        return grad_logits

    def times_weight(self, grad_logits: Tensor) -> Tensor:
        """[C, V] times the weight [V, H]: the gradient by the hidden states, [C, H]."""
        out = grad_logits.new_zeros((len(grad_logits), self.weight.shape[1]))
        for columns, weight in self._tiles():
            out.addmm_(grad_logits[:, columns], weight)
        return out

    def add_product(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        """total [V, H] += grad_logits^T hidden"""
        torch.addmm(total, grad_logits.t(), hidden, out=total)

    def _multiply(self, hidden: Tensor, logits: Tensor) -> None:
        for columns, weight in self._tiles():
            torch.mm(hidden, weight.t(), out=logits[:, columns])

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self.weight.shape[0], self.tile):
            columns = slice(begin, begin + self.tile)
            yield columns, self.weight[columns].to(self.dtype)


class MixedLayer(Layer):
    """Matmuls of a GPU that read bfloat16 and write float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self.row_bytes += len(weight) * self.operands.itemsize

    def _operands(self) -> torch.dtype:
        return self.weight.dtype

    def allocate(self, rows: int) -> None:
        super().allocate(rows)
        self.rounded = torch.empty_like(self.buffer, dtype=self.operands)

    def operand(self, grad_logits: Tensor) -> Tensor:
        return self.rounded[: len(grad_logits)].copy_(grad_logits)

    def times_weight(self, grad_logits: Tensor) -> Tensor:
        return torch.mm(grad_logits, self.weight)

    def add_product(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        torch.addmm(total, grad_logits.t(), hidden, out=total, out_dtype=self.dtype)  # pyright: ignore

    def _multiply(self, hidden: Tensor, logits: Tensor) -> None:
        torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=logits)  # pyright: ignore


class UnitLayer(Layer):
    """Matmuls of our own that read bfloat16 and write float32, by the CPU's unit of this number (`_cpu.bf16_units`).

    Beside the buffer each matmul packs up to PACKED_BYTES, which the budget counts, and 0.6 MiB a thread, which the
    budget leaves out, because the chunks and so the bits must not depend on the threads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, unit: int) -> None:
        super().__init__(weight if 1 in weight.stride() else weight.contiguous(), bias, dtype)
        self.unit, self.stride = unit, -(-len(weight) // LINE) * LINE
        self.row_bytes = self.stride * dtype.itemsize
        self.tile_bytes = PACKED_BYTES

    def _operands(self) -> torch.dtype:
        return self.weight.dtype

    def allocate(self, rows: int) -> None:
        V = len(self.weight)
        self.rows = self.weight.new_empty((rows, self.stride), dtype=self.dtype)
        self.buffer, self.rounded = self.rows[:, :V], self.rows.view(self.operands)[:, :V]

    def over_logits(self, rows: int) -> Tensor:
        return self.rounded[:rows]

    def times_weight(self, grad_logits: Tensor) -> Tensor:
        out = grad_logits.new_empty((len(grad_logits), self.weight.shape[1]), dtype=self.dtype)
        self._product(grad_logits, self.weight, out, False)
        return out

    def add_product(self, total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        self._product(grad_logits.t(), hidden, total, True)

    def _multiply(self, hidden: Tensor, logits: Tensor) -> None:
        self._product(hidden, self.weight.t(), logits, False)

    def _product(self, left: Tensor, right: Tensor, sums: Tensor, add: bool) -> None:
        """sums [M, N] = left [M, K] right [K, N], or added to them."""
        done = dispatch._cpu.matmul_bf16(
            self.unit, *sums.shape, len(right), left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(),
            sums.data_ptr(), sums.stride(0), add, torch.get_num_threads(),
        )  # fmt: skip
        assert done, "the instruction set has changed since the layer was made"


def layer_of(
    weight: Tensor, bias: Tensor | None, hidden: torch.dtype, dtype: torch.dtype, device: str | None = None
) -> Layer:
    """The fastest kind of layer for hidden states of this dtype. device: the type of the weight's, if it is elsewhere.

    float16 is widened everywhere, because it cannot hold a gradient's small entries.
    """
    device = device or weight.device.type
    if hidden == weight.dtype == torch.bfloat16 and dtype == torch.float32:
        if device == "cuda":
            return MixedLayer(weight, bias, dtype)
        if device == "cpu" and (unit := bf16_unit()):
            return UnitLayer(weight, bias, dtype, unit)
    return Layer(weight, bias, dtype)


def bf16_unit() -> int:
    """The CPU's unit for bfloat16 matmuls that the heads use, a number of `_cpu.bf16_units`; 0: none."""
    return dispatch._cpu.bf16_unit() if dispatch.COMPILED and dispatch.override() in (None, "cpu") else 0
