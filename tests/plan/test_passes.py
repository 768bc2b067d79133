"""What a cache holds at the end of a rollout, for layers with windows, recurrent layers and models without a cache."""

import pytest
import torch

from rlhf_fast.plan.passes import Curve, Lengths, rollout
from rlhf_fast.plan.phases import WHOLE
from rlhf_fast.plan.shapes import Shape
from tests.support.zoo import make_config

SLOT = 2 * 2 * 8 * 4  # keys and values of two heads of eight numbers in fp32


@pytest.mark.parametrize(
    ("name", "of_a_row"),
    [
        ("bloom", 2 * 32 * 2 * SLOT),  # four heads of keys
        ("gemma3_text", (9 + 32) * SLOT),  # a window of ten holds nine earlier tokens
        ("lfm2", 32 * SLOT + 32 * 3 * 4),  # the last three inputs of a convolution
        ("openai-gpt", 0),
        ("rwkv", 0),
    ],
)
def test_the_cache_of_every_kind_of_layer(name, of_a_row):
    shape = Shape(make_config(name), "policy", torch.float32)
    found = Curve(shape, rollout(shape, Lengths(20, 12), 2, 0, 1.0), 2, WHOLE)(4)
    assert found["kv_cache"] == 8 * of_a_row  # four prompts with two rows each
    logits = 8 * 61 * 4
    assert found["decode"] > logits


def test_whole_rows_need_more_for_a_step_than_for_the_prompts():
    shape = Shape(make_config("rwkv"), "policy", torch.float32)
    found = Curve(shape, rollout(shape, Lengths(20, 12), 2, 0, 1.0), 2, WHOLE)(4)
    assert found["decode"] > 1.5 * found["prefill"]
