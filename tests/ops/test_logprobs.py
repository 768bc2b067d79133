import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlhf_fast
from rlhf_fast import token_logprobs
from rlhf_fast.ops import backend
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error, token_truth

DTYPES = list(VALUE_TOLERANCE)
INF = math.inf


def check(logits, ids, gradient_tolerance=None, **options):
    """Values and gradients of both outputs at once against float64."""
    dtype = logits.dtype
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    grads = torch.randn(2, *ids.shape)
    out = token_logprobs(x, ids, **options)
    ((out.logprobs * grads[0]).sum() + (out.entropy * grads[1]).sum()).backward()
    logprobs, entropy, gradient = token_truth(logits, ids, *grads, **options)
    assert out.logprobs.dtype == out.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(out.logprobs, logprobs) <= VALUE_TOLERANCE[dtype]
    assert error(out.entropy, entropy) <= VALUE_TOLERANCE[dtype]
    assert error(x.grad, gradient) <= (gradient_tolerance or GRADIENT_TOLERANCE[dtype])
    return out, x.grad


def test_hand_computed(kernels):
    """p = (1/8, 2/8, 5/8)"""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log() + 3
    out = token_logprobs(logits, torch.tensor([2]))
    assert out.logprobs.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    assert out.entropy.item() == pytest.approx(math.log(8) / 8 + math.log(4) / 4 + math.log(8 / 5) * 5 / 8, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 33), (5, 4999), (2, 3, 65), (9,)])
def test_matches_float64(kernels, dtype, shape):
    logits = (torch.randn(shape) * 3).to(dtype)
    check(logits, torch.randint(shape[-1], shape[:-1]))


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_temperature_and_softcap(kernels, temperature, softcap):
    check(torch.randn(6, 129) * 2, torch.randint(129, (6,)), 3e-5, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.03, 0.005, 1e-5])
def test_low_temperature(kernels, temperature, dtype):
    """Logits closer to each other than to the next integer, which must not be what they are measured from."""
    logits = torch.randn(6, 129, dtype=dtype) * 3 * temperature
    check(logits + 20 * temperature, torch.randint(129, (6,)), 3e-5, temperature=temperature)
    check(torch.randn(6, 129, dtype=dtype), torch.randint(129, (6,)), 3e-5, temperature=temperature)


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_huge_offset(kernels, offset):
    """Logits far from zero: what is lost is what float32 loses of the logits themselves, nothing more."""
    check(torch.randn(5, 999) * 3 + offset, torch.randint(999, (5,)))


@given(shift=st.integers(-(2**14), 2**14))
def test_shift_invariance(shift):
    """Adding a constant that float32 adds exactly changes no bit, on the kernels as in mathematics."""
    logits = torch.randint(-64, 64, (4, 77)) / 8
    ids = torch.randint(77, (4,))
    for a, b in zip(token_logprobs(logits + shift, ids), token_logprobs(logits, ids), strict=True):
        assert torch.equal(a, b)


class TestMinusInfinity:
    def test_one(self, kernels):
        logits = torch.randn(5, 300)
        logits[:, 7] = -INF
        _, gradient = check(logits, torch.full((5,), 8))
        assert torch.all(gradient[:, 7] == 0)

    def test_first_4096(self, kernels):
        logits = torch.randn(3, 5000)
        logits[:, :4096] = -INF
        check(logits, torch.randint(4096, 5000, (3,)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_but_the_target(self, kernels, dtype):
        logits = torch.full((3, 4500), -INF, dtype=dtype)
        ids = torch.tensor([0, 4096, 4499])
        logits[torch.arange(3), ids] = 1.5
        x = logits.requires_grad_()
        out = token_logprobs(x, ids)
        (out.logprobs + out.entropy).sum().backward()
        assert torch.all(out.logprobs == 0) and torch.all(out.entropy == 0) and torch.all(x.grad == 0)

    def test_the_target_itself(self, kernels):
        """An impossible token has log-probability -inf, and the gradient's formula still holds: 1[j = t] - p_j."""
        x = torch.tensor([[-INF, 0.0, 0.0]], requires_grad=True)
        out = token_logprobs(x, torch.tensor([0]))
        out.logprobs.sum().backward()
        assert out.logprobs.item() == -INF
        assert error(x.grad, torch.tensor([[1.0, -0.5, -0.5]])) < 1e-6


@pytest.mark.parametrize("lead", [20.0, 25.0, 40.0, 80.0, 95.0])
def test_confident_target(kernels, lead):
    """Past 17 nats z_t - logsumexp rounds to 0 in float32; the log-probability and its gradient must not."""
    logits = torch.randn(4, 257)
    ids = torch.randint(257, (4,))
    rows = torch.arange(4)
    logits[rows, ids] = logits.amax() + lead
    x = logits.requires_grad_()
    logprobs, entropy = token_logprobs(x, ids)
    logprobs.sum().backward()
    zero = torch.zeros(4)
    truth, _, gradient = token_truth(logits.detach(), ids, zero + 1, zero)
    assert torch.all((logprobs - truth).abs() < 1e-3 * truth.abs())
    others = logits.detach().double().index_put((rows, ids), zero.double() - INF)  # H = sum p (1 + z_t - z), nearly
    weights = torch.exp(others - logits.detach()[rows, ids, None].double())
    entropy_truth = (weights * (1 + torch.where(weights > 0, -weights.clamp(min=1e-300).log(), 0))).sum(-1)
    assert torch.all((entropy - entropy_truth).abs() < 1e-3 * entropy_truth)
    truth = -torch.expm1(truth)  # 1 - p_t, which the float64 formula of the gradient cannot hold
    assert torch.all((x.grad[rows, ids] - truth).abs() < 1e-3 * truth) and torch.all(x.grad[rows, ids] > 0)
    gradient[rows, ids] = 0
    assert error(x.grad.clone().index_put_((rows, ids), zero), gradient) < 1e-6


@pytest.mark.parametrize("junk", [torch.nan, INF, -INF])
def test_masked_rows_are_exact_zeros(kernels, junk):
    logits = torch.randn(4, 70)
    logits[1:3] = junk
    x = logits.requires_grad_()
    out = token_logprobs(x, torch.tensor([3, -100, -100, 5]))
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert torch.all(out.logprobs[1:3] == 0) and torch.all(out.entropy[1:3] == 0) and torch.all(x.grad[1:3] == 0)
    assert torch.isfinite(x.grad).all() and torch.all(out.logprobs[::3] < 0)


def test_no_rows(kernels):
    x = torch.randn(0, 11, requires_grad=True)
    out = token_logprobs(x, torch.empty(0, dtype=torch.int64))
    out.logprobs.sum().backward()
    assert out.logprobs.shape == (0,) and x.grad.shape == (0, 11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kernels, dtype):
    ids = torch.randint(6, (4, 5))
    check(torch.randn(6, 20).to(dtype).t()[:, :6], ids.flatten())  # columns apart: copied
    check(torch.randn(4, 20, 12).to(dtype)[:, ::4, ::2], ids)
    check(torch.randn(4, 6, 6).to(dtype)[:, :-1], ids)  # as a causal shift leaves it: one block per sequence
    check(torch.randn(5, 4, 6).to(dtype).transpose(0, 1), ids)
    check(torch.randn(6).to(dtype).expand(4, 5, 6), ids)
    check(torch.randn(4, 7, 6).to(dtype)[:, -1:], ids[:, :1])


def test_offsets_beyond_32_bits():
    """The third row starts 2^31 + 64 elements after the first. Only the pages that are touched cost memory."""
    step, V = 2**30 + 32, 100
    logits = torch.empty(2 * step + V, dtype=torch.bfloat16).as_strided((3, V), (step, 1)).copy_(torch.randn(3, V))
    dense = logits.contiguous()
    ids = torch.randint(V, (3,))
    x = (logits.requires_grad_(), dense.requires_grad_())
    out = [token_logprobs(y.view_as(y), ids, inplace_backward=True) for y in x]  # a leaf itself is refused
    for o in out:
        (o.logprobs - o.entropy).sum().backward()
    assert torch.equal(out[0].logprobs, out[1].logprobs) and torch.equal(out[0].entropy, out[1].entropy)
    assert torch.equal(*x)  # each now holds its gradient


def test_int32_ids(kernels):
    logits = torch.randn(3, 9)
    ids = torch.tensor([0, 8, -100])
    assert torch.equal(token_logprobs(logits, ids.int()).logprobs, token_logprobs(logits, ids).logprobs)


def test_permuted_rows_give_permuted_bits():
    logits, ids, order = torch.randn(37, 1003), torch.randint(1003, (37,)), torch.randperm(37)
    x, y = logits.clone().requires_grad_(), logits[order].requires_grad_()
    a, b = token_logprobs(x, ids), token_logprobs(y, ids[order])
    (a.logprobs + a.entropy).sum().backward()
    (b.logprobs + b.entropy).sum().backward()
    assert torch.equal(a.logprobs[order], b.logprobs) and torch.equal(a.entropy[order], b.entropy)
    assert torch.equal(x.grad[order], y.grad)


def test_one_output_alone(kernels):
    """The gradient of an output nobody used is absent, not a tensor of zeros."""
    logits, ids = torch.randn(3, 40), torch.randint(40, (3,))
    for name, grads in (("logprobs", (1.0, 0.0)), ("entropy", (0.0, 1.0))):
        x = logits.clone().requires_grad_()
        getattr(token_logprobs(x, ids), name).sum().backward()
        assert error(x.grad, token_truth(logits, ids, *(torch.full((3,), g) for g in grads))[2]) < 1e-6


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0}])
def test_gradcheck(kernels, options):
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 6, 3], [-100, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda x: tuple(token_logprobs(x, ids, **options)), x, fast_mode=kernels == "triton"
    )


def test_second_derivative_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    ratio = token_logprobs(x, torch.tensor([1, 2])).logprobs.exp()
    (grad,) = torch.autograd.grad(ratio.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.square().sum().backward()


class TestInplaceBackward:
    def loss(self, logits, ids):
        out = token_logprobs(logits, ids, inplace_backward=True)
        return (out.logprobs - 0.1 * out.entropy).sum()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradient_lies_over_the_logits(self, dtype):
        values, ids = torch.randn(5, 130).to(dtype), torch.randint(130, (5,))
        ids[2] = -100
        x = values.clone().requires_grad_()
        out = token_logprobs(x, ids)
        (out.logprobs - 0.1 * out.entropy).sum().backward()

        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        addresses = []
        logits.register_hook(lambda grad: addresses.append(grad.data_ptr()))
        self.loss(logits, ids).backward()
        assert addresses == [logits.data_ptr()]
        assert torch.equal(leaf.grad, x.grad) and torch.equal(logits, x.grad)

    def test_a_view_of_a_leaf_holds_no_second_tensor(self):
        x = torch.randn(5, 130, requires_grad=True)
        self.loss(x.view_as(x), torch.randint(130, (5,))).backward()
        assert x.grad.data_ptr() == x.data_ptr()

    def test_causal_shift(self):
        """Only the rows that were read are overwritten."""
        leaf = torch.randn(2, 4, 9, requires_grad=True)
        ids = torch.randint(9, (2, 3))
        whole = leaf * 1
        self.loss(whole[:, :-1], ids).backward()
        expected = leaf.detach().clone().requires_grad_()
        out = token_logprobs(expected[:, :-1], ids)
        (out.logprobs - 0.1 * out.entropy).sum().backward()
        assert torch.equal(leaf.grad, expected.grad) and torch.equal(whole[:, -1], leaf[:, -1])

    def test_another_consumer_is_told(self):
        leaf = torch.randn(3, 9, requires_grad=True)
        logits = leaf * 1
        other = logits.square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (other + self.loss(logits, torch.randint(9, (3,)))).backward()

    def test_refuses_what_it_cannot_overwrite(self, kernels):
        ids = torch.zeros(3, dtype=torch.int64)
        with pytest.raises(ValueError, match="inplace_backward: expected logits with a contiguous last dimension"):
            token_logprobs(torch.randn(9, 3).t(), ids, inplace_backward=True)
        with pytest.raises(ValueError, match="^inplace_backward: expected logits that a model has computed"):
            token_logprobs(torch.randn(3, 9, requires_grad=True), ids, inplace_backward=True)
        token_logprobs(torch.randn(3, 9), ids, inplace_backward=True)  # no gradient comes
        with pytest.raises(ValueError, match="inplace_backward: expected rows that do not overlap"):
            token_logprobs(torch.randn(9).expand(3, 9), ids, inplace_backward=True)
        with pytest.raises(ValueError, match="inplace_backward: expected rows that do not overlap"):
            token_logprobs(torch.randn(9).unfold(0, 5, 2), ids, inplace_backward=True)


def test_nan_before_the_first_number_is_not_lost(kernels):
    logits = torch.randn(1, 5000)
    logits[0, :3000] = torch.nan
    out = token_logprobs(logits, torch.tensor([4000]))
    assert out.logprobs.isnan().all() and out.entropy.isnan().all()


@pytest.mark.parametrize("level", [1e8, -1e10, 1e30, -1e30])
def test_equal_logits_far_from_zero(kernels, level):
    """A row's last few columns are not padded with numbers that round to its largest."""
    out = token_logprobs(torch.full((1, 1003), level), torch.tensor([500]))
    torch.testing.assert_close(out.logprobs, -torch.tensor([1003.0]).log())
    torch.testing.assert_close(out.entropy, torch.tensor([1003.0]).log())


@pytest.mark.parametrize("bad", [-1, 9, -99])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_id_out_of_range(name, bad):
    """Of CPU tensors. Those of a GPU are not checked, that would wait for it: test_cuda.py has what becomes of them."""
    ids = torch.tensor([[0, -100], [bad, bad]])
    message = rf"token_ids: expected ids in \[0, 9\) or -100, got {bad} at row 2"
    with backend(name), pytest.raises(ValueError, match=message):
        token_logprobs(torch.randn(2, 2, 9), ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logits=torch.zeros(2, 3, dtype=torch.int64)), "logits: expected dtype float32, .* got torch.int64"),
        (dict(logits=torch.zeros(2, 0)), r"logits: expected shape \[..., V\] with V > 0, got \[2, 0\]"),
        (dict(token_ids=torch.zeros(2)), "token_ids: expected dtype int64 or int32, got torch.float32"),
        (dict(token_ids=torch.zeros(3, dtype=torch.int64)), r"token_ids: expected shape \[2\] .* got \[3\]"),
        (
            dict(token_ids=torch.zeros(2, dtype=torch.int64, device="meta")),
            "token_ids: expected device cpu .* got meta",
        ),
        (dict(temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
        (dict(temperature=torch.nan), "temperature: expected a finite number > 0, got nan"),
        (dict(softcap=-1.0), "softcap: expected a finite number > 0, got -1.0"),
    ],
)
def test_errors(kernels, arguments, message):
    valid = dict(logits=torch.zeros(2, 3), token_ids=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        rlhf_fast.token_logprobs(**(valid | arguments))
