"""No address of a tensor subclass goes to C++: weights that wrap other tensors decode by the slower way, and right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

import rlhf_fast
from rlhf_fast.rollout import cpu, engine
from rlhf_fast.training.tensor_bytes import TensorBytes
from tests.support.models import random_policy, random_sequences

ROOT = Path(__file__).resolve().parents[2]


class Wrapped(torch.Tensor):
    """Has the shape and dtype of another tensor and no memory of its own, as DTensor has."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, func(*args, **kwargs))


def wrap(model: torch.nn.Module, chosen: str) -> None:
    for name, parameter in list(model.named_parameters()):
        if chosen in name:
            module, _, last = name.rpartition(".")
            wrapped = torch.nn.Parameter(Wrapped(parameter.detach()), requires_grad=False)
            setattr(model.get_submodule(module), last, wrapped)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.inner if isinstance(x, Wrapped) else x


@pytest.mark.parametrize("chosen", ["", "norm", "layers.1.self_attn.q_proj", "embed_tokens", "down_proj"])
@torch.no_grad()
def test_wrapped_weights_give_the_logits_of_plain_ones(chosen):
    """All weights, or those of one kind, so that wrapped and plain tensors meet at every kernel of a step."""
    model, sequences = random_policy("llama"), random_sequences(rows=3)
    tokens, logits = torch.tensor([3, 4, 5]), []
    for _ in range(2):
        decoder = engine.decoder(model, 2)
        first = decoder.prefill(sequences.prompt_ids, sequences.prompt_mask, 1)
        logits.append([plain(first), plain(decoder.step(tokens)), plain(decoder.step(tokens + 1))])
        wrap(model, chosen)
        engine._chosen.clear()
    for expected, got in zip(*logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_kernels_of_a_step_take_plain_tensors_alone():
    x = torch.randn(2, 8)
    assert cpu.runs(x) and cpu.runs(torch.nn.Parameter(x))
    assert not cpu.runs(Wrapped(x)) and not cpu.runs(x.double())
    cache, places = torch.zeros(2, 2, 4, 8), torch.zeros(2, dtype=torch.long)
    options = dict(scaling=1.0, softcap=None, window=None)
    with pytest.raises(TypeError, match="expected plain tensors for the cache"):
        cpu.attention(Wrapped(cache), None, places, places, **options)
    with pytest.raises(TypeError, match="expected a plain tensor of heads, got Wrapped"):
        cpu.attention(cache, None, places, places, **options)(Wrapped(torch.zeros(2, 3, 8)), 0)


def test_operations_take_the_tensors_that_a_wrapper_holds():
    """Also under a counter of bytes, which runs the operators itself."""
    x, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    expected = rlhf_fast.whiten(x, mask)
    assert torch.equal(plain(rlhf_fast.whiten(Wrapped(x), mask)), expected)
    with TensorBytes():
        assert torch.equal(plain(rlhf_fast.whiten(Wrapped(x), mask)), expected)


DTENSOR = """
import os, torch, warnings
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from tests.support.models import random_policy, random_sequences
from rlhf_fast.rollout import cpu, engine
import rlhf_fast

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
share = lambda x: distribute_tensor(x, mesh, [Replicate()])
x = share(torch.randn(3, 8))
assert not cpu.runs(x) and not cpu.runs(torch.nn.Parameter(x))
try:
    rlhf_fast.whiten(x, share(torch.ones(3, 8, dtype=torch.bool)))
except Exception as error:
    print("refused by", type(error).__name__)

model, sequences = random_policy("llama").requires_grad_(False), random_sequences(rows=3)
inputs = sequences.prompt_ids, sequences.prompt_mask
expected = engine.decoder(model, 2).prefill(*inputs, 1)
engine._chosen.clear()
for name, parameter in list(model.named_parameters()):
    if "norm" in name or "proj" in name:
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, torch.nn.Parameter(share(parameter), requires_grad=False))
try:  # transformers itself cannot mix them with plain tensors: an error of torch's, not a dead process
    engine.decoder(model, 2).prefill(*inputs, 1)
except RuntimeError as error:
    print("mixed" if "mixed torch.Tensor and DTensor" in str(error) else error)
dist.destroy_process_group()
print("alive")
"""


def test_a_dtensor_kills_no_process():
    done = subprocess.run([sys.executable, "-c", DTENSOR], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:-1] == ["mixed", "alive"], done.stdout
