"""sample_tokens: draw the next token of each row, with the log-probability and entropy it was drawn at.

Leaves out the decoding loop: that is `rlhf_fast.rollout`'s.
"""

import math

import torch
from torch import Tensor

from rlhf_fast import reference
from rlhf_fast.ops.checks import FLOATS, check_device, check_positive, expect
from rlhf_fast.ops.dispatch import (
    LIBRARY,
    _cpu,
    code,
    contiguous,
    has_kernel,
    kernel,
    pointer,
    statistics_dtype,
    threads,
)
from rlhf_fast.ops.logprobs import rows_contiguous
from rlhf_fast.results import Sample

LIBRARY.define(
    "sample_tokens(Tensor logits, Tensor uniforms, Tensor? greedy_mask, float temperature) "
    "-> (Tensor tokens, Tensor logprobs, Tensor entropy)"
)


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float,
    greedy_mask: Tensor | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> Sample:
    """Sample one token per row from softmax(logits / temperature); its first maximum where `greedy_mask` is True.

        token = first j with sum_{i <= j} p_i > u,  u ~ U[0, 1)

    A token of probability 0 is never drawn. `logprobs` and `entropy` are those of `token_logprobs` at this
    temperature (for greedy rows too), so that a rollout needs no second pass over its logits for the old policy.

    Plain PyTorch: ``torch.multinomial(softmax(logits / temperature, -1), 1)`` and two more passes for the
    statistics; this reads the logits once more than it must and never holds the probabilities.

    Args:
        logits: [N, V], float32, bfloat16, float16 or float64.
        greedy_mask: [N] bool.
        top_k: keep the k largest logits (0: all). Ties with the k-th are kept.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p (nucleus sampling,
            arXiv 1904.09751); applied after top_k. With either, `logprobs` and `entropy` are those of the truncated,
            renormalised distribution, not of the full softmax that `token_logprobs` sees on the original logits.
        generator: of the logits' device; one float64 is drawn per row, whatever top_k, top_p and greedy_mask are.
        uniforms: [N] float64 in [0, 1), u of every row, in place of the generator: a row drawn with its own random
            numbers does not depend on the batch it is in, and a CUDA graph reads new ones at every replay. Not checked:
            below 0 the first possible token is drawn, from 1 on the last.

    Returns:
        Sample(tokens [N] int64, logprobs [N], entropy [N]), the last two float32 (float64 for float64 logits),
        without gradient.

    Raises:
        ValueError: logits not [N, V] or not floating point; temperature <= 0; greedy_mask not bool [N]; top_k < 0;
            top_p outside (0, 1]; uniforms not float64 [N], or beside a generator; a row that holds NaN or no finite
            logit (on CPU).
    """
    expect(logits.dtype in FLOATS, "logits", "dtype float32, bfloat16, float16 or float64", logits.dtype)
    expect(logits.dim() == 2 and logits.shape[1] > 0, "logits", "shape [N, V] with V > 0", list(logits.shape))
    check_positive("temperature", temperature)
    expect(top_k >= 0, "top_k", "an integer >= 0", top_k)
    expect(0 < top_p <= 1, "top_p", "a number in (0, 1]", top_p)
    _check_per_row("greedy_mask", greedy_mask, torch.bool, logits)
    _check_per_row("uniforms", uniforms, torch.float64, logits)
    if uniforms is not None and generator is not None:
        raise ValueError("uniforms: expected no uniforms beside a generator, got both")
    if top_k or top_p < 1:
        logits = _truncated(logits, temperature, top_k, top_p)
    if uniforms is None:
        uniforms = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device).uniform_(generator=generator)
    if not has_kernel("sample_tokens", logits):
        check_rows(logits)
        return reference.sample_tokens(logits, uniforms, temperature=temperature, greedy_mask=greedy_mask)
    return Sample(*torch.ops.rlhf_fast.sample_tokens(logits, uniforms, greedy_mask, temperature))


def _check_per_row(name: str, x: Tensor | None, dtype: torch.dtype, logits: Tensor) -> None:
    if x is None:
        return
    rows, shape = list(logits.shape[:1]), list(x.shape)
    expect(x.dtype == dtype, name, f"dtype {str(dtype).removeprefix('torch.')}", x.dtype)
    expect(shape == rows, name, f"shape {rows} as the rows of logits", shape)
    check_device(name, x, "logits", logits)


def _truncated(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The logits with everything outside the kept set at -inf."""
    if 0 < top_k < logits.shape[1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = torch.where(logits < kth, -math.inf, logits)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(reference.at_least_fp32(ordered) / temperature, -1)
        reached_before = p.cumsum(-1) - p >= top_p
        drop = torch.zeros_like(reached_before).scatter(-1, order, reached_before)
        logits = torch.where(drop, -math.inf, logits)
    return logits


def check_rows(logits: Tensor) -> None:
    if logits.device.type != "cpu":
        return
    bad = ~logits.amax(-1).isfinite()
    if bad.any():
        raise _row_error(int(bad.int().argmax()))


def _row_error(row: int) -> ValueError:
    return ValueError(
        f"logits: expected a finite largest logit in every row, got NaN, +inf or no finite one in row {row}"
    )


@kernel("sample_tokens", "cpu")
def _sample_cpu(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_contiguous(logits)
    n, vocabulary = logits.shape
    greedy, uniforms = contiguous(greedy_mask, uniforms)
    tokens, logprobs, entropy = _sample_fake(logits, uniforms, greedy_mask, temperature)
    bad = _cpu.sample_tokens(
        logits.data_ptr(), code(logits), logits.stride(0), n, vocabulary, 1.0 / temperature, uniforms.data_ptr(),
        pointer(greedy), tokens.data_ptr(), logprobs.data_ptr(), entropy.data_ptr(), threads(logits),
    )  # fmt: skip
    if bad >= 0:
        raise _row_error(bad)
    return tokens, logprobs, entropy


@torch.library.register_fake("rlhf_fast::sample_tokens", lib=LIBRARY)
def _sample_fake(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = logits.shape[0], statistics_dtype(logits)
    return (
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, dtype=dtype),
        logits.new_empty(n, dtype=dtype),
    )
