"""The CUDA kernels, emulated on the CPU: shapes on both sides of every limit that chooses a launch, against the CPU's.

What no emulator shows is left to a GPU: memory that is not coherent, races, speed.
"""

import pytest
import torch

from rlhf_fast import ops
from tests.support.oracle import GRADIENT_TOLERANCE, poisoned, ragged_mask


@pytest.fixture
def agree(emulated_cuda):
    """Runs a call on the CPU's kernels and twice on the CUDA ones (the emulator turns the blocks' order around)."""

    def check(function, *args, tolerance=2e-6, **options):
        def call():
            result = function(*args, **options)
            return result if isinstance(result, tuple) else (result,)

        expected = call()
        with emulated_cuda() as scratch:
            results = [call() for _ in range(2)]
        for result in results:
            for got, again, truth in zip(result, results[0], expected, strict=True):
                assert torch.equal(got, again) or got.isnan().any()
                torch.testing.assert_close(got.double(), truth.double(), rtol=tolerance, atol=tolerance)
        assert not scratch[: 4 * 4096].any(), "a counter was not reset"

    return check


def token_outputs(logits, ids, in_place=False, **options):
    def call():
        x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        z = x * 1 if in_place else x
        out = ops.token_logprobs(z, ids, inplace_backward=in_place, **options)
        weights = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
        ((out.logprobs * weights).sum() + (out.entropy * weights.flip(0)).sum()).backward()
        return out.logprobs.detach(), out.entropy.detach(), x.grad

    return call


# One row is split over many blocks, 40 over a few, 600 not at all; widths around a line, a warp's and a block's lines.
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(1, 1), (3, 7), (2, 8191), (1, 8193), (2, 40001), (40, 4099), (5, 16384), (600, 33)],
)
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_token_logprobs(agree, rows, vocabulary, dtype):
    logits = (torch.randn(rows, vocabulary) * 3).to(dtype)
    ids = torch.randint(vocabulary, (rows,))
    ids[rows // 2] = -100 if rows > 2 else ids[rows // 2]
    tolerance = max(2e-6, 2 * GRADIENT_TOLERANCE[dtype] if dtype.itemsize == 2 else 0)
    agree(token_outputs(logits, ids), tolerance=tolerance)
    agree(token_outputs(logits, ids, temperature=0.7, softcap=20.0), tolerance=tolerance)
    agree(token_outputs(logits, ids, in_place=True), tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradients_aligned_differently(agree, dtype):
    logits = torch.randn(3, 5, 1001).to(dtype)[:, :-1]
    agree(token_outputs(logits, torch.randint(1001, (3, 4))), tolerance=2 * GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("special", [-float("inf"), float("inf"), float("nan"), 1e30, -1e30])
def test_token_logprobs_of_special_values(emulated_cuda, special):
    logits = torch.randn(6, 20011)
    logits[0, :] = special
    logits[1, 5], logits[2, 20010], logits[3, ::2], logits[4, 9000:], logits[5, :12000] = (special,) * 5
    ids = torch.tensor([3, 5, 7, 8, 9001, 12001])
    expected = token_outputs(logits, ids)()
    with emulated_cuda():
        got = token_outputs(logits, ids)()
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert torch.equal(got[2].isfinite(), expected[2].isfinite())


@pytest.mark.parametrize("bad", [-1, 9, -99, 2**40])
def test_ids_out_of_range_give_nan_and_read_nothing(emulated_cuda, bad):
    with emulated_cuda():
        logprobs, entropy, gradient = token_outputs(torch.randn(3, 9), torch.tensor([1, bad, -100]))()
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


def kl_outputs(logits, ref_logits, ids, in_place=False, **options):
    def call():
        x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = ops.token_kl(x * 1 if in_place else x, ref_logits, ids, inplace_backward=in_place, **options)
        weights = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
        ((out.logprobs + out.kl) * weights + out.entropy * weights.flip(0)).sum().backward()
        return *(y.detach() for y in out), x.grad

    return call


# A thread's columns, a block's, and more; both rows on a 16-byte boundary, and one of them or neither.
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 7), (2, 4096), (2, 4104), (3, 20003)])
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_token_kl(agree, rows, vocabulary, dtype):
    logits, ids = (torch.randn(rows, vocabulary) * 3).to(dtype), torch.randint(vocabulary, (rows,))
    ids[rows // 2] = -100 if rows > 2 else ids[rows // 2]
    tolerance = max(4e-6, 2 * GRADIENT_TOLERANCE[dtype] if dtype.itemsize == 2 else 0)
    wide = torch.randn(rows, vocabulary + 1).to(dtype)
    for ref_logits in ((logits + torch.randn(rows, vocabulary) / 4).to(dtype), wide[:, 1:]):
        agree(kl_outputs(logits, ref_logits, ids), tolerance=tolerance)
        agree(kl_outputs(logits, ref_logits, ids, temperature=0.7, softcap=20.0), tolerance=tolerance)
        agree(kl_outputs(logits, ref_logits, ids, in_place=True), tolerance=tolerance)


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_kl_of_ids_out_of_range_is_nan(emulated_cuda, bad):
    with emulated_cuda():
        results = kl_outputs(torch.randn(3, 9), torch.randn(3, 9), torch.tensor([1, bad, -100]))()
    assert all(x.isnan().view(3, -1).all(1).tolist() == [False, True, False] for x in results)


# A tile, its neighbours, several, and more of them than a block has threads.
@pytest.mark.parametrize("vocabulary", [1, 7, 4096, 4097, 40_001, 257 * 4096 + 3])
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_sample_tokens(agree, vocabulary, dtype):
    rows = 5 if vocabulary < 50_000 else 2
    logits = (torch.randn(rows, vocabulary + 3) * 3).to(dtype)[:, 3:]
    p, each = torch.softmax(logits.double() / 0.7, -1), torch.arange(rows)
    tokens = torch.multinomial(p, 1).squeeze(1)
    middle = p.cumsum(-1)[each, tokens] - p[each, tokens] / 2  # of the token's step, away from rounding
    for greedy in (each % 2 == 0, None):
        options = dict(temperature=0.7, uniforms=middle, greedy_mask=greedy)
        agree(lambda options=options: ops.sample_tokens(logits, **options)[:3])


@pytest.mark.parametrize("junk", [-float("inf"), float("inf"), float("nan")])
def test_a_row_without_a_distribution_gets_a_token_and_no_logprob(emulated_cuda, junk):
    logits, greedy = torch.randn(4, 5000), torch.tensor([False, True, False, True])
    logits[:2], logits[2:, 4500:] = junk, junk
    with emulated_cuda():
        out = ops.sample_tokens(logits, temperature=1.0, greedy_mask=greedy)
    assert torch.all((out.tokens >= 0) & (out.tokens < 5000))
    lost = ~out.logprobs.isfinite()
    assert lost.tolist() == ([True, True, False, False] if junk == -float("inf") else [True] * 4)


# Fewer steps than a thread's, a warp's, a block's, and several blocks' worth.
@pytest.mark.parametrize("length", [1, 3, 127, 128, 129, 513, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrences(agree, length, dtype):
    B = 3
    x, y, ref = (torch.randn(B, length, dtype=dtype) for _ in range(3))
    scores, greedy = torch.randn(B, dtype=dtype), torch.randn(B, dtype=dtype)
    for mask in (torch.rand(B, length) < 0.7, ragged_mask(B, length), torch.ones(B, length, dtype=torch.bool)):
        x_, y_, ref_ = (poisoned(t, mask) for t in (x, y, ref))
        for gamma, lam in ((1.0, 0.95), (0.9, 1.0), (0.0, 0.5), (0.99, 0.0), (1.0, 1.0)):
            agree(ops.gae, x_, y_, mask, gamma=gamma, lam=lam)
            agree(ops.discounted_returns, x_, mask, gamma=gamma)
            for variant in ("official", "paper", "verl"):
                options = dict(kl_coef=0.1, gamma=gamma, clip=1.0, variant=variant)
                agree(ops.remax_returns, scores, greedy, x_, ref_, mask, **options)
        agree(ops.shape_rewards, scores, x_, ref_, mask, kl_coef=0.1, estimator="k3", clip=1.0)


def gradients(loss, logp, *args, entropy=None, **options):
    leaves = {"logp": logp.clone().requires_grad_()}
    if entropy is not None:
        leaves["entropy"] = options["entropy"] = entropy.clone().requires_grad_()
    out = loss(leaves["logp"], *args, **options)
    out = out if isinstance(out, tuple) else (out,)
    out[0].backward()
    return *(x.detach() for x in out), *(x.grad for x in leaves.values())


def mask_of(shape):
    return ragged_mask(*shape) if shape[0] else torch.ones(shape, dtype=torch.bool)


# One tile, several, and more than every block counts for itself.
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (3, 40), (2, 3001), (70, 2001)])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_losses_over_a_mask(agree, shape, reduction):
    mask, A_B = mask_of(shape), torch.randn(shape[0])
    logp, old, ref, entropy, A = (poisoned(torch.randn(shape), mask) for _ in range(5))
    settings = dict(clip=(0.1, 0.3), dual_clip=2.0, kl_coef=0.1, entropy_coef=0.01, reduction=reduction)
    by_count = [] if reduction == "constant" else [None]
    for normalizer in by_count + [7.0, torch.tensor(0.0)][: 1 if mask.numel() > 10_000 else 2]:
        options = dict(reduction=reduction, normalizer=normalizer)
        full = settings | options | dict(ref_logprobs=ref, entropy=entropy, tolerance=1e-5)
        agree(gradients, ops.ppo_loss, logp, old, A, mask, **full)
        agree(gradients, ops.ppo_loss, logp, old, A_B, mask, tolerance=1e-5, **options)
        agree(gradients, ops.reinforce_loss, logp, A_B, mask, tolerance=1e-5, **options)
        agree(gradients, ops.ppo_value_loss, logp, old, A, mask, tolerance=1e-5, normalizer=normalizer)


def test_more_tiles_than_blocks(agree):
    mask = mask_of((4200, 3))
    logp, A_B = poisoned(torch.randn(4200, 3), mask), torch.randn(4200)
    agree(gradients, ops.reinforce_loss, logp, A_B, mask, tolerance=1e-5, reduction="sequence_mean")


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 5000, 4096 * 1024 + 5])
def test_whiten(agree, n):
    mask = torch.rand(n) < 0.5
    x = poisoned(torch.randn(n, dtype=torch.float64) + 1e6, mask)
    for shift_mean in (True, False)[: 1 if n > 5000 else 2]:
        agree(ops.whiten, x, mask, shift_mean=shift_mean)


@pytest.mark.parametrize(("groups", "size"), [(0, 2), (1, 2), (9, 31), (3, 100)])
def test_groups(agree, groups, size):
    scores = torch.randn(groups * size)
    agree(ops.rloo_advantages, scores, size)
    agree(ops.grpo_advantages, scores, size)


@pytest.mark.parametrize(("rows", "answers"), [(0, 3), (4, 0), (1, 2), (40, 9), (2000, 9)])
def test_rankings_and_pairs(agree, rows, answers):
    ranks = torch.randint(-1, 4, (rows, answers))

    def ranking():
        scores = torch.linspace(-2, 2, rows * answers).sin().view(rows, answers).requires_grad_()
        out = ops.ranking_loss(scores, ranks)
        out.loss.backward()
        return out.loss.detach(), out.accuracy, scores.grad

    def pairs():
        chosen, rejected = (torch.linspace(-2, k, rows).requires_grad_() for k in (1, 2))
        out = ops.reward_loss(chosen, rejected, margin=torch.linspace(0, 1, rows), center_coef=0.1)
        out.loss.backward()
        return *(x.detach() for x in out), chosen.grad, rejected.grad

    agree(ranking)
    agree(pairs)
