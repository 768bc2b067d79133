"""Triton kernels beyond one block of theirs, and what only they have: split rows, counting launches, tickets."""

import contextlib

import pytest
import torch

import rlhf_fast.ops as ops
from rlhf_fast.kernels import ppo_loss as policy
from rlhf_fast.kernels import sample_tokens as sampler
from rlhf_fast.kernels import token_logprobs as rows
from tests.support.oracle import error


@pytest.fixture(autouse=True)
def device():
    """A GPU's tensors where there is one, the interpreter's elsewhere."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def both(function, *tensors: torch.Tensor, **options):
    """The function's first results on Triton, on the reference in float64, and the gradients of both by the first."""
    outcomes = []
    for name in ("triton", "reference"):
        inputs = [x.double() if name == "reference" and x.is_floating_point() else x.clone() for x in tensors]
        inputs[0].requires_grad_()
        with ops.backend(name):
            out = function(*inputs, **options)
            first = out if isinstance(out, torch.Tensor) else out[0]
            if first.requires_grad:
                first.sum().backward()
        outcomes.append((first.detach(), inputs[0].grad))
    return outcomes


def check(function, *tensors, tolerance=1e-5, **options):
    (ours, grad), (truth, true_grad) = both(function, *tensors, **options)
    assert error(ours, truth) <= tolerance
    if true_grad is not None:
        assert error(grad, true_grad) <= tolerance


T = 2 * policy.BLOCK + 77


@pytest.fixture
def tokens():
    mask = torch.rand(3, T) < 0.7
    mask[1] = False
    return torch.randn(4, 3, T), mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_over_blocks(tokens, gamma, lam):
    x, mask = tokens
    check(
        lambda r, v, m: ops.gae(r, v, m, gamma=gamma, lam=lam), x[0], x[1], mask, tolerance=1e-4 if lam == 1 else 1e-5
    )


def test_returns_over_blocks(tokens):
    x, mask = tokens
    check(lambda r, m: ops.discounted_returns(r, m, gamma=0.97), x[0], mask)
    check(lambda x, m: ops.whiten(x, m, shift_mean=False), x[0] * 3 + 100, mask, tolerance=2e-5)
    for variant in ("official", "paper", "verl"):
        options = {"kl_coef": 0.1, "gamma": 0.99, "variant": variant}
        check(lambda *a, o=options: ops.remax_returns(*a, **o), x[2, :, 0], x[3, :, 0], x[0], x[1], mask)


@pytest.mark.parametrize("counted_by_all", [True, False])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_losses_over_blocks(tokens, monkeypatch, counted_by_all, reduction):
    """Also where the mask is too long for every program to count, and a launch before counts it."""
    monkeypatch.setattr(policy, "COUNTED_BY_ALL", T * 3 if counted_by_all else 100)
    x, mask = tokens
    ppo = {"reduction": reduction, "ref_logprobs": x[3], "kl_coef": 0.1}
    for _ in range(2):  # the second call finds the ticket where the first left it
        check(lambda *a: ops.ppo_loss(*a, **ppo | {"ref_logprobs": ppo["ref_logprobs"].to(a[0].dtype)}), *x[:3], mask)
        check(lambda *a: ops.reinforce_loss(*a, reduction=reduction), x[0], x[1], mask)
        check(ops.ppo_value_loss, *x[:3], mask)


def test_many_answers_and_large_groups():
    scores, ranks = torch.randn(3, 40), torch.randint(-1, 30, (3, 40))
    check(ops.ranking_loss, scores, ranks)
    check(lambda s: ops.grpo_advantages(s, 300), torch.randn(600))
    check(lambda s: ops.rloo_advantages(s, 300), torch.randn(600))
    check(ops.reward_loss, torch.randn(700), torch.randn(700))


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_rows(monkeypatch, splits, dtype):
    """However many programs share a row, those without a column and rows of nothing but -inf in one split included."""
    monkeypatch.setattr(rows, "splits_for", lambda *_: splits)
    logits, ids = (torch.randn(4, 9001) * 3).to(dtype), torch.tensor([0, 9000, -100, 4500])
    logits[0, :8000] = -torch.inf
    logits[0, 0] = 1
    x = logits.clone().requires_grad_()
    with ops.backend("triton"):
        out = ops.token_logprobs(x, ids, temperature=0.7)
        again = ops.token_logprobs(x, ids, temperature=0.7)
    truth = torch.log_softmax(logits.double() / 0.7, -1)
    entropy = -torch.where(truth.isinf(), 0, truth.exp() * truth).sum(-1)
    kept = ids != -100
    assert error(out.logprobs[kept], truth[kept, ids[kept]]) < 2e-6 and error(out.entropy[kept], entropy[kept]) < 5e-6
    assert torch.equal(out.logprobs, again.logprobs) and torch.equal(out.entropy, again.entropy)


@pytest.mark.parametrize("offset", range(9))
def test_unaligned_rows(offset):
    """Rows that start anywhere on their 16 bytes have the bits of aligned ones."""
    V = rows.ROWS * rows.COLUMNS + 3
    storage = torch.randn(2 * V + 40).bfloat16()
    logits, ids = storage[offset : offset + 2 * V].view(2, V), torch.tensor([1, V - 1])
    with ops.backend("triton"):
        out, aligned = ops.token_logprobs(logits, ids), ops.token_logprobs(logits.clone(), ids)
    assert error(out.logprobs, aligned.logprobs.double()) < 1e-6 and error(out.entropy, aligned.entropy.double()) < 2e-6


@pytest.mark.parametrize("V", [1, 33, 100])
def test_sampling_over_chunks_of_blocks(monkeypatch, V):
    """Rows of more blocks than are looked at together, some of nothing but -inf."""
    monkeypatch.setattr(sampler, "BLOCK", 16)
    monkeypatch.setattr(sampler, "CHUNK", 2)
    logits = torch.randn(12, V)
    logits[1, 16:80], logits[2, :90] = -torch.inf, torch.where(torch.arange(min(V, 90)) == 0, 1.0, -torch.inf)
    p = torch.softmax(logits.double() / 0.7, -1)
    tokens, rows = torch.multinomial(p, 1).squeeze(1), torch.arange(12)
    tokens[::3] = logits[::3].argmax(-1)
    uniforms = p.cumsum(-1)[rows, tokens] - p[rows, tokens] / 2
    with ops.backend("triton"):
        out = ops.sample_tokens(logits, temperature=0.7, uniforms=uniforms, greedy_mask=rows % 3 == 0)
    assert torch.equal(out.tokens, tokens)
    entropy = -torch.where(p > 0, p * p.log(), 0).sum(-1)
    assert error(out.logprobs, p[rows, tokens].log()) < 1e-5 and error(out.entropy, entropy) < 1e-5


def test_splits_fill_the_device():
    assert rows.splits_for(1, 151_936, 132) == 38 and rows.splits_for(4096, 151_936, 132) == 1
    assert rows.splits_for(1, 500, 132) == 1 and rows.splits_for(8, 151_936, 132) == 33


@pytest.mark.parametrize("one, other", [("triton", "reference"), ("triton", None), (None, "triton")])
def test_what_one_back_end_keeps_another_reads(one, other):
    """The backward pass may find another back end chosen than the forward pass did (None: the table's)."""
    gradients = []
    for names in ((one, other), (None, None)):
        x, ref_logits = (
            torch.randn(2, 3, 500, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) * 3 + 700
        )
        x.requires_grad_()
        ids = torch.tensor([3, -100, 499])
        with ops.backend(names[0]) if names[0] else contextlib.nullcontext():
            plain, pair = ops.token_logprobs(x, ids), ops.token_kl(x, ref_logits - 1500, ids, temperature=0.8)
        with ops.backend(names[1]) if names[1] else contextlib.nullcontext():
            (plain.logprobs + plain.entropy + pair.logprobs - pair.entropy + 2 * pair.kl).sum().backward()
        gradients.append(x.grad)
    assert error(*gradients) < 1e-5
