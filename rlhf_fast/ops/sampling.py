"""sample_tokens: draw the next token of each row, with the log-probability and entropy it was drawn at.

Leaves out the decoding loop: that is `rlhf_fast.rollout`'s.
"""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    check_device,
    check_dtype,
    check_integer,
    check_number,
    check_temperature,
    expect,
    shown,
)
from rlhf_fast.ops.dispatch import (
    LIBRARY,
    _cpu,
    call,
    code,
    contiguous,
    define,
    has_kernel,
    kernel,
    pointer,
    statistics_dtype,
    threads,
)
from rlhf_fast.ops.logprobs import token_logprobs
from rlhf_fast.ops.results import Sample
from rlhf_fast.ops.row_blocks import rows_contiguous
from rlhf_fast.ops.truncation import kept_tokens, packed

define(
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
    statistics. On a GPU the logits are read once, and 4096 of each row a second time; on the CPU three times, from the
    cache. The probabilities are never held. Nothing waits for a GPU, and what it runs can be captured into a CUDA
    graph; sums of blocks of columns are the only memory beside the results. Truncation adds a sort, a copy and `kept`.

    Args:
        logits: [N, V], float32, bfloat16, float16 or float64.
        greedy_mask: [N] bool.
        top_k: keep the k largest logits (0: all). Ties with the k-th are kept.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p (nucleus sampling,
            arXiv 1904.09751), and ties with its last; applied after top_k.
        generator: of the logits' device; one float64 is drawn per row, whatever top_k, top_p and greedy_mask are.
        uniforms: [N] float64 in [0, 1), u of every row, in place of the generator: a row drawn with its own random
            numbers does not depend on the batch it is in, and a CUDA graph reads new ones at every replay. Not checked:
            below 0 the first possible token is drawn, from 1 on the last.

    Returns:
        Sample(tokens, logprobs, entropy, full_logprobs, kept), without gradient. tokens: [N] int64. logprobs, entropy:
        [N] float32 (float64 for float64 logits), of the distribution that was drawn from: with top_k or top_p the
        truncated, renormalised one. full_logprobs: [N], of the full softmax; without truncation the same tensor.
        kept: [N, ceil(V / 8)] uint8, the tokens that could be drawn, token j bit j % 8 of byte j // 8; None without
        truncation. To train on the distribution that was drawn from, set the logits of all other tokens to -inf.

    Raises:
        ValueError: logits not [N, V] or not floating point; temperature <= 0; greedy_mask not bool [N]; top_k < 0;
            top_p outside (0, 1]; uniforms not float64 [N], or beside a generator; a row that holds NaN or no finite
            logit (on CPU).
    """
    check_dtype("logits", logits)
    expect(logits.dim() == 2 and logits.shape[1] > 0, "logits", "shape [N, V] with V > 0", list(logits.shape))
    check_temperature(temperature)
    check_integer("top_k", top_k, 0, "an integer >= 0")
    check_number("top_p", top_p, "a number in (0, 1]", lambda x: 0 < x <= 1)
    if generator is not None:
        is_generator = isinstance(generator, torch.Generator)
        expect(is_generator, "generator", "a torch.Generator", shown(generator))
        same = generator.device.type == logits.device.type
        expect(same, "generator", f"device {logits.device} as logits", generator.device)
    if uniforms is not None and generator is not None:
        raise ValueError("uniforms: expected no uniforms beside a generator, got both")
    _check_per_row("greedy_mask", greedy_mask, torch.bool, logits)
    _check_per_row("uniforms", uniforms, torch.float64, logits)
    if uniforms is None:
        uniforms = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device).uniform_(generator=generator)
    if not top_k and top_p == 1:
        tokens, logprobs, entropy = _sample(logits, uniforms, greedy_mask, temperature)
        return Sample(tokens, logprobs, entropy, logprobs, None)
    kept = kept_tokens(logits, temperature, top_k, top_p)
    drawn = _sample(torch.where(kept, logits, -math.inf), uniforms, greedy_mask, temperature)
    full_logprobs = token_logprobs(logits, drawn[0], temperature=temperature).logprobs
    return Sample(*drawn, full_logprobs, packed(kept))


def _sample(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_kernel("sample_tokens", logits):
        check_rows(logits)
        return reference.sample_tokens(logits, uniforms, temperature=temperature, greedy_mask=greedy_mask)
    return call("sample_tokens", logits, uniforms, greedy_mask, temperature)


def _check_per_row(name: str, x: Tensor | None, dtype: torch.dtype, logits: Tensor) -> None:
    if x is None:
        return
    check_dtype(name, x, (dtype,))
    rows, shape = list(logits.shape[:1]), list(x.shape)
    expect(shape == rows, name, f"shape {rows} as the rows of logits", shape)
    check_device(name, x, "logits", logits)


def check_rows(logits: Tensor) -> None:
    """Logits with a possible token in every row."""
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
    tokens, logprobs, entropy = sample_outputs(logits, uniforms, greedy_mask, temperature)
    bad = _cpu.sample_tokens(
        logits.data_ptr(), code(logits), logits.stride(0), n, vocabulary, 1.0 / temperature, uniforms.data_ptr(),
        pointer(greedy), tokens.data_ptr(), logprobs.data_ptr(), entropy.data_ptr(), threads(logits),
    )  # fmt: skip
    if bad >= 0:
        raise _row_error(bad)
    return tokens, logprobs, entropy


@torch.library.register_fake("rlhf_fast::sample_tokens", lib=LIBRARY)
def sample_outputs(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The empty results that a kernel fills."""
    n, dtype = logits.shape[0], statistics_dtype(logits)
    return (
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, dtype=dtype),
        logits.new_empty(n, dtype=dtype),
    )
