"""token_kl against float64 formulas: close and distant pairs, -inf on either side, masks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import token_kl, token_logprobs
from rlhf_fast.ops import backend
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error, kl_truth

DTYPES = list(VALUE_TOLERANCE)
INF = math.inf


def check(logits, ref_logits, ids, gradient_tolerance=None, **options):
    """Values and gradients of the three outputs at once against float64."""
    dtype = logits.dtype
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    grads = torch.randn(3, *ids.shape)
    out = token_kl(x, ref_logits, ids, **options)
    sum((y * grad).sum() for y, grad in zip(out[:3], grads, strict=True)).backward()
    *values, gradient = kl_truth(logits, ref_logits, ids, *grads, **options)
    for name, y, true in zip(out._fields, out, values, strict=True):
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(y, true) <= VALUE_TOLERANCE[dtype], name
    assert not out.ref_logprobs.requires_grad and torch.all(out.kl >= 0)
    assert error(x.grad, gradient) <= (gradient_tolerance or GRADIENT_TOLERANCE[dtype])
    return out, x.grad


def test_hand_computed(kernels):
    """p = (1/8, 2/8, 5/8), q = (1/2, 1/4, 1/4)"""
    logits, ref_logits = torch.tensor([[1.0, 2.0, 5.0]]).log() + 3, torch.tensor([[2.0, 1.0, 1.0]]).log() - 1
    out = token_kl(logits, ref_logits, torch.tensor([2]))
    assert out.kl.item() == pytest.approx(math.log(1 / 4) / 8 + math.log(5 / 2) * 5 / 8, abs=1e-6)
    assert out.ref_logprobs.item() == pytest.approx(math.log(1 / 4), abs=1e-6)
    assert out.logprobs.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    assert out.entropy.item() == pytest.approx(math.log(8) / 8 + math.log(4) / 4 + math.log(8 / 5) * 5 / 8, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 33), (5, 4999), (2, 3, 65), (9,), (2, 70_001)])
def test_matches_float64(kernels, dtype, shape):
    logits = (torch.randn(shape) * 3).to(dtype)
    ids = torch.randint(shape[-1], shape[:-1])
    check(logits, (logits + torch.randn(shape) / 4).to(dtype), ids)
    check(logits, torch.randn(shape).to(dtype), ids)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_temperature_and_softcap(kernels, temperature, softcap):
    logits, options = torch.randn(6, 129) * 2, dict(temperature=temperature, softcap=softcap)
    check(logits, logits + torch.randn(6, 129) / 2, torch.randint(129, (6,)), 3e-5, **options)


@pytest.mark.parametrize("temperature", [0.03, 0.005, 1e-5])
def test_low_temperature(kernels, temperature):
    logits, ids = (torch.randn(6, 129) * 3 + 20) * temperature, torch.randint(129, (6,))
    ref_logits = logits + torch.randn(6, 129) * temperature
    check(logits, ref_logits, ids, 3e-5, temperature=temperature)


@pytest.mark.parametrize(("offset", "ref_offset"), [(1000.0, 1000.0), (-1000.0, -1000.0), (1000.0, -1000.0)])
def test_huge_offsets(kernels, offset, ref_offset):
    logits = torch.randn(5, 999) * 3
    check(logits + offset, logits + torch.randn(5, 999) + ref_offset, torch.randint(999, (5,)))


@given(shift=st.integers(-(2**14), 2**14), ref_shift=st.integers(-(2**14), 2**14))
def test_shift_invariance(shift, ref_shift):
    """Adding constants that float32 adds exactly changes no bit, on the kernels as in mathematics."""
    logits, ref_logits, ids = torch.randint(-64, 64, (4, 77)) / 8, torch.randint(-64, 64, (4, 77)) / 8, torch.arange(4)
    pairs = zip(token_kl(logits + shift, ref_logits + ref_shift, ids), token_kl(logits, ref_logits, ids), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class TestClose:
    """What sum p (log p - log q) in float32 loses, 1e-6 and more, is all of the KL between near-equal policies."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equal_logits_give_zero(self, kernels, dtype):
        logits = (torch.randn(20, 4999) * 4).to(dtype)
        out = token_kl(logits, logits.clone(), torch.randint(4999, (20,)), temperature=0.7, softcap=20.0)
        assert torch.all(out.kl == 0) and torch.equal(out.logprobs, out.ref_logprobs)

    def test_a_constant_apart(self):
        logits = torch.randn(20, 4999) * 4
        out = token_kl(logits, logits + 1.3, torch.randint(4999, (20,)))
        assert torch.all(out.kl < 1e-11)

    @pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.1])
    @pytest.mark.parametrize("offset", [0.0, 7.3])
    def test_digits_of_a_small_kl(self, distance, offset):
        logits = torch.randn(20, 4999) * 2
        ref_logits = logits + torch.randn(20, 4999) * distance + offset
        ids = torch.distributions.Categorical(logits=logits).sample()
        true = kl_truth(logits, ref_logits, ids, *torch.zeros(3, 20))[2]
        relative = (token_kl(logits, ref_logits, ids).kl - true).abs() / true
        assert relative.max() < 1e-5

    def test_the_reference_to_its_rounding(self, kernels):
        logits = torch.randn(20, 4999) * 2
        check(logits, logits + torch.randn(20, 4999) * 1e-3, torch.randint(4999, (20,)))

    def test_the_likely_token_far_from_the_target(self):
        """The sums are centred on the likeliest token, wherever it is."""
        logits = torch.randn(4, 40_000)
        logits[:, 35_000] = 30.0
        ref_logits = logits + torch.randn(4, 40_000) * 1e-2
        check(logits, ref_logits, torch.zeros(4, dtype=torch.int64))
        ref_logits[:, 35_000] -= 60
        check(logits, ref_logits, torch.zeros(4, dtype=torch.int64))
        check(ref_logits, logits, torch.zeros(4, dtype=torch.int64))


class TestMinusInfinity:
    def test_the_same_tokens(self, kernels):
        logits, ref_logits = torch.randn(2, 5, 300)
        for x in (logits, ref_logits):
            x[:, 7], x[:, 290:] = -INF, -INF
        _, gradient = check(logits, ref_logits, torch.full((5,), 8))
        assert torch.all(gradient[:, 7] == 0) and torch.all(gradient[:, 290:] == 0)

    @pytest.mark.parametrize("columns", [slice(3, 4), slice(0, 4096), slice(40_000, None), slice(300, 69_000)])
    def test_the_policy_alone(self, kernels, columns):
        """A token that p cannot give contributes 0, whatever q_j is."""
        logits, ref_logits = torch.randn(2, 3, 70_001)
        logits[:, columns] = -INF
        ref_logits[:, columns] += 3
        check(logits, ref_logits, torch.full((3,), 69_500 if columns.start == 0 else 1))

    @pytest.mark.parametrize("column", [3, 69_000, 20])
    def test_the_reference_alone_makes_kl_infinite(self, kernels, column):
        logits, ref_logits = torch.randn(2, 3, 70_001)
        logits[0, column] = -INF  # row 0: neither can give it
        logits[2, column] = -200.0  # row 2: its p underflows in float32, and in truth does not
        ref_logits[:, column] = -INF
        x = logits.requires_grad_()
        ids = torch.full((3,), 20)
        ids[0] = 21
        out = token_kl(x, ref_logits, ids)
        true = kl_truth(x.detach(), ref_logits, ids, *torch.zeros(3, 3))
        assert error(out.kl[:1], true[2][:1]) < 1e-5 and torch.all(out.kl[1:] == INF)
        assert error(out.logprobs, true[0]) < 1e-5 and error(out.entropy, true[1]) < 1e-5
        (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), x, retain_graph=True)
        assert torch.isfinite(gradient).all()
        (gradient,) = torch.autograd.grad(out.kl.sum(), x)
        assert torch.isfinite(gradient[0]).all() and not torch.isfinite(gradient[1, column])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_but_the_target(self, kernels, dtype):
        logits = torch.full((3, 4500), -INF, dtype=dtype)
        ids = torch.tensor([0, 4096, 4499])
        logits[torch.arange(3), ids] = 1.5
        x, ref_logits = logits.requires_grad_(), torch.zeros(3, 4500, dtype=dtype)
        out = token_kl(x, ref_logits, ids)
        (out.logprobs + out.entropy + out.kl).sum().backward()
        assert torch.all(out.logprobs == 0) and torch.all(out.entropy == 0)
        assert error(out.kl, torch.full((3,), math.log(4500), dtype=torch.float64)) < VALUE_TOLERANCE[dtype]
        assert torch.isfinite(x.grad).all() and error(x.grad, torch.zeros(3, 4500)) < VALUE_TOLERANCE[dtype]

    def test_the_target_itself(self, kernels):
        logits = torch.tensor([[-INF, 0.0, 0.0], [1.0, 0.0, 2.0]])
        out = token_kl(logits, logits.flip(0), torch.tensor([0, 0]))
        assert out.logprobs[0] == -INF and out.ref_logprobs[1] == -INF and out.kl[1] == INF
        assert (
            error(out.kl[:1], kl_truth(logits, logits.flip(0), torch.tensor([1, 1]), *torch.zeros(3, 2))[2][:1]) < 1e-6
        )


def test_far_apart(kernels):
    """Almost all of p where q has e^-300, and the reverse."""
    logits, ref_logits = torch.randn(2, 4, 999)
    logits[:, 5], ref_logits[:, 700] = 150.0, 150.0
    check(logits, ref_logits, torch.tensor([5, 700, 0, 998]))


@pytest.mark.parametrize("lead", [20.0, 40.0, 80.0])
def test_confident_target(kernels, lead):
    """As `token_logprobs` has them, bit for bit or as near as float32 comes; the reference's log-prob too."""
    logits, ref_logits = torch.randn(2, 4, 257)
    ids, rows = torch.randint(257, (4,)), torch.arange(4)
    logits[rows, ids], ref_logits[rows, ids] = logits.amax() + lead, ref_logits.amax() + lead / 2
    x = logits.requires_grad_()
    out = token_kl(x, ref_logits, ids)
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), x)
    torch.testing.assert_close(out.logprobs, token_logprobs(logits, ids).logprobs, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.ref_logprobs, token_logprobs(ref_logits, ids).logprobs, rtol=1e-5, atol=0)
    assert torch.all(out.logprobs < 0) and torch.all(gradient[rows, ids] > 0)


@pytest.mark.parametrize("junk", [torch.nan, INF, -INF])
@pytest.mark.parametrize("ref_junk", [torch.nan, INF, -INF])
def test_masked_rows_are_exact_zeros(kernels, junk, ref_junk):
    logits, ref_logits = torch.randn(2, 4, 70)
    logits[1:3], ref_logits[1:3] = junk, ref_junk
    x = logits.requires_grad_()
    out = token_kl(x, ref_logits, torch.tensor([3, -100, -100, 5]))
    sum(y.sum() for y in out[:3]).backward()
    assert all(torch.all(y[1:3] == 0) for y in out) and torch.all(x.grad[1:3] == 0)
    assert torch.isfinite(x.grad).all() and torch.all(out.kl[::3] > 0)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("broken", [torch.nan, INF])
def test_what_is_no_distribution_is_not_hidden(kernels, side, broken):
    pair = torch.randn(2, 3, 70)
    pair[side, :, 11] = broken
    assert torch.isnan(token_kl(*pair, torch.arange(3)).kl).all()


def test_no_rows(kernels):
    x = torch.randn(0, 11, requires_grad=True)
    out = token_kl(x, torch.randn(0, 11), torch.empty(0, dtype=torch.int64))
    out.kl.sum().backward()
    assert out.kl.shape == (0,) and x.grad.shape == (0, 11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kernels, dtype):
    ids = torch.randint(6, (4, 5))
    whole = torch.randn(4, 5, 6).to(dtype)
    check(torch.randn(6, 20).to(dtype).t()[:, :6], torch.randn(20, 6).to(dtype), ids.flatten())
    check(torch.randn(4, 6, 6).to(dtype)[:, :-1], whole, ids)
    check(whole, torch.randn(4, 6, 6).to(dtype)[:, 1:], ids)
    check(torch.randn(5, 4, 6).to(dtype).transpose(0, 1), torch.randn(4, 20, 12).to(dtype)[:, ::4, ::2], ids)
    check(whole, torch.randn(6).to(dtype).expand(4, 5, 6), ids)


def test_permuted_rows_give_permuted_bits():
    (logits, ref_logits), ids, order = torch.randn(2, 37, 1003), torch.randint(1003, (37,)), torch.randperm(37)
    x, y = logits.clone().requires_grad_(), logits[order].requires_grad_()
    a, b = token_kl(x, ref_logits, ids), token_kl(y, ref_logits[order], ids[order])
    sum(z.sum() for z in a[:3]).backward()
    sum(z.sum() for z in b[:3]).backward()
    assert all(torch.equal(m[order], n) for m, n in zip(a, b, strict=True))
    assert torch.equal(x.grad[order], y.grad)


def test_threads_that_share_a_row_change_no_bit():
    logits, ref_logits = torch.randn(2, 2, 200_003)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = logits.clone().requires_grad_()
            out = token_kl(x, ref_logits, torch.tensor([-100, 150_000]))
            sum(y.sum() for y in out[:3]).backward()
            results.append([*out, x.grad])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_gradient_of_a_policy_sure_of_another_token():
    """p (log p - log q - KL) cancels where p is near 1 and the log-ratio large: its digits are kept."""
    logits = torch.randn(4, 4999)
    logits[:, 3000] = 40.0
    ref_logits = logits + torch.randn(4, 4999) * 8
    check(logits, ref_logits, torch.zeros(4, dtype=torch.int64), temperature=0.3)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "kl"])
def test_one_output_alone(kernels, name):
    """The gradient of an output nobody used is absent, not a tensor of zeros; none reaches the reference."""
    (logits, ref_logits), ids = torch.randn(2, 3, 40), torch.randint(40, (3,))
    x, y = logits.clone().requires_grad_(), ref_logits.clone().requires_grad_()
    getattr(token_kl(x, y, ids), name).sum().backward()
    grads = [torch.full((3,), float(name == other)) for other in ("logprobs", "entropy", "kl")]
    assert error(x.grad, kl_truth(logits, ref_logits, ids, *grads)[4]) < 1e-6 and y.grad is None


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0}])
def test_gradcheck(kernels, options):
    x, ref_logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 7).double()
    ids = torch.tensor([[0, 6, 3], [-100, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda x: token_kl(x, ref_logits, ids, **options)[:3], x, fast_mode=kernels == "triton"
    )


def test_second_derivative_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(token_kl(x, x.cos(), torch.tensor([1, 2])).kl.exp().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward(dtype):
    """The gradient lies over the logits, the reference stays, even where it is the same memory."""
    (values, ref_logits), ids = torch.randn(2, 5, 130).to(dtype), torch.randint(130, (5,))
    ids[2] = -100
    for reference in (ref_logits, None):
        results = []
        for inplace in (False, True):
            logits = values.clone().requires_grad_()
            kept = logits.detach() if reference is None else reference.clone()
            out = token_kl(logits.view_as(logits), kept, ids, inplace_backward=inplace)
            (out.logprobs - 0.1 * out.entropy + out.kl).sum().backward()
            results.append(logits.grad.clone())
            if inplace:
                assert logits.grad.data_ptr() == logits.data_ptr()
            if reference is not None:
                assert torch.equal(kept, reference)
        assert torch.equal(*results)
    with pytest.raises(ValueError, match="^inplace_backward: expected logits that a model has computed"):
        token_kl(values.requires_grad_(), ref_logits, ids, inplace_backward=True)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_id_out_of_range(name):
    """Of CPU tensors, as for `token_logprobs`."""
    message = r"token_ids: expected ids in \[0, 3\) or -100, got 3 at row 1"
    with backend(name), pytest.raises(ValueError, match=message):
        token_kl(*torch.zeros(2, 2, 3), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logits=torch.zeros(2, 3).long()), "logits: expected dtype float32, .* got torch.int64"),
        (dict(ref_logits=torch.zeros(2, 4)), r"ref_logits: expected shape \[2, 3\] as logits, got \[2, 4\]"),
        (dict(ref_logits=torch.zeros(2, 3).half()), "ref_logits: expected dtype torch.float32 as logits, got"),
        (dict(ref_logits=torch.zeros(2, 3, device="meta")), "ref_logits: expected device cpu as logits, got meta"),
        (dict(token_ids=torch.zeros(3).long()), r"token_ids: expected shape \[2\] .* got \[3\]"),
        (dict(temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
        (dict(softcap=-1.0), "softcap: expected a finite number > 0, got -1.0"),
    ],
)
def test_errors(kernels, arguments, message):
    valid = dict(logits=torch.zeros(2, 3), ref_logits=torch.zeros(2, 3), token_ids=torch.zeros(2).long())
    with pytest.raises(ValueError, match=message):
        token_kl(**(valid | arguments))
