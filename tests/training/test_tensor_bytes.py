"""Live bytes against sizes counted by hand: plain torch, autograd, the package's own operators; real and fake."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_fast.ops import linear_reinforce_loss, linear_token_logprobs
from rlhf_fast.ops.head_layers import layer_of
from rlhf_fast.ops.heads import working_bytes
from rlhf_fast.training.meter import Meter
from rlhf_fast.training.tensor_bytes import TensorBytes

KiB = 1024


def test_bytes_live_and_peak():
    before = torch.ones(KiB)
    with TensorBytes() as counter:
        assert counter.live == 0
        a = torch.zeros(2 * KiB)  # 8 KiB
        b = a[: KiB // 2]  # a view holds nothing of its own
        assert counter.live == 8 * KiB
        a = a + 1
        assert (counter.live, counter.peak) == (16 * KiB, 16 * KiB)  # b still holds the first
        del b
        assert (counter.live, counter.take_peak()) == (8 * KiB, 16 * KiB)
        assert counter.take_peak() == 8 * KiB
        before.sum()
        assert counter.live == 12 * KiB  # what is read counts too
        before = None
        assert counter.live == 8 * KiB


def test_a_storage_that_is_resized_counts_with_its_new_size():
    """FSDP2 lets go of a weight's whole copy in this way."""
    left_out = torch.ones(KiB)
    with TensorBytes(exclude=[left_out]) as counter:
        whole = torch.ones(2 * KiB)
        whole.untyped_storage().resize_(0)
        assert (counter.live, counter.take_peak()) == (0, 8 * KiB)
        whole.untyped_storage().resize_(8 * KiB)
        left_out.untyped_storage().resize_(16 * KiB)
        assert (counter.live, counter.peak) == (8 * KiB, 8 * KiB)
        del whole
        assert counter.live == 0
    assert "resize_" not in vars(torch.UntypedStorage)


def test_excluded_storages_and_their_views_are_left_out():
    weight = torch.ones(64, 64)
    with TensorBytes(exclude=[weight]) as counter:
        out = torch.ones(4, 64) @ weight.t()
        assert counter.live == out.nbytes == 4 * 64 * 4


@pytest.mark.parametrize("mode", [torch.enable_grad, FakeTensorMode])
def test_what_autograd_saves_and_gradients(mode):
    with mode():
        weight = torch.nn.Parameter(torch.ones(KiB))
        with TensorBytes(exclude=[weight]) as counter:
            out = (weight * 2).sin().exp()  # saves sin's input and exp's result, which out is
            assert counter.live == 2 * 4 * KiB
            out.backward(torch.empty_like(out))
            del out
            assert counter.live == 4 * KiB == weight.grad.nbytes
        assert counter.peak == 6 * 4 * KiB  # both saved, upstream, exp's gradient, cos, and sin's gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [1 << 20, 8 << 20])
@pytest.mark.parametrize("trained", [True, False])
def test_working_bytes_of_the_fused_heads(dtype, budget, trained):
    B, T, H, V = 4, 60, 64, 4000
    whole = torch.randn(B, T + 3, H, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype).requires_grad_(trained)
    ids, mask = torch.randint(0, V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    layer = layer_of(weight, None, dtype, torch.float32)
    expected = working_bytes(B * T, B * T, dtype, layer, budget, (True, trained))
    hidden, advantages = whole[:, 3:], torch.randn(B)
    with TensorBytes(exclude=[whole, weight, ids, mask, advantages]) as counter:
        linear_reinforce_loss(hidden, weight, ids, advantages, mask, memory_budget=budget)
    assert counter.peak == pytest.approx(expected, rel=0.02)
    expected = working_bytes(B * T, B * T, dtype, layer, budget, (False, False))
    with torch.no_grad(), TensorBytes(exclude=[whole, weight, ids]) as counter:
        linear_token_logprobs(hidden, weight, ids, memory_budget=budget)
    assert counter.peak == pytest.approx(expected, rel=0.02)


def test_a_meter_inside_reports_tensors():
    meter = Meter("cpu", memory_every=100)
    with TensorBytes():
        for _ in range(4):  # in every step, however rarely the resident set would be read
            with meter.phase("small"):
                torch.zeros(KiB)
            with meter.phase("large"):
                torch.zeros(5 * KiB)
            step = meter.step()
            assert (step["memory/small"], step["memory/large"]) == (4 * KiB, 20 * KiB)
    assert TensorBytes.active is None
    with meter.phase("small"):
        pass
    assert "memory/small" not in meter.step()
