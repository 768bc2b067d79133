"""Room for a whole copy of a model in shards: the line that refuses it, in every process."""

import pytest
import torch

from rlhf_fast import ranks
from rlhf_fast.lm import room
from rlhf_fast.lm.room import INSTEAD, ROLLOUTS, NoRoom, check_room, free_bytes
from rlhf_fast.lm.sharding import whole_bytes
from tests.support.models import random_policy

CPU, GIB = torch.device("cpu"), 1 << 30


def test_too_little_room_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: (96 * GIB, "on GPU 3"))
    check_room(90 * GIB, "policy", ROLLOUTS, CPU, later=6 * GIB, instead=INSTEAD)
    check_room(0, "policy", ROLLOUTS, CPU, later=200 * GIB)  # no model in shards
    with pytest.raises(NoRoom) as error:
        check_room(90 * GIB, "policy", ROLLOUTS, CPU, later=6 * GIB + 1, instead=INSTEAD)
    assert str(error.value) == (
        "shard: expected room for the whole policy in rollouts, 90 GiB beside 6 GiB for what a step holds, got 96 GiB "
        "on GPU 3; the sampler `vllm` decodes on a server, without this copy"
    )
    with pytest.raises(NoRoom, match="^shard: expected room for the whole reward in evaluations, 128.5 GiB, got"):
        check_room(257 * GIB // 2, "reward", "evaluations", CPU)


def test_a_system_that_says_nothing_refuses_nothing(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    check_room(1 << 60, "policy", ROLLOUTS, CPU)


def test_processes_share_the_memory_of_their_machine(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:    6000 kB\n")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(ranks, "_current", None)
    assert free_bytes(CPU) == (6000 * 1024, "in memory")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_bytes(CPU) == (2000 * 1024, "in memory, shared by 3 processes")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "absent")
    assert free_bytes(CPU) is None


def test_a_model_without_shards_has_no_copy():
    assert whole_bytes(random_policy("llama")) == 0
