"""Sums as Python's floats give them, one wait for the device, and no step where a norm is not finite."""

import math

import pytest
import torch
from torch import nn

from rlhf_fast.config import SFTConfig
from rlhf_fast.training.learner import Learner, take_step
from rlhf_fast.training.tally import Tally


def test_sums_are_those_of_pythons_floats():
    tally, expected, generator = Tally(), {"a": 0.0, "b": 0.0}, torch.Generator().manual_seed(0)
    for _ in range(50):
        values = torch.randn(2, generator=generator)
        share = torch.rand((), generator=generator)
        tally.add("a", values[0])
        tally.add("b", share.double() * values[1])
        expected["a"] += values[0].item()
        expected["b"] += share.item() * values[1].item()
    assert tally.read() == expected


def test_numbers_of_python_stay_what_they_are():
    tally = Tally()
    for value in (3, 4):
        tally.add("tokens", value)
        tally.add("loss", value / 2)
    numbers = tally.read()
    assert numbers == {"tokens": 7, "loss": 3.5} and isinstance(numbers["tokens"], int)
    assert Tally().read() == {}


def test_the_largest_value_and_a_nan_stay():
    tally = Tally()
    for value in (torch.tensor(0.25), 0.5, torch.tensor(0.125)):
        tally.raise_to("drift", value)
    assert tally.read() == {"drift": 0.5}
    tally.raise_to("drift", torch.tensor(math.nan))
    tally.raise_to("drift", torch.tensor(9.0))
    assert math.isnan(tally.read()["drift"])


def test_it_waits_for_the_device_once(monkeypatch):
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: waits.append(1))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: waits.append(1))
    tally = Tally()
    for n in range(5):
        tally.add("loss", torch.tensor(float(n)))
        tally.raise_to("drift", torch.tensor(float(n)))
    assert waits == [] and tally.read() == {"loss": 10.0, "drift": 4.0} and len(waits) == 1


def learner(gradient: float) -> Learner:
    config = SFTConfig(model="m", output_dir="o", train_data="d", learning_rate=0.1, lr_schedule="constant")
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.full_like(model.weight, gradient)
    return Learner(model, config, 1)


def test_learners_step_together_or_not_at_all():
    tally = Tally()
    tally.add("loss", torch.tensor(2.0))
    both = {"grad_norm": learner(3.0), "grad_norm/value": learner(4.0)}
    assert take_step(tally, both) == {"loss": 2.0, "grad_norm": 3.0, "grad_norm/value": 4.0}
    assert all(each.model.weight.item() == pytest.approx(-0.1) for each in both.values())
    for bad in (math.nan, math.inf):
        both = {"grad_norm": learner(3.0), "grad_norm/value": learner(bad)}
        with pytest.raises(RuntimeError, match=f"gradient norm is {bad}; the weights were left as they are"):
            take_step(Tally(), both)
        assert all(each.model.weight.item() == 0 for each in both.values())


def test_a_check_that_fails_leaves_the_weights():
    def check(numbers):
        raise RuntimeError(f"drift {numbers['drift']}")

    tally, mine = Tally(), learner(3.0)
    tally.raise_to("drift", torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="drift 0.5"):
        take_step(tally, {"grad_norm": mine}, check)
    assert mine.model.weight.item() == 0
