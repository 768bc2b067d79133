"""Offloading without a GPU: what is moved when, with copies on the CPU in the device's place."""

import pytest
import torch
from tiny_models import random_policy, random_sequences

from rlhf_fast import offload
from rlhf_fast.models import response_logits


@pytest.fixture
def uploads(monkeypatch):
    """Bytes moved to the device; the device is the same memory, but the tensors there are others."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)

    def upload(tensor, device):
        assert device == torch.device("cuda:0")
        moved.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(offload, "_upload", upload)
    return moved


def test_weights_come_for_the_visit_and_go(uploads):
    model, sequences = random_policy("llama").requires_grad_(False), random_sequences()
    expected = response_logits(model, sequences)
    head = model.get_output_embeddings().weight  # taken before, as the fused losses do
    tensors = [*model.parameters(), *model.buffers()]
    homes = [tensor.data_ptr() for tensor in tensors]
    assert offload.place(model, torch.device("cuda:0"), True) is model
    assert uploads == []
    for visit in (1, 2):
        with pytest.raises(RuntimeError, match="in between"), offload.visiting(model):
            assert not {tensor.data_ptr() for tensor in tensors} & set(homes)
            assert head is model.get_output_embeddings().weight
            assert torch.equal(response_logits(model, sequences), expected)
            raise RuntimeError("in between")
        assert [tensor.data_ptr() for tensor in tensors] == homes
        assert sum(uploads) == visit * sum(tensor.nbytes for tensor in tensors)


def test_nothing_moves_on_a_cpu_or_without_offloading(uploads):
    model = random_policy("llama")
    for place in (None, False, True):
        if place is not None:
            offload.place(model, torch.device("cpu"), place)
        with offload.visiting(model), offload.visiting(None):
            pass
    assert uploads == []
