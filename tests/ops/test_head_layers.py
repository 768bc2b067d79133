"""The CPU's bfloat16 matmuls: their bound against float64, their bits, their shapes, and what runs without a unit."""

import re
from pathlib import Path

import pytest
import torch

import rlhf_fast
from rlhf_fast import _cpu
from rlhf_fast.ops import head_layers
from rlhf_fast.ops.head_layers import Layer, UnitLayer, layer_of
from rlhf_fast.ops.heads import FEWEST_ROWS, chunk_rows

UNITS = _cpu.bf16_units()
needs_a_unit = pytest.mark.skipif(not UNITS, reason="this CPU has no unit for bfloat16")


def product(unit, left, right, sums, add=False, threads=2):
    done = _cpu.matmul_bf16(
        unit, *sums.shape, len(right), left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(),
        sums.data_ptr(), sums.stride(0), add, threads,
    )  # fmt: skip
    assert done
    return sums


def factors(M, N, K, transposed):
    left = torch.randn(K, M).bfloat16().t() if transposed[0] else torch.randn(M, K).bfloat16()
    return left, torch.randn(N, K).bfloat16().t() if transposed[1] else torch.randn(K, N).bfloat16()


@needs_a_unit
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("transposed", [(False, True), (False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 31, 65), (150, 300, 700), (64, 2500, 40), (3, 5, 0)])
def test_a_sum_errs_by_its_roundings(unit, transposed, shape):
    """Products of bfloat16 are exact in float32. A sum of K rounds K times, each by 2^-24 of the sum of |x y|."""
    M, N, K = shape
    left, right = factors(M, N, K, transposed)
    before = torch.randn(M, N + 3)[:, :N]  # rows apart
    truth, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    bound = (K + 1) * 2**-24 * (size + before.abs()) + 1e-30
    assert torch.all((product(unit, left, right, torch.full((M, N), torch.nan)) - truth).abs() <= bound)
    sums = torch.empty(M, N + 3)[:, :N].copy_(before)
    assert torch.all((product(unit, left, right, sums, add=True) - before.double() - truth).abs() <= bound)


@needs_a_unit
@pytest.mark.parametrize("unit", UNITS)
def test_bits_do_not_depend_on_the_threads(unit):
    for shape in ((700, 2304, 600), (900, 128, 4500), (2500, 96, 300)):
        left, right = factors(*shape, (False, True))
        results = [product(unit, left, right, torch.empty(shape[:2]), threads=threads) for threads in (1, 2, 5)]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_a_unit
@pytest.mark.parametrize("unit", UNITS)
def test_infinity_and_nan_stay_in_their_row(unit):
    left, right = factors(70, 40, 90, (False, True))
    left[3, 5], left[50, 89] = torch.inf, torch.nan
    sums = product(unit, left, right, torch.empty(70, 40))
    assert torch.all(sums[3].abs() == torch.inf) and torch.all(sums[50].isnan())
    assert torch.isfinite(sums).sum() == 68 * 40


@pytest.mark.parametrize("isa", _cpu.isas())
def test_units_belong_to_avx512(isa):
    widest = _cpu.isa()
    try:
        _cpu.set_isa(isa)
        assert (isa == "avx512") or (_cpu.bf16_units() == [] and _cpu.bf16_unit() == 0)
        assert _cpu.bf16_unit() in (0, *_cpu.bf16_units())
        x = torch.ones(2, 2).bfloat16()
        if isa != "avx512":
            assert not _cpu.matmul_bf16(1, 2, 2, 2, *2 * (x.data_ptr(), 2, 1), x.data_ptr(), 2, False, 1)
    finally:
        _cpu.set_isa(widest)


def loss(hidden, weight, bias, ids, budget=1):
    """Of log-probs and entropies in chunks of 32 tokens, with its gradients."""
    tensors = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    out = rlhf_fast.linear_token_logprobs(*tensors[:2], ids, bias=tensors[2], memory_budget=budget)
    value = (out.logprobs * torch.linspace(-1, 1, len(ids))).sum() + out.entropy.sum() / 9
    return [value.detach(), out.logprobs.detach(), *torch.autograd.grad(value, tensors)]


def head(V=40_000, H=24, n=40):
    """A vocabulary of two of the segments that threads share a row of logits in."""
    hidden, weight, bias = torch.randn(n, H).bfloat16(), torch.randn(V, H).bfloat16() / 2, torch.randn(V).bfloat16()
    ids = torch.randint(V, (n,))
    ids[3] = -100
    return hidden, weight, bias, ids


@pytest.mark.parametrize("unit", [0, *UNITS])
def test_a_head_without_its_unit_has_the_same_numbers(unit, monkeypatch):
    """The fallback, and each unit: log-probs to 1e-5, gradients to the rounding of the logits' gradient to bfloat16."""
    inputs = head()
    exact = loss(*(x.double() for x in inputs[:3]), inputs[3])
    monkeypatch.setattr(head_layers, "bf16_unit", lambda: unit)
    assert type(layer_of(inputs[1], None, torch.bfloat16, torch.float32)) is (UnitLayer if unit else Layer)
    got = loss(*inputs)
    assert (got[1] - exact[1]).abs().max() < 1e-5
    assert torch.all(got[2][3] == 0)
    for mine, true in zip(got[2:], exact[2:], strict=True):
        assert mine.dtype == torch.bfloat16 and (mine - true).norm() < 2**-8 * true.norm()


@needs_a_unit
def test_bits_of_a_head_do_not_depend_on_the_threads(monkeypatch):
    inputs, before, results = head(n=80), torch.get_num_threads(), []
    monkeypatch.setattr(head_layers, "bf16_unit", lambda: UNITS[-1])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(loss(*inputs, budget=1 << 30))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_a_unit
def test_a_transposed_weight(monkeypatch):
    monkeypatch.setattr(head_layers, "bf16_unit", lambda: UNITS[-1])
    hidden, weight, bias, ids = head(V=500)
    expected = loss(hidden, weight, bias, ids)
    hidden, bias = hidden.requires_grad_(), bias.requires_grad_()
    for other in (weight.t().contiguous().t(), torch.stack([weight, weight], 2)[..., 0]):
        out = rlhf_fast.linear_token_logprobs(hidden, other, ids, bias=bias)
        assert torch.equal(out.logprobs, expected[1])


def test_other_dtypes_and_back_ends_take_no_unit(monkeypatch):
    monkeypatch.setattr(_cpu, "bf16_unit", lambda: 2)
    weight = torch.empty(5, 3, dtype=torch.bfloat16)
    kinds = {torch.bfloat16: UnitLayer, torch.float16: Layer, torch.float32: Layer}
    for dtype, kind in kinds.items():
        assert type(layer_of(weight, None, dtype, torch.float32)) is kind
    assert type(layer_of(weight, None, torch.bfloat16, torch.float64)) is Layer
    with rlhf_fast.ops.backend("triton"):
        assert type(layer_of(weight, None, torch.bfloat16, torch.float32)) is Layer


@needs_a_unit
def test_the_budget_counts_the_packed_factor():
    source = (Path(__file__).parents[2] / "csrc/cpu/matmul_bf16.cpp").read_text()
    assert 2 * eval(re.search(r"kPacked = ([^;]+);", source)[1]) == head_layers.PACKED_BYTES  # numbers of two bytes
    layer = UnitLayer(torch.zeros(1000, 8).bfloat16(), None, torch.float32, UNITS[0])
    rows = 3 * FEWEST_ROWS
    assert chunk_rows(10 * rows, [layer], head_layers.PACKED_BYTES + rows * layer.row_bytes) == rows
    assert chunk_rows(10 * rows, [layer], rows * layer.row_bytes) == FEWEST_ROWS
