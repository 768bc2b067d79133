"""Per-token KL estimates, and rewards: -kl_coef KL on every True place, plus the score on a row's last True place."""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import clamp, kl_term, number

BLOCK = 256


@triton.jit
def _kl_penalty(logprobs, ref, kl, grad, n: tl.int64, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value, slope = kl_term(
        tl.load(logprobs + at, mask=inside, other=0.0) - tl.load(ref + at, mask=inside, other=0.0), ESTIMATOR
    )
    tl.store(kl + at, value, mask=inside)
    if grad is not None:
        tl.store(grad + at, slope, mask=inside)


def kl_penalty(logprobs, ref, estimator, kl, grad):
    n = logprobs.numel()
    if n:
        _kl_penalty[(triton.cdiv(n, BLOCK),)](logprobs, ref, kl, grad, n, ESTIMATOR=estimator, BLOCK=BLOCK)


@triton.jit
def _shape_rewards(
    scores,
    logprobs,
    ref,
    mask,
    rewards,
    T: tl.int64,
    kl_coef: tl.float64,
    clip: tl.float64,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    F: tl.constexpr = logprobs.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    last = tl.full([BLOCK], -1, tl.int64)
    for start in range(0, T, BLOCK):
        t = start + columns
        on = tl.load(mask + row * T + t, mask=t < T, other=0)
        last = tl.where(on, t, last)
    last_true = tl.max(last)
    score = clamp(tl.load(scores + row), -number(clip, F), number(clip, F))
    for start in range(0, T, BLOCK):
        t = start + columns
        inside = t < T
        on = tl.load(mask + row * T + t, mask=inside, other=0)
        d = tl.load(logprobs + row * T + t, mask=on, other=0.0) - tl.load(ref + row * T + t, mask=on, other=0.0)
        value, _ = kl_term(d, ESTIMATOR)
        reward = -number(kl_coef, F) * value + tl.where(t == last_true, score, 0.0)
        tl.store(rewards + row * T + t, tl.where(on, reward, 0.0), mask=inside)


def shape_rewards(scores, logprobs, ref, mask, kl_coef, estimator, clip, rewards):
    B, T = logprobs.shape
    if B:
        _shape_rewards[(B,)](
            scores, logprobs, ref, mask, rewards, T, kl_coef, clip, ESTIMATOR=estimator, BLOCK=BLOCK
        )  # fmt: skip


COMPILED = [
    (_kl_penalty, {}, {"ESTIMATOR": 2, "BLOCK": BLOCK}),
    (_shape_rewards, {"mask": "*i1"}, {"ESTIMATOR": 0, "BLOCK": BLOCK}),
]
