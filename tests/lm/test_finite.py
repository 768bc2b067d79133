"""Weights that are NaN or infinite are found, by name."""

import pytest
import torch
from torch import nn

from rlhf_fast.lm.finite import not_finite


def layers(dtype):
    model = nn.Sequential(nn.Linear(7, 300), nn.Linear(300, 2)).to(dtype)
    model.register_buffer("mask", torch.tensor([-torch.inf]))  # a mask may be infinite
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    model.register_parameter("codes", nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_first_bad_weight(dtype, bad):
    model = layers(dtype)
    assert not_finite(model) is None
    with torch.no_grad():
        model[0].weight[4, 3] = torch.finfo(dtype).max  # a sum of squares would overflow
        assert not_finite(model) is None
        model[1].bias[1] = bad
        assert not_finite(model) == "1.bias"
        model[0].weight[299, 6] = bad
    assert not_finite(model) == "0.weight"


def test_trained_weights_alone():
    model = layers(torch.float32)
    model[0].weight.requires_grad_(False)[0, 0] = torch.nan
    assert not_finite(model, trained=True) is None and not_finite(model) == "0.weight"


def test_nothing_to_look_at():
    assert not_finite(nn.ReLU()) is None and not_finite(nn.Linear(2, 2, device="meta")) is None
