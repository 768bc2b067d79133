"""linear_token_kl against float64 formulas: chunks, tiles, frozen and shared weights, the reference a constant."""

import pytest
import torch

import rlhf_fast
from rlhf_fast import linear_token_kl
from rlhf_fast.ops import head_layers, heads
from tests.support.oracle import VALUE_TOLERANCE

DTYPES = list(VALUE_TOLERANCE)
B, T, H, Hr, V = 3, 37, 24, 17, 1009
SMALLEST = 1  # chunks of `heads.FEWEST_ROWS` rows
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of values and of gradients relative to their largest; half types: their inputs' and gradients' own rounding."""


def inputs(dtype, bias=True, rows=(B, T)):
    """hidden, weight, bias, then the reference's."""
    torch.manual_seed(1)
    shapes = [(*rows, H), (V, H), (V,)]
    ref_shapes = [(*rows, Hr), (V, Hr), (V,)]
    tensors = [torch.randn(shape).to(dtype) / (1 + (len(shape) == 2)) for shape in shapes + ref_shapes]
    policy = [x.requires_grad_() for x in tensors[: 3 if bias else 2]]
    return policy, tensors[3 : 6 if bias else 5]


def results(policy, ref, ids=None, **options):
    """The four outputs, then the gradients of a sum of the three differentiable ones."""
    torch.manual_seed(2)
    if ids is None:
        ids = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    upstream = torch.randn(3, *ids.shape).double()
    (hidden, weight, *bias), (ref_hidden, ref_weight, *ref_bias) = policy, ref
    biases = dict(zip(("bias", "ref_bias"), (*bias, *ref_bias), strict=False))
    out = linear_token_kl(hidden, weight, ref_hidden, ref_weight, ids, **biases, **options)
    loss = sum((x * g).sum() for x, g in zip(out[:3], upstream, strict=True))
    return [*out, *torch.autograd.grad(loss, [x for x in policy if x.requires_grad])]


def agree(dtype, bias=True, memory_budget=SMALLEST, **options):
    policy, ref = inputs(dtype, bias)
    got = results(policy, ref, memory_budget=memory_budget, **options)
    doubles = [[x.detach().double().requires_grad_(x.requires_grad) for x in side] for side in (policy, ref)]
    with rlhf_fast.ops.backend("reference"):
        true = results(*doubles, **options)
    for mine, exact in zip(got, true, strict=True):
        assert mine.shape == exact.shape
        distance = (mine.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
        assert distance <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_float64(dtype, bias):
    agree(dtype, bias)


@pytest.mark.parametrize("memory_budget", [2 * 40 * V * 8, 2 * 100 * V * 8, None])  # chunks of 40 tokens, of 100
def test_chunks_change_nothing(memory_budget):
    agree(torch.float64, memory_budget=memory_budget)


def test_temperature_and_softcap():
    agree(torch.float64, temperature=0.6, softcap=4.0)
    agree(torch.float32, temperature=1.7)


def test_half_weights_are_widened_tile_by_tile(monkeypatch):
    monkeypatch.setattr(head_layers, "TILE_BYTES", 100 * H * 4)
    monkeypatch.setattr(head_layers, "bf16_unit", lambda: 0)
    agree(torch.bfloat16)


def test_the_same_policy():
    """A policy that has not moved yet is at distance 0."""
    policy, _ = inputs(torch.float32)
    out = results(policy, [x.detach() for x in policy], memory_budget=SMALLEST)
    assert torch.all(out[2] == 0) and torch.equal(out[0], out[3])


def test_masked_places_reach_nothing():
    policy, ref = inputs(torch.float32)
    ids = torch.randint(V, (B, T))
    mask = torch.rand(B, T) > 0.3
    mask[1] = False
    ids.masked_fill_(~mask, -100)
    expected = results(policy, ref, ids)
    dirty = [torch.where(mask.unsqueeze(-1), side[0].detach(), torch.nan) for side in (policy, ref)]
    got = results([dirty[0].requires_grad_(), *policy[1:]], [dirty[1], *ref[1:]], ids)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.all(x[~mask] == 0) for x in got[:5])


def test_a_frozen_weight():
    policy, ref = inputs(torch.float64)
    expected = results(policy, ref)
    frozen = results([policy[0], *(x.detach() for x in policy[1:])], ref)
    assert torch.equal(frozen[4], expected[4]) and len(frozen) == 5


def test_no_gradient_reaches_the_reference(kernels):
    policy, ref = inputs(torch.float32, rows=(2, 3))
    ref = [x.requires_grad_() for x in ref]
    out = linear_token_kl(*policy[:2], *ref[:2], torch.zeros(2, 3).long(), ref_bias=ref[2])
    out.kl.sum().backward()
    assert not out.ref_logprobs.requires_grad and all(x.grad is None for x in ref)
    assert policy[1].grad.abs().max() > 0


def test_dtypes_of_the_two_layers_differ(kernels):
    policy, ref = inputs(torch.float32, rows=(2, 3))
    ids = torch.tensor([[5, -100, 7], [V - 1, 0, 300]])
    mixed = results(policy, [ref[0].bfloat16(), ref[1].double(), ref[2]], ids)
    assert all(x.dtype == torch.float64 for x in mixed[:4]) and all(x.dtype == torch.float32 for x in mixed[4:])
    doubles = [[x.detach().double().requires_grad_(x.requires_grad) for x in side] for side in (policy, ref)]
    doubles[1][0] = ref[0].bfloat16().double()
    for mine, exact in zip(mixed, results(*doubles, ids), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-7)


def test_gradcheck():
    ids = torch.randint(17, (2, 5))
    ids[0, 1] = -100
    tensors = [torch.randn(shape).double().requires_grad_() for shape in [(2, 5, 3), (17, 3), (17,)]]
    ref = [torch.randn(2, 5, 4).double(), torch.randn(17, 4).double()]

    def differentiable(h, w, b):
        return linear_token_kl(h, w, *ref, ids, bias=b, temperature=0.8, softcap=3.0)[:3]

    assert torch.autograd.gradcheck(differentiable, tensors)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_nothing_to_do(kernels, shape):
    hidden, weight = (
        torch.randn(*shape, H, requires_grad=True),
        torch.randn(V, H, requires_grad=True),
    )
    out = linear_token_kl(hidden, weight, hidden.detach(), weight.detach(), torch.full(shape, -100))
    assert all(x.shape == shape and torch.all(x == 0) for x in out)
    assert all(torch.all(g == 0) for g in torch.autograd.grad(out.kl.sum(), [hidden, weight]))


def test_never_holds_the_logits():
    """The buffers of both layers fit into the budget."""
    tokens, vocabulary, budget = 4096, 4001, 4 << 20
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocabulary, 8)
    layer = head_layers.Layer(weight.cos(), None, torch.float32)
    head = heads.Head(hidden, weight, None, torch.arange(tokens) % vocabulary, 1.0, 0.0, budget, beside=layer)
    buffers = [x.buffer.untyped_storage().nbytes() for x in (head.layer, layer)]
    assert buffers[0] == buffers[1] and budget / 2 < sum(buffers) <= budget


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(5, H + 1)}, r"hidden: expected shape \[\.\.\., 24\] as weight \[1009, 24\]"),
        (
            {"ref_hidden": torch.randn(5, H)},
            r"ref_hidden: expected shape \[\.\.\., 17\] as ref_weight \[1009, 17\]",
        ),
        ({"ref_hidden": torch.randn(4, Hr)}, r"ref_hidden: expected shape \[5, 17\], a row for each row of hidden"),
        ({"ref_weight": torch.randn(9, Hr)}, r"ref_weight: expected shape \[1009, Hr\], the vocabulary of weight"),
        ({"ref_weight": torch.randn(V, Hr).long()}, "ref_weight: expected dtype float32"),
        ({"ref_bias": torch.randn(3)}, r"ref_bias: expected shape \[1009\] as ref_weight \[1009, 17\]"),
        ({"ref_hidden": torch.randn(5, Hr, device="meta")}, "ref_weight: expected device meta as ref_hidden"),
        (
            {"token_ids": torch.arange(5) + V - 2},
            r"token_ids: expected ids in \[0, 1009\) or -100, got 1009 at row 2",
        ),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"memory_budget": 0}, "memory_budget: expected a finite number > 0"),
    ],
)
def test_errors(kernels, change, message):
    valid = dict(hidden=torch.randn(5, H), weight=torch.randn(V, H), token_ids=torch.arange(5))
    valid |= dict(ref_hidden=torch.randn(5, Hr), ref_weight=torch.randn(V, Hr))
    with pytest.raises(ValueError, match=message):
        linear_token_kl(**(valid | change))
