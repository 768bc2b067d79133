"""Half-precision logits on every instruction set: far from the shift, and around the lengths of the loop."""

import pytest
import torch

from rlhf_fast import token_logprobs
from tests.support.oracle import VALUE_TOLERANCE, error, token_truth

HALF = [torch.bfloat16, torch.float16]


def check(logits, ids, **options):
    out = token_logprobs(logits, ids, **options)
    zero = torch.zeros(ids.shape)
    logprobs, entropy, _ = token_truth(logits, ids, zero, zero, **options)
    assert error(out.logprobs, logprobs) <= VALUE_TOLERANCE[logits.dtype]
    assert error(out.entropy, entropy) <= VALUE_TOLERANCE[logits.dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("V", [16, 32, 48, 1023, 1024, 1040, 2049, 40_000])
def test_every_length(instruction_set, dtype, V):
    """Whole chunks, a line of 16, the last few; a target in each of them."""
    ids = torch.tensor([0, V // 2, V - 1])
    check((3 * torch.randn(3, V)).to(dtype), ids)
    check((3 * torch.randn(3, V)).to(dtype), ids, temperature=0.3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("low", [-80.0, -86.5, -87.5, -88.5, -95.0, -200.0, -3000.0, -65504.0, -90_854.0, -2.9e6])
def test_logits_far_below(instruction_set, dtype, low):
    """Weights around the smallest normal number, and below it: they are small or 0, never another number."""
    logits = torch.randn(2, 3000).to(dtype)
    logits[:, 300:] = max(low, torch.finfo(dtype).min)
    logits[:, 2000] = 1.5
    check(logits, torch.tensor([5, 2500]))
    check(logits, torch.tensor([5, 2999]), temperature=1.7)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("high", [4.0, 40.0, 87.0, 89.0, 180.0, 1000.0, 30_000.0])
def test_logits_far_above_the_first(instruction_set, dtype, high):
    """The shift moves where a later logit is larger than it lets the powers be."""
    logits = torch.randn(2, 3000).to(dtype)
    logits[:, [1500, 1507, 2999]] = high
    check(logits, torch.tensor([1507, 2]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_junk_in_the_middle(instruction_set, dtype, junk):
    logits = torch.randn(2, 4096).to(dtype)
    logits[0, 2000] = junk
    out = token_logprobs(logits, torch.tensor([7, 7]))
    if junk == -torch.inf:
        check(logits, torch.tensor([7, 7]))
    else:
        assert out.logprobs[0].isnan() and out.entropy[0].isnan()
    assert torch.isfinite(out.logprobs[1]) and torch.isfinite(out.entropy[1])
