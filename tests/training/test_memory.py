"""Phase peaks against allocations of known size, times against a fake clock, static bytes against arithmetic."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_fast.training import memory
from rlhf_fast.training import meter as meter_module
from rlhf_fast.training.memory import static_bytes
from rlhf_fast.training.meter import Meter

MiB = 2**20


def touch(mib: int) -> None:
    """Allocates and frees `mib` MiB, every page written."""
    np.ones(mib * MiB, dtype=np.uint8)


def touch_small(mib: int) -> None:
    """The same in blocks of 96 KiB, which the C allocator takes from its heap and keeps after they are freed."""
    blocks = [np.ones(96 * 1024, dtype=np.uint8) for _ in range(mib * MiB // (96 * 1024) + 1)]
    touch_small.top_of_heap = blocks.pop()  # stays, else freeing the last block would shrink the heap


@pytest.mark.parametrize("allocate", [touch, touch_small])
def test_peak_is_of_the_phase(allocate):
    meter = Meter("cpu")
    with meter.phase("before"):
        pass
    with meter.phase("large"):
        allocate(200)
    with meter.phase("after"):
        pass
    step = meter.step()
    large = step["memory/large"]
    assert 190 * MiB < large - step["memory/before"] < 230 * MiB
    assert 190 * MiB < large - step["memory/after"] < 230 * MiB


def test_sampling_fallback_sees_the_phase(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    meter = Meter("cpu")
    with meter.phase("large"):
        block = np.ones(200 * MiB, dtype=np.uint8)
        time.sleep(0.3)
        del block
    with meter.phase("small"):
        time.sleep(0.01)
    step = meter.step()
    assert 190 * MiB < step["memory/large"] - step["memory/small"] < 230 * MiB


def test_current_bytes_follows_a_block():
    before = memory.current_bytes()
    block = np.ones(100 * MiB, dtype=np.uint8)
    assert 95 * MiB < memory.current_bytes() - before < 110 * MiB
    assert memory.peak_bytes() >= before + 95 * MiB
    del block


class Clock:
    """perf_counter that only moves when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module.time, "perf_counter", clock)
    return clock


def test_times_add_and_peaks_take_the_maximum(clock):
    meter = Meter("cpu")
    clock.sleep(7)  # before the first phase: loading models, say
    with meter.phase("rollout"):
        clock.sleep(1)
        touch(200)
    with meter.phase("rollout"):
        clock.sleep(2)
    with meter.phase("policy"):
        clock.sleep(4)
    clock.sleep(8)
    step = meter.step()
    assert step["memory/rollout"] - step["memory/policy"] > 190 * MiB
    assert (step["time/rollout"], step["time/policy"], step["time/step"]) == (3, 4, 15)
    clock.sleep(0.5)
    assert meter.step() == {"time/step": 0.5}  # nothing else is carried over


def test_summary_over_steps(clock):
    meter = Meter("cpu", memory_every=1)
    for mib, seconds in ((100, 1), (300, 2), (1, 6)):
        with meter.phase("rollout"):
            touch(mib)
        with meter.phase("policy"):
            clock.sleep(seconds)
        clock.sleep(0.5)
        meter.step()
    summary = meter.summary()
    rollout, policy = summary.pop("rollout"), summary.pop("policy")
    assert summary == {"steps": 3, "step_seconds": 10.5, "step_seconds_median": 2.5}
    assert rollout.pop("peak_bytes") - policy.pop("peak_bytes") > 290 * MiB
    assert policy == {"seconds": 9, "seconds_median": 2, "count": 3}
    assert rollout == {"seconds": 0, "seconds_median": 0, "count": 3}


def test_summary_of_a_continued_run_and_without_what_came_before_it(clock):
    meters = [Meter("cpu"), Meter("cpu"), Meter("cpu")]
    for meter in meters[:2]:
        with meter.phase("evaluation"):
            clock.sleep(50)
        assert meter.step(counted=False)["time/evaluation"] == 50
    whole, *parts = meters
    for mib, seconds in ((1, 1), (300, 2), (1, 6)):
        for meter in (whole, parts[0]):
            with meter.phase("policy"):
                touch(mib)
                clock.sleep(seconds)
            meter.step()
        if mib == 300:
            parts[1].load_state_dict(parts.pop(0).state_dict())
    expected, continued = whole.summary(), parts[0].summary()
    assert expected["steps"] == 3 and expected["evaluation"]["count"] == 1
    assert expected["evaluation"]["seconds"] == 50 and expected["policy"]["seconds"] == 9
    for summary in (expected, continued):
        for name in ("step_seconds", "step_seconds_median"):
            del summary[name]  # they share a clock
    assert continued.pop("policy")["peak_bytes"] == pytest.approx(expected.pop("policy")["peak_bytes"], abs=20 * MiB)
    assert continued.pop("evaluation").keys() == expected.pop("evaluation").keys()
    assert continued == expected


def test_memory_is_measured_in_some_steps_only():
    meter = Meter("cpu", memory_every=4)
    measured = []
    for step in range(10):
        with meter.phase("policy"):
            pass
        if "memory/policy" in meter.step():
            measured.append(step)
    assert measured == [0, 1, 4, 8]
    assert meter.summary()["policy"]["count"] == 10
    with pytest.raises(ValueError, match="memory_every: expected at least 1, got 0"):
        Meter("cpu", memory_every=0)


def test_phases_do_not_nest_and_an_error_inside_leaves_the_meter_usable():
    meter = Meter("cpu")
    with (
        pytest.raises(ValueError, match="must not nest, got 'inner' inside 'outer'"),
        meter.phase("outer"),
        meter.phase("inner"),
    ):
        pass
    with meter.phase("next"):
        pass
    assert set(meter.step()) == {"time/next", "memory/next", "time/step"}


def test_static_bytes_of_adamw():
    model = nn.Linear(10, 7)  # 77 parameters
    optimizer = torch.optim.AdamW(model.parameters())
    assert static_bytes({"policy": model}, {"policy": optimizer}) == {
        "policy": {"weights": 77 * 4, "gradients": 0, "optimizer": 0}
    }
    model(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    assert static_bytes({"policy": model}, {"policy": optimizer}) == {
        "policy": {"weights": 77 * 4, "gradients": 77 * 4, "optimizer": 77 * 8 + 2 * 4}  # + one fp32 step per tensor
    }
    optimizer.zero_grad()
    assert static_bytes({"policy": model})["policy"] == {"weights": 77 * 4, "gradients": 0, "optimizer": 0}


def test_static_bytes_counts_shared_tensors_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    policy = Tied()
    value = nn.Sequential(policy.embed, nn.Linear(5, 1).to(torch.bfloat16))
    assert static_bytes({"policy": policy, "value": value}) == {
        "policy": {"weights": 55 * 4 + 3 * 8, "gradients": 0, "optimizer": 0},
        "value": {"weights": 6 * 2, "gradients": 0, "optimizer": 0},
    }
