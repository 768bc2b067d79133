"""Attention of packed rows against float64 softmax of each row alone; the compiled kernel's promises about bits."""

import pytest
import torch

from rlhf_fast.ops.attention import packed_attention
from tests.support.oracle import error

LENGTH = 70  # slots of a row; rows end before, at and behind the edges of tiles and blocks
LENGTHS = (1, 6, 7, 48, 49, LENGTH, 2)
SHAPES = {"equal": (2, 2, 16), "grouped": (4, 2, 12), "one head of keys": (3, 1, 40), "wide": (2, 2, 128)}
# Inputs are exact; results are rounded once, but the backward pass reads the rounded result.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def slots_of(lengths=LENGTHS) -> torch.Tensor:
    return torch.cat([row * LENGTH + torch.arange(n) for row, n in enumerate(lengths)])


def heads(h, k, d, lengths=LENGTHS, dtype=torch.float32) -> list[torch.Tensor]:
    """Query, key, value as the projections leave them, [N, heads, d] seen as [heads, N, d], and a gradient."""
    N = sum(lengths)
    q, k, v = (torch.randn(N, n, d).to(dtype).transpose(0, 1).requires_grad_() for n in (h, k, k))
    return [q, k, v, torch.randn(N, h, d).to(dtype)]


def angles(d, lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [N, d] of tokens at their places in their rows, the two halves alike."""
    places = torch.cat([torch.arange(n) for n in lengths])
    turns = places[:, None] * 10.0 ** -torch.linspace(0, 3, d // 2)
    return torch.cat([turns, turns], 1).cos(), torch.cat([turns, turns], 1).sin()


def turned(x, rotary) -> torch.Tensor:
    """The point (x_i, x_{i + d / 2}) times e^(i angle)."""
    half = x.shape[-1] // 2
    points = torch.complex(x[..., :half].double(), x[..., half:].double())
    points = points * torch.complex(rotary[0][:, :half].double(), rotary[1][:, :half].double())
    return torch.cat([points.real, points.imag], -1)


def truth(query, key, value, rotary=None) -> torch.Tensor:
    """Row by row: softmax of the scores of a token and those before it."""
    rows, group = [], len(query) // len(key)
    if rotary is not None:
        query, key = turned(query, rotary), turned(key, rotary)
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(group, 0),
        value.double().repeat_interleave(group, 0),
    )
    for q, k, v in zip(*(x.split(LENGTHS, 1) for x in (query, key, value)), strict=True):
        ahead = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        rows.append((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(ahead, -torch.inf).softmax(-1) @ v)
    return torch.cat(rows, 1).transpose(0, 1)


@pytest.mark.parametrize("with_rotary", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_is_what_it_is_alone(instruction_set, shape, dtype, with_rotary):
    *inputs, grad = heads(*SHAPES[shape], dtype=dtype)
    rotary = angles(SHAPES[shape][2]) if with_rotary else None
    expected = truth(*inputs, rotary)
    gradients = torch.autograd.grad(expected, inputs, grad.double())
    out = packed_attention(*inputs, slots_of(), len(LENGTHS), LENGTH, rotary=rotary)
    tolerance = TOLERANCE[dtype] * (
        2 if instruction_set == "reference" else 1
    )  # torch's own rounds the weights as well
    assert out.dtype == dtype and error(out, expected) <= tolerance
    for mine, true in zip(torch.autograd.grad(out, inputs, grad), gradients, strict=True):
        assert error(mine, true) <= tolerance


def test_by_hand(instruction_set):
    """Scores 0 and log 3 of the second token: a quarter of the first value and three of the second."""
    query, key = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [3.0]]]).log().nan_to_num(neginf=0)
    value = torch.tensor([[[8.0], [4.0]]])
    out = packed_attention(query, key, value, torch.tensor([0, 1]), 1, 2)
    assert out.flatten().tolist() == pytest.approx([8, 5])


def test_large_scores_and_scores_of_minus_infinity(instruction_set):
    query, key, value, _ = (x.detach() for x in heads(1, 1, 8, (3,)))
    key[0, 0], query[0, 1:] = -torch.inf, query[0, 1:].abs() * 100
    out = packed_attention(query, key, value, torch.arange(3), 1, 3)
    assert error(out[1, 0], value[0, 1]) < 1e-6
    assert error(out[2, 0], ((query[0, 2] @ key[0, 1:].T) * 8**-0.5).softmax(-1) @ value[0, 1:]) < 1e-5


def test_other_strides_and_no_tokens(instruction_set):
    q, k, v, _ = heads(2, 2, 16)
    slots = slots_of()
    expected = packed_attention(q, k, v, slots, len(LENGTHS), LENGTH)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(packed_attention(*strided, slots, len(LENGTHS), LENGTH), expected)
    assert packed_attention(*(x[:, :0] for x in (q, k, v)), slots[:0], 0, 1).shape == (0, 2, 16)


def test_bits_depend_neither_on_threads_nor_on_other_rows():
    *inputs, grad = heads(4, 2, 32, (64,) * 40)
    slots, before = torch.arange(2560), torch.get_num_threads()

    def results(first_rows: int) -> list[torch.Tensor]:
        n = first_rows * 64
        out = packed_attention(*(x[:, :n] for x in inputs), slots[:n], first_rows, 64)
        return [out, *torch.autograd.grad(out, inputs, grad[:n])]

    try:
        torch.set_num_threads(1)
        alone, few = results(40), results(3)
        torch.set_num_threads(2)
        together = results(40)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(few[0], alone[0][:192])
    assert all(torch.equal(a[:, :192], b[:, :192]) for a, b in zip(few[1:], alone[1:], strict=True))


def test_nan_stays_in_its_row(instruction_set):
    q, k, v, grad = heads(2, 2, 16)
    with torch.no_grad():
        k[:, 7] = torch.nan  # in the third row
    out = packed_attention(q, k, v, slots_of(), len(LENGTHS), LENGTH)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    third = slice(7, 14)
    assert out[third].isnan().any() and not torch.cat([out[:7], out[14:]]).isnan().any()
    for x in gradients:
        assert x[:, third].isnan().any() and not torch.cat([x[:, :7], x[:, 14:]], 1).isnan().any()


x, ids = torch.zeros(4, 3, 8), torch.arange(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((x[0], x, x, ids), r"query: expected shape \[h, N, d\], got \[3, 8\]"),
        ((x.long(), x, x, ids), "query: expected dtype float32, .* got torch.int64"),
        ((x, x[:3], x[:3], ids), r"key: expected shape \[a divisor of 4, 3, 8\] .* got \[3, 3, 8\]"),
        ((x, x, x[:2], ids), r"value: expected shape .* got \[2, 3, 8\]"),
        ((x, x, x.double(), ids), "value: expected dtype torch.float32 as query, got torch.float64"),
        ((x, x, x, ids[:2]), r"slots: expected int64 of shape \[3\], got torch.int64 of shape \[2\]"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*arguments, 1, 3)


@pytest.mark.parametrize("table", [torch.zeros(3, 4), torch.zeros(2, 8), torch.zeros(3, 8).double()])
def test_tables_that_do_not_fit(table):
    with pytest.raises(ValueError, match=r"rotary: expected float32 of shape \[3, 8\], an even d, got torch.float"):
        packed_attention(x, x, x, ids, 1, 3, rotary=(torch.zeros(3, 8), table))


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="length: expected room for 3 tokens in 1 rows, got 2"):
        packed_attention(x, x, x, ids, 1, 2)
    with pytest.raises(ValueError, match=r"key: expected shape \[a divisor of 4, 3, 8\]"):
        packed_attention(x, x[:0], x[:0], ids, 1, 3)


def test_slots_that_lie_stay_within_bounds(instruction_set):
    """The places of one long row, passed off as rows of 2: nothing to be right about, but nothing is overrun."""
    q, k, v, grad = heads(2, 2, 16, (64,))
    slots = torch.full((64,), 1)
    if instruction_set != "reference":
        out = packed_attention(q, k, v, slots, 32, 2)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out, (q, k, v), grad))
