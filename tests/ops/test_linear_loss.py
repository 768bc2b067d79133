"""A loss of one's own from hidden states: against its formula on logits in float64, and against the built-in losses."""

import re
import sys

import pytest
import torch
from torch.nn.functional import logsigmoid

import rlhf_fast
from rlhf_fast.ops import heads, linear_loss

B, T, H, V = 4, 37, 24, 1009
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}
SMALLEST = 1
"""A memory budget that makes chunks of 32 tokens, fewer than a row has."""


def batch():
    torch.manual_seed(2)
    ids, mask = torch.randint(V, (B, T)), torch.rand(B, T) > 0.3
    mask[1] = False  # a row with nothing in it
    old, advantages = torch.randn(B, T).double() / 4 - 7, torch.randn(B).double()
    return ids.masked_fill(~mask, -100), mask, old, advantages


IDS, MASK, OLD, A = batch()


def gspo(logprobs, entropy, rows):
    """arXiv 2507.18071, eq. 5 and 7."""
    counts = MASK[rows]
    log_ratio = ((logprobs - OLD[rows]) * counts).sum(1) / counts.sum(1)
    ratio, advantages = log_ratio.exp(), A[rows]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def cispo(logprobs, entropy, tokens):
    """arXiv 2506.13585, eq. 4 and 5: the clipped ratio is a constant."""
    ratio = (logprobs - OLD.flatten()[tokens]).exp().clamp(max=1.28).detach()
    return -ratio * A.repeat_interleave(T)[tokens] * logprobs - 0.01 * entropy


def simpo(logprobs, entropy, pairs):
    """arXiv 2405.14734, eq. 6: no reference, means over the answers' tokens, a margin."""
    counts = torch.stack(MASK.chunk(2))[:, pairs].sum(2).clamp(min=1)
    chosen, rejected = 2.0 * logprobs.sum(2) / counts
    return -logsigmoid(chosen - rejected - 0.5)


LOSSES = {"token": cispo, "row": gspo, "pair": simpo}
WHOLE = {"token": MASK.sum().item(), "row": B, "pair": B // 2}


def truth(pack, hidden, weight, bias, temperature=1.0, softcap=None):
    """The formula on all logits at once, in float64, items without a token left out."""
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    full = torch.log_softmax(logits / temperature, -1)
    logprobs = full.gather(-1, IDS.clamp(min=0)[..., None])[..., 0]
    logprobs, entropy = (torch.where(MASK, x, 0.0) for x in (logprobs, -(full.exp() * full).sum(-1)))
    if pack == "token":
        losses = cispo(logprobs[MASK], entropy[MASK], MASK.flatten().nonzero().squeeze(1))
    elif pack == "row":
        rows = torch.tensor([0, 2, 3])
        losses = gspo(logprobs[rows], entropy[rows], rows)
    else:
        losses = simpo(*(torch.stack(x.chunk(2)) for x in (logprobs, entropy)), torch.arange(B // 2))
    return losses.sum() / WHOLE[pack], logprobs, entropy


def inputs(dtype=torch.float64, bias=True):
    torch.manual_seed(1)
    hidden, weight = torch.randn(B, T, H) * 2, torch.randn(V, H) / 2
    tensors = [hidden, weight, torch.randn(V)] if bias else [hidden, weight]
    return [x.to(dtype).requires_grad_() for x in tensors]


def error(mine, exact):
    return (mine.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("pack", LOSSES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("memory_budget", [SMALLEST, 100 * V * 8, None])  # chunks of 32 and 100 tokens, one chunk
def test_agrees_with_float64(pack, dtype, memory_budget):
    tensors = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out = linear_loss(
        tensors[0], tensors[1], IDS, LOSSES[pack], pack=pack, bias=tensors[2], memory_budget=memory_budget
    )
    expected = truth(pack, *exact)
    for mine, value in zip(out, expected, strict=True):
        assert error(mine, value) <= 10 * TOLERANCE[dtype]
    got, gradients = torch.autograd.grad(out.loss, tensors), torch.autograd.grad(expected[0], exact)
    for mine, gradient in zip(got, gradients, strict=True):
        assert error(mine, gradient) <= TOLERANCE[dtype]
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not (out.logprobs.requires_grad or out.entropy.requires_grad)


@pytest.mark.parametrize("pack", LOSSES)
def test_the_reference_agrees_too(pack):
    tensors = inputs()
    with rlhf_fast.ops.backend("reference"):
        out = linear_loss(tensors[0], tensors[1], IDS, LOSSES[pack], pack=pack, bias=tensors[2])
        got = torch.autograd.grad(out.loss, tensors)
    expected = truth(pack, *tensors)
    for mine, exact in zip((*out, *got), (*expected, *torch.autograd.grad(expected[0], tensors)), strict=True):
        torch.testing.assert_close(mine, exact.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("pack", LOSSES)
def test_int32_ids_are_int64_ids(pack):
    tensors = inputs(torch.float32)
    ours, wanted = (linear_loss(tensors[0], tensors[1], ids, LOSSES[pack], pack=pack) for ids in (IDS.int(), IDS))
    assert ours.loss == wanted.loss and torch.equal(ours.logprobs, wanted.logprobs)


@pytest.mark.parametrize("pack", LOSSES)
def test_temperature_softcap_and_a_given_normalizer(pack):
    tensors, options = inputs(bias=False), dict(temperature=0.6, softcap=4.0)
    loss = linear_loss(*tensors, IDS, LOSSES[pack], pack=pack, normalizer=torch.tensor(777.0), **options).loss
    expected = truth(pack, *tensors, None, **options)[0] * WHOLE[pack] / 777
    torch.testing.assert_close(loss, expected)
    for mine, exact in zip(*(torch.autograd.grad(3 * x, tensors) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-13)


def test_equals_linear_ppo_loss():
    hidden, weight = inputs(torch.float32, bias=False)
    advantages = torch.randn(B, T)
    built_in = rlhf_fast.linear_ppo_loss(hidden, weight, IDS.clamp(min=0), OLD, advantages, MASK, entropy_coef=0.01)

    def ppo(logprobs, entropy, tokens):
        ratio, each = (logprobs - OLD.flatten()[tokens]).exp(), advantages.flatten()[tokens]
        return torch.maximum(-each * ratio, -each * ratio.clamp(0.8, 1.2)) - 0.01 * entropy

    own = linear_loss(hidden, weight, IDS, ppo)
    torch.testing.assert_close(own.loss, built_in.loss, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(x.loss, [hidden, weight]) for x in (own, built_in)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory_budget", [SMALLEST, None])
def test_equals_linear_dpo_loss(memory_budget):
    hidden, weight = inputs(torch.float32, bias=False)
    refs, options = torch.randn(2, B // 2) - 200, dict(memory_budget=memory_budget)
    built_in = rlhf_fast.linear_dpo_loss(hidden, weight, IDS, *refs, beta=0.05, **options)

    def dpo(logprobs, entropy, pairs):
        chosen, rejected = logprobs.sum(2) - refs[:, pairs]
        return -logsigmoid(0.05 * (chosen - rejected))

    own = linear_loss(hidden, weight, IDS, dpo, pack="pair", **options)
    torch.testing.assert_close(own.loss, built_in.loss, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(x.loss, [hidden, weight]) for x in (own, built_in)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pack", LOSSES)
def test_a_frozen_head_and_an_evaluation(pack, monkeypatch):
    """Frozen: the same gradient by hidden, from two products. No gradient wanted: the same value."""
    tensors, options = inputs(), dict(pack=pack, memory_budget=SMALLEST)
    full = linear_loss(tensors[0], tensors[1], IDS, LOSSES[pack], bias=tensors[2], **options)
    constants = [x.detach() for x in tensors]
    calls, add = [], heads.Layer.add_product
    monkeypatch.setattr(heads.Layer, "add_product", lambda *args: calls.append(0) or add(*args))
    frozen = linear_loss(tensors[0], constants[1], IDS, LOSSES[pack], bias=constants[2], **options)
    assert not calls and torch.equal(frozen.loss, full.loss)
    gradients = (torch.autograd.grad(x.loss, tensors[0])[0] for x in (frozen, full))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    monkeypatch.delattr(heads.Head, "backward")
    with torch.no_grad():
        evaluated = linear_loss(tensors[0], tensors[1], IDS, LOSSES[pack], bias=tensors[2], **options)
    torch.testing.assert_close(evaluated.loss, full.loss.detach(), rtol=1e-13, atol=0)
    assert not evaluated.loss.requires_grad


@pytest.mark.parametrize("pack", LOSSES)
def test_masked_places_reach_nothing(pack):
    """Neither NaN in their hidden states nor NaN in the function's gradient of them."""
    hidden, weight = inputs(bias=False)
    dirty = torch.where(MASK[..., None], hidden.detach(), torch.nan).requires_grad_()

    def losses(logprobs, entropy, index):
        out = LOSSES[pack](logprobs, entropy, index)
        return out if pack == "token" else out + 0 * torch.where(logprobs == 0, (-logprobs).sqrt(), 0.0).sum()

    clean = linear_loss(hidden, weight, IDS, LOSSES[pack], pack=pack).loss
    got = linear_loss(dirty, weight, IDS, losses, pack=pack).loss
    assert torch.equal(clean, got)
    gradients = [torch.autograd.grad(x, [h, weight]) for x, h in ((clean, hidden), (got, dirty))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.all(gradients[1][0][~MASK] == 0)


@pytest.mark.parametrize("pack", LOSSES)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 3)])
def test_nothing_to_do(pack, shape):
    hidden, weight = torch.randn(*shape, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    out = linear_loss(hidden, weight, torch.full(shape, -100), LOSSES[pack], pack=pack)
    assert out.loss == 0 and out.logprobs.shape == shape
    assert all(torch.all(g == 0) for g in torch.autograd.grad(out.loss, [hidden, weight]))


def test_a_loss_that_uses_one_input_or_none():
    hidden, weight = inputs(bias=False)
    by_entropy = linear_loss(hidden, weight, IDS, lambda logprobs, entropy, tokens: -entropy)
    exact = -truth("token", hidden, weight, None)[2].sum() / MASK.sum()
    torch.testing.assert_close(by_entropy.loss, exact)
    for mine, gradient in zip(
        *(torch.autograd.grad(x, [hidden, weight]) for x in (by_entropy.loss, exact)), strict=True
    ):
        torch.testing.assert_close(mine, gradient, rtol=1e-10, atol=1e-13)
    constant = linear_loss(hidden, weight, IDS, lambda logprobs, entropy, tokens: torch.ones(len(tokens)))
    assert constant.loss == 1 and not torch.autograd.grad(constant.loss, hidden)[0].any()


def test_packs_hold_whole_items():
    """Rows and pairs are never cut, whatever the budget, and each is seen once, in order."""
    hidden, weight = inputs(torch.float32, bias=False)
    seen = {}

    def watch(pack):
        def losses(logprobs, entropy, index):
            seen.setdefault(pack, []).append((tuple(logprobs.shape), index.tolist()))
            return LOSSES[pack](logprobs, entropy, index)

        return losses

    for pack in LOSSES:
        linear_loss(hidden, weight, IDS, watch(pack), pack=pack, memory_budget=SMALLEST)
    assert seen["row"] == [((1, T), [0]), ((1, T), [2]), ((1, T), [3])]
    assert seen["pair"] == [((2, 1, T), [0]), ((2, 1, T), [1])]
    assert [i for _, index in seen["token"] for i in index] == MASK.flatten().nonzero().squeeze(1).tolist()
    assert max(shape[0] for shape, _ in seen["token"]) <= heads.FEWEST_ROWS


def test_errors():
    hidden, weight = torch.randn(3, 5, H), torch.randn(V, H)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    mean = lambda logprobs, entropy, index: logprobs.mean()  # noqa: E731
    with pytest.raises(
        ValueError, match=r"coefficients: expected a function that returns shape \[15\], one per token, got \[\]"
    ):
        linear_loss(hidden, weight, ids, mean)
    with pytest.raises(ValueError, match=r"returns shape \[3\], one per row, got \[3, 5\]"):
        linear_loss(hidden, weight, ids, lambda logprobs, entropy, index: logprobs, pack="row")
    for result, got in ((0.5, "float"), (None, "NoneType"), ([0.5] * 15, "list")):
        with pytest.raises(ValueError, match=rf"coefficients: expected .* shape \[15\], one per token, got {got}$"):
            linear_loss(hidden, weight, ids, lambda *_, result=result: result)
    with pytest.raises(
        ValueError, match=r"^coefficients: expected a function that returns floating-point losses, got torch\.bool$"
    ):
        linear_loss(hidden, weight, ids, lambda logprobs, *_: logprobs > 0)
    with pytest.raises(ValueError, match="^coefficients: expected a function that returns losses on cpu, got meta$"):
        linear_loss(hidden, weight, ids, lambda logprobs, *_: logprobs.to("meta"))
    with pytest.raises(ValueError, match=r"^coefficients: expected a function of \(.*\), got a tensor of shape"):
        linear_loss(hidden, weight, ids, hidden)
    with pytest.raises(ValueError, match="pack: expected one of token, row, pair, got 'batch'"):
        linear_loss(hidden, weight, ids, mean, pack="batch")
    with pytest.raises(ValueError, match="token_ids: expected an even number of rows, chosen then rejected"):
        linear_loss(hidden, weight, ids, mean, pack="pair")
    with pytest.raises(ValueError, match=r"token_ids: expected shape \[B, T\]"):
        linear_loss(hidden[0], weight, ids[0], mean, pack="row")
    with pytest.raises(ValueError, match="normalizer: expected a finite number > 0"):
        linear_loss(hidden, weight, ids, mean, normalizer=0)
    loss = linear_loss(hidden.requires_grad_(), weight, ids, lambda logprobs, *_: logprobs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after one backward"):
        loss.backward()


@pytest.mark.parametrize("pack", LOSSES)
@pytest.mark.parametrize("grad", [True, False])
def test_an_error_of_the_function_goes_on_as_it_is(pack, grad):
    """With a note of what the function got. The next call is none the worse for it."""
    hidden, weight = inputs(torch.float32, bias=False)
    wrong = KeyError("no such column")

    def losses(logprobs, entropy, index):
        if len(calls) == 2:
            raise wrong
        calls.append(list(logprobs.shape))
        return LOSSES[pack](logprobs, entropy, index)

    calls, options = [], dict(pack=pack, memory_budget=SMALLEST)
    with torch.set_grad_enabled(grad):
        if pack == "pair":
            calls.append(None)
        with pytest.raises(KeyError) as caught:
            linear_loss(hidden, weight, IDS, losses, **options)
    assert caught.value is wrong and len(calls) == 2
    if sys.version_info >= (3, 11):
        (note,) = wrong.__notes__
        shape = re.escape(str(calls[1]) if pack != "token" else "[")
        assert re.match(rf"linear_loss: raised by coefficients, which got logprobs and entropy {shape}.*{pack}", note)
    again = linear_loss(hidden, weight, IDS, LOSSES[pack], **options).loss
    assert torch.isfinite(torch.autograd.grad(again, hidden)[0]).all()


def test_compiled_code_runs_it_eagerly_or_says_that_it_cannot(monkeypatch):
    hidden, weight = inputs(torch.float32, bias=False)
    call = lambda h: linear_loss(h, weight, IDS, cispo).loss * 2  # noqa: E731
    torch._dynamo.reset()
    # torch shows the call; torch 2.8 leaves out the line that raises and what the exception says
    with pytest.raises(Exception, match=r"linear_loss\(h, weight, IDS, cispo\)"):
        torch.compile(call, fullgraph=True, backend="eager")(hidden)
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="^linear_loss: runs eagerly only; keep its caller out of torch.compile"):
            call(hidden)
    aside = torch.compiler.disable(linear_loss)
    compiled = torch.compile(lambda h: aside(h, weight, IDS, cispo).loss * 2, backend="eager")
    torch.testing.assert_close(compiled(hidden), call(hidden))
