"""Offloading without a GPU: what is moved when, with copies on the CPU in the device's place."""

import pytest
import torch

from rlhf_fast.config import PPOConfig, RewardConfig
from rlhf_fast.lm import offload
from rlhf_fast.lm.passes import response_logits
from rlhf_fast.stages import ppo, reward
from tests.support.models import random_policy, random_sequences
from tests.support.stages import distance, numbers, stage_config, weights


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


def test_a_run_uses_the_weights_within_visits_only(files, tiny_model, tmp_path, monkeypatch):
    """Between visits every weight is NaN here; the numbers are those of a run that offloads nothing."""
    reward.train(stage_config(RewardConfig, files, tiny_model, tmp_path / "reward"))
    options = {"reward": str(tmp_path / "reward"), "value_model": tiny_model, "offload": True}
    options |= {"eval_steps": 2, "eval_data": files["prompts"]}
    ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / "ordinary", **options))

    device_side, placed = {}, []

    def place(model, device, offloaded):
        assert offloaded
        model.offloaded = (device, [])
        for tensor in (*model.parameters(), *model.buffers()):
            home = torch.full_like(tensor.data, float("nan"))
            device_side[home.data_ptr()], tensor.data = tensor.data, home
            model.offloaded[1].append((tensor, home))
        placed.append(model)
        return model

    monkeypatch.setattr("rlhf_fast.stages.online.place", place)
    monkeypatch.setattr("rlhf_fast.training.rewards.place", place)
    monkeypatch.setattr(offload, "_upload", lambda home, device: device_side[home.data_ptr()])
    ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / "offloaded", **options))
    assert len(placed) == 2  # the reference and the reward model
    assert numbers(tmp_path / "offloaded") == numbers(tmp_path / "ordinary")
    assert distance(weights(tmp_path / "offloaded"), weights(tmp_path / "ordinary")) == 0
