"""The compiled attention of a decode step against float64, on every instruction set of this CPU."""

import math

import pytest
import torch

from rlhf_fast.ops import dispatch
from rlhf_fast.ops.dispatch import _cpu
from rlhf_fast.rollout import cpu


@pytest.fixture(params=_cpu.isas() if dispatch.COMPILED else ())
def isa(request):
    widest = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(widest)


def expected(heads, cache, tables, positions, starts, slot, *, scaling, softcap, window):
    """[n, Q D] float64, and the cache's new key and value [n, 2 K, D]."""
    n, D, K = len(heads), cache.shape[3], cache.shape[1] // 2
    q, k, v = heads.double().split([heads.shape[1] - 2 * K, K, K], dim=1)
    if tables is not None:
        cos, sin = (table.double()[positions][:, None] for table in tables)
        q, k = (x * cos + x.roll(D // 2, dims=-1) * sin for x in (q, k))
    new = torch.cat([k, v], dim=1)
    full = cache.double().clone()
    full[:, :, slot] = new.to(cache.dtype)
    keys, values = (x.repeat_interleave(q.shape[1] // K, dim=1) for x in full.split(K, dim=1))
    scores = torch.einsum("nqd,nqsd->nqs", q, keys) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    place = torch.arange(cache.shape[2])
    seen = (place >= starts[:, None]) & (place <= slot) & (place > slot - (window or len(place)))
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(dim=-1)
    return torch.einsum("nqs,nqsd->nqd", weights, values).reshape(n, -1), new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [2, 8, 24, 64, 80, 128, 200])
@pytest.mark.parametrize(("rotary", "softcap", "window"), [(True, None, None), (False, 5.0, 6), (True, 3.0, None)])
def test_attention_of_a_new_token(isa, dtype, D, rotary, softcap, window):
    """Rows of 1 to 23 slots: fewer than the kernel takes at once, multiples, and remainders."""
    generator = torch.Generator().manual_seed(D)
    n, K, Q, S = 9, 2, 6, 25
    cache = torch.randn(n, 2 * K, S, D, generator=generator).to(dtype)
    heads = torch.randn(n, Q + 2 * K, D, generator=generator).to(dtype)
    tables = tuple(torch.randn(40, D, generator=generator) for _ in range(2)) if rotary else None
    positions, starts, slot = torch.arange(n) + 3, torch.tensor([0, 1, 4, 7, 8, 15, 19, 21, 22]), 22
    options = {"scaling": D**-0.5, "softcap": softcap, "window": window}
    truth, new = expected(heads, cache, tables, positions, starts, slot, **options)
    before = cache.clone()
    out = cpu.attention(cache, tables, positions, starts, **options)(heads, slot)
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.double(), truth, rtol=2 * ulp, atol=2 * ulp)
    torch.testing.assert_close(cache[:, :, slot].double(), new, rtol=ulp, atol=ulp)
    cache[:, :, slot] = before[:, :, slot]
    assert torch.equal(cache, before)
