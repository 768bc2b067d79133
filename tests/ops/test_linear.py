"""The linear family against the same losses of logits in float64: values, gradients, chunks, masks, frozen weights."""

import pytest
import torch

import rlhf_fast
from rlhf_fast.ops import head_layers, heads, reference
from rlhf_fast.ops.head_layers import MixedLayer

B, T, H, V = 4, 37, 24, 1009
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of values and of gradients relative to their largest; half types: their inputs' and gradients' own rounding."""
SMALLEST = 1
"""A memory budget that makes chunks of `heads.FEWEST_ROWS` rows."""


def inputs(dtype=torch.float32, bias=True):
    hidden, weight = torch.randn(B, T, H) * 2, torch.randn(V, H) / 2
    tensors = [hidden, weight, torch.randn(V)] if bias else [hidden, weight]
    return [x.to(dtype).requires_grad_() for x in tensors]


def losses(options):
    """Every function of the family as f(ops, hidden, weight, bias) -> its differentiable results."""
    ids, mask = torch.randint(V, (B, T)), torch.rand(B, T) > 0.3
    mask[1] = False
    old, ref, advantages, upstream = (torch.randn(B, T, dtype=torch.float64) for _ in range(4))
    old, ref = old - 8, ref - 8
    masked, refs = ids.masked_fill(~mask, -100), (torch.randn(B // 2).double() - 300).split(1)[0].expand(2, B // 2)

    def through(name, select, *args, **kwargs):
        return lambda ops, h, w, b=None: select(getattr(ops, name)(h, w, *args, bias=b, **kwargs, **options))

    first = lambda out: [out[0]]  # noqa: E731
    return {
        "logprobs": through("linear_token_logprobs", lambda out: [(out[0] * upstream).sum()], masked),
        "both": through(
            "linear_token_logprobs", lambda out: [(out[0] * upstream).sum() + (out[1] * old).sum() / 8], masked
        ),
        "sft": through("linear_sft_loss", first, masked),
        "sft, a given denominator": through("linear_sft_loss", lambda out: [3.5 * out.loss], masked, normalizer=777.0),
        "reinforce": through("linear_reinforce_loss", first, ids, advantages, mask),
        "reinforce, sequence_mean": through(
            "linear_reinforce_loss", first, ids, advantages[:, 0], mask, reduction="sequence_mean"
        ),
        "ppo": through("linear_ppo_loss", first, ids, old, advantages, mask),
        "ppo, everything": through(
            "linear_ppo_loss", first, ids, old, advantages, mask, clip=(0.1, 0.3), dual_clip=2.0, ref_logprobs=ref,
            kl_coef=0.2, kl_estimator="k3", entropy_coef=0.05, reduction="sequence_sum",
        ),
        "dpo": through("linear_dpo_loss", first, masked, *refs, beta=0.05),
        "dpo, sigmoid_norm": through("linear_dpo_loss", first, masked, *refs, loss_type="sigmoid_norm", normalizer=5.0),
        "kto": through("linear_kto_loss", first, masked, refs[0].repeat(2), mask[:, 0], torch.tensor(0.4), beta=0.05),
        "kto, everything": through(
            "linear_kto_loss", first, masked, refs[1].repeat(2), mask[:, 1], None, loss_type="apo_zero_unpaired",
            beta=0.02, desirable_weight=0.3, undesirable_weight=1.7, normalizer=5.0,
        ),
        "dpo, ipo": through("linear_dpo_loss", first, masked, None, None, loss_type="ipo", reference_free=True),
    }  # fmt: skip


NAMES = list(losses({}))


def value_and_gradients(function, tensors):
    (value,) = function(rlhf_fast, *tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def agree(name, dtype, *, bias=True, memory_budget=SMALLEST, **options):
    """The largest errors stay within the tolerance of the dtype, relative to the largest true number."""
    torch.manual_seed(1)
    tensors = inputs(dtype, bias)
    torch.manual_seed(2)
    got = value_and_gradients(losses({**options, "memory_budget": memory_budget})[name], tensors)
    torch.manual_seed(2)
    with rlhf_fast.ops.backend("reference"):
        true = value_and_gradients(losses(options)[name], [x.detach().double().requires_grad_() for x in tensors])
    for mine, exact in zip(got, true, strict=True):
        assert mine.shape == exact.shape
        error = (mine.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCE[dtype] * (1 if exact.dim() else 10), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agrees_with_float64(name, dtype):
    agree(name, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory_budget", [40 * V * 8, 100 * V * 8, None])  # chunks of 40 and 100 tokens, one chunk
def test_chunks_change_nothing(name, memory_budget):
    agree(name, torch.float64, memory_budget=memory_budget)


@pytest.mark.parametrize("name", NAMES)
def test_temperature_and_softcap(name):
    agree(name, torch.float64, temperature=0.6, softcap=4.0)
    agree(name, torch.float32, temperature=1.7, bias=False)


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_makes_no_gradient(monkeypatch, name):
    tensors = inputs()
    torch.manual_seed(2)
    trained = losses({"memory_budget": SMALLEST})[name](rlhf_fast, *tensors)[0]
    monkeypatch.delattr(heads.Head, "backward")
    torch.manual_seed(2)
    with torch.no_grad():
        assert torch.equal(losses({"memory_budget": SMALLEST})[name](rlhf_fast, *tensors)[0], trained)


def test_a_half_weight_is_widened_tile_by_tile(monkeypatch):
    monkeypatch.setattr(head_layers, "TILE_BYTES", 100 * H * 4)
    monkeypatch.setattr(head_layers, "bf16_unit", lambda: 0)
    agree("ppo", torch.bfloat16)
    agree("both", torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_into_float32_matmuls(monkeypatch, name):
    """The path of a GPU, its matmul emulated: bfloat16 in, float32 logits and sums out."""

    def mm(a, b, out_dtype=None, out=None):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype in (None, torch.float32)
        product = (a.float() @ b.float()).to(out_dtype or a.dtype)
        return product if out is None else out.copy_(product)

    def addmm(total, a, b, out_dtype, out):
        assert total is out and a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return out.add_(a.float() @ b.float())

    monkeypatch.setattr(heads, "layer_of", lambda weight, bias, hidden, dtype: MixedLayer(weight, bias, dtype))
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    agree(name, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_masked_places_reach_nothing(name):
    """NaN in hidden states that do not count changes no value and no gradient."""
    torch.manual_seed(1)
    hidden, weight, bias = inputs()
    torch.manual_seed(2)
    function, clean = losses({})[name], hidden.detach().clone()
    torch.manual_seed(2)
    torch.randint(V, (B, T))
    mask = torch.rand(B, T) > 0.3
    mask[1] = False
    dirty = torch.where(mask.unsqueeze(-1), clean, torch.nan).requires_grad_()
    expected = value_and_gradients(function, [clean.requires_grad_(), weight, bias])
    got = value_and_gradients(function, [dirty, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.all(got[1][~mask] == 0)


@pytest.mark.parametrize("name", ["logprobs", "both", "ppo"])
def test_a_frozen_weight(name):
    torch.manual_seed(1)
    hidden, weight, bias = inputs(torch.float64)
    torch.manual_seed(2)
    function = losses({"memory_budget": SMALLEST})[name]
    expected = torch.autograd.grad(function(rlhf_fast, hidden, weight, bias)[0], hidden)[0]
    frozen = torch.autograd.grad(function(rlhf_fast, hidden, weight.detach(), bias.detach())[0], hidden)[0]
    torch.testing.assert_close(frozen, expected, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    ids = torch.randint(17, (2, 5))
    ids[0, 1] = -100
    tensors = [torch.randn(2, 5, 3), torch.randn(17, 3), torch.randn(17)]
    tensors = [x.double().requires_grad_() for x in tensors]

    def logprobs(h, w, b):
        return rlhf_fast.linear_token_logprobs(h, w, ids, bias=b, temperature=0.8, softcap=3.0)

    assert torch.autograd.gradcheck(logprobs, tensors)


def test_the_statistics_are_those_of_the_unfused_losses():
    hidden, weight, bias = inputs(torch.float64)
    ids, mask, old = torch.randint(V, (B, T)), torch.rand(B, T) > 0.3, torch.randn(B, T).double() - 8
    out = rlhf_fast.linear_ppo_loss(hidden, weight, ids, old, old.cos(), mask, entropy_coef=0.1, memory_budget=SMALLEST)
    logits = hidden @ weight.t()
    new = rlhf_fast.token_logprobs(logits, ids.masked_fill(~mask, -100))
    expected = rlhf_fast.ppo_loss(new.logprobs, old, old.cos(), mask, entropy=new.entropy, entropy_coef=0.1)
    for name in expected._fields:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), msg=name)
    torch.testing.assert_close(out.logprobs, new.logprobs.detach())
    torch.testing.assert_close(out.token_entropy, new.entropy.detach())
    assert not any(x.requires_grad for x in out[1:])


def test_a_pair_longer_than_a_chunk():
    """Its logits are computed twice, its numbers stay."""
    hidden, weight = torch.randn(4, 90, H).double().requires_grad_(), torch.randn(V, H).double()
    ids, refs = torch.randint(V, (4, 90)), torch.randn(2, 2).double() - 700
    results = []
    for budget in (SMALLEST, None):
        out = rlhf_fast.linear_dpo_loss(hidden, weight, ids, *refs, memory_budget=budget)
        results.append([*out, torch.autograd.grad(out.loss, hidden)[0]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_do(shape):
    hidden, weight = torch.randn(*shape, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    ids = torch.full(shape, -100)
    for value in (
        rlhf_fast.linear_token_logprobs(hidden, weight, ids).logprobs.sum(),
        rlhf_fast.linear_sft_loss(hidden, weight, ids).loss,
        rlhf_fast.linear_ppo_loss(hidden, weight, ids, torch.zeros(shape), torch.zeros(shape), ids > 0).loss,
    ):
        assert value == 0
        assert all(torch.all(g == 0) for g in torch.autograd.grad(value, [hidden, weight]))


def test_backward_twice_is_an_error():
    hidden, weight = torch.randn(5, H, requires_grad=True), torch.randn(V, H)
    loss = rlhf_fast.linear_sft_loss(hidden, weight, torch.arange(5)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after one backward"):
        loss.backward()


def test_a_tied_embedding_gets_both_gradients():
    weight, ids = torch.randn(V, H, dtype=torch.float64, requires_grad=True), torch.randint(V, (50,))
    got = torch.autograd.grad(rlhf_fast.linear_sft_loss(weight[ids].tanh(), weight, ids.roll(1)).loss, weight)[0]
    logits = weight[ids].tanh() @ weight.t()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids.roll(1)), weight)[0]
    torch.testing.assert_close(got, expected)


def test_never_holds_the_logits():
    """The largest tensor in use, gradients aside, is the buffer."""
    tokens, vocabulary, budget = 4096, 4001, 2 << 20
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    head = heads.Head(hidden, weight, None, torch.arange(tokens) % vocabulary, 1.0, 0.0, budget, (True, True, False))
    with torch.no_grad(), Watch():
        heads.loss_in_forward(head, None, lambda rows, logprobs, entropy: (torch.ones_like(logprobs), None))
    assert largest <= budget


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(5, H + 1)}, r"hidden: expected shape \[\.\.\., 24\] as weight \[1009, 24\]"),
        ({"weight": torch.randn(H)}, r"weight: expected shape \[V, H\] with V > 0, got \[24\]"),
        ({"weight": torch.zeros(V, H, dtype=torch.int64)}, "weight: expected dtype float32"),
        ({"token_ids": torch.arange(4)}, r"token_ids: expected shape \[5\] as the rows of hidden"),
        ({"token_ids": torch.arange(5) + V - 2}, r"token_ids: expected ids in \[0, 1009\) or -100, got 1009 at row 2"),
        ({"token_ids": torch.rand(5)}, "token_ids: expected dtype int64 or int32"),
        ({"bias": torch.randn(3)}, r"bias: expected shape \[1009\] as weight"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"softcap": -1.0}, "softcap: expected a finite number > 0"),
        ({"memory_budget": 0}, "memory_budget: expected a finite number > 0"),
    ],
)
def test_errors(change, message):
    arguments = {"hidden": torch.randn(5, H), "weight": torch.randn(V, H), "token_ids": torch.arange(5)} | change
    with pytest.raises(ValueError, match=message):
        rlhf_fast.linear_token_logprobs(**arguments)
    with pytest.raises(ValueError, match=message):
        rlhf_fast.linear_sft_loss(**arguments)


def test_errors_of_the_losses():
    hidden, weight, ids = torch.randn(3, 5, H), torch.randn(V, H), torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="token_ids: expected an even number of rows, chosen then rejected"):
        rlhf_fast.linear_dpo_loss(hidden, weight, ids, None, None, reference_free=True)
    with pytest.raises(ValueError, match="mask: expected a bool tensor"):
        rlhf_fast.linear_reinforce_loss(hidden, weight, ids, torch.zeros(3), ids)
    with pytest.raises(ValueError, match=r"old_logprobs: expected shape \[3, 5\] as token_ids, got \[3, 4\]"):
        rlhf_fast.linear_ppo_loss(hidden, weight, ids, torch.zeros(3, 4), torch.zeros(3), ids == 0)


def test_the_reference_is_plain_torch():
    hidden, weight, ids = torch.randn(6, H).double(), torch.randn(V, H).double(), torch.arange(6)
    expected = torch.log_softmax(hidden @ weight.t(), -1)[torch.arange(6), ids]
    torch.testing.assert_close(reference.linear_token_logprobs(hidden, weight, ids).logprobs, expected)


@pytest.mark.parametrize("trained", [True, False])
def test_float16_leaves_a_loss_scaler_what_a_mean_makes_small(trained):
    """A mean over 20,000 tokens makes gradients smaller than float16 can hold, until the scale multiplies them."""
    hidden = torch.randn(20_000, 8).half().requires_grad_()
    weight, ids = torch.randn(20, 8).half().requires_grad_(trained), torch.randint(20, (20_000,))
    scale = 2.0**13
    (rlhf_fast.linear_sft_loss(hidden, weight, ids).loss * scale).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), ids).backward()
    for x, y in zip((hidden, weight) if trained else (hidden,), exact, strict=False):
        assert x.grad.dtype == torch.float16
        assert (x.grad.double() / scale - y.grad).norm() < 2**-11 * y.grad.norm()
