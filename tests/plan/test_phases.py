"""What sharing, splitting and offloading change, against arithmetic by hand; extrapolation against the whole model."""

import json
from pathlib import Path

import pytest

from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.phases import Phase, Planner

LENGTHS = {"batch_size": 4, "prompt_length": 24, "response_length": 8}


def phases(shape: str, method: str = "ppo", **options: object) -> dict[str, Phase]:
    return Planner(PlanConfig(model=shape, method=method, **LENGTHS | options)).phases("cpu")


def test_few_layers_and_rows_foretell_many(shapes, tmp_path):
    """A model simulated whole (as few as three layers are) agrees with one extrapolated, at any number of rows.

    Of rows enough for activations to outweigh a layer's gradients: below, the curve lies above the truth.
    """
    values = json.loads(Path(shapes["grouped"]).read_text())
    peaks = {}
    for layers in (3, 4, 5, 6):
        file = tmp_path / f"{layers}.json"
        file.write_text(json.dumps(values | {"num_hidden_layers": layers}))
        planner = Planner(PlanConfig(model=str(file), method="sft", **LENGTHS | {"batch_size": 8}))
        for rows in (8, 9, 64):
            peaks[layers, rows] = planner.phases("cpu", batch=rows)["policy_update"].peak_bytes
    for rows in (8, 9, 64):
        steps = {peaks[n + 1, rows] - peaks[n, rows] for n in (3, 4, 5)}
        assert max(steps) - min(steps) <= 64
    few = {"model": str(file), "method": "sft", **LENGTHS}  # six layers, at 4 rows: a gradient outweighs activations
    at_four = Planner(PlanConfig(**few))
    truth = peaks[6, 9]
    assert truth <= at_four.phases("cpu", batch=9)["policy_update"].peak_bytes <= 1.005 * truth
    at_nine = Planner(PlanConfig(model=shapes["grouped"], method="sft", **LENGTHS | {"batch_size": 9})).phases("cpu")
    assert at_nine["policy_update"].peak_bytes == pytest.approx(peaks[6, 9], abs=64)


def test_lora_holds_the_base_once(shapes):
    # a trained score head stands beside the one it started from
    apart = Planner(PlanConfig(model=shapes["small"], method="ppo", lora_rank=4, **LENGTHS))
    shared = Planner(PlanConfig(model=shapes["small"], method="ppo", lora_rank=4, share_base=True, **LENGTHS))
    base, H, F, V = 4 * (4 * 128 * 128 + 3 * 128 * 344 + 2 * 128) + 128, 128, 344, 1000
    adapters = 4 * 4 * (4 * 2 * H + 3 * (H + F))  # layers x rank x (q, k, v, o; gate, up, down)
    assert apart.static["policy"] == (4 * (base + 2 * V * H + adapters), 4 * adapters, 8 * adapters)
    assert apart.static["value"] == (4 * (base + V * H + adapters + 2 * H), 4 * (adapters + H), 8 * (adapters + H))
    assert apart.static["reward"].weights == 4 * (base + V * H + H)
    assert shared.static["value"].weights == shared.static["reward"].weights == 4 * (adapters + H)
    assert apart.static["reference"].weights == shared.static["reference"].weights == 0


def test_a_critic_on_the_policys_trunk(shapes):
    planner = Planner(PlanConfig(model=shapes["small"], method="ppo", critic="shared", **LENGTHS))
    assert planner.static["value"] == (128 * 4, 128 * 4, 128 * 8)
    assert "value_update" not in planner.phases("cpu")


def test_optimizer_bytes(shapes):
    plan = {"model": shapes["small"], "method": "sft", **LENGTHS}
    parameters = Planner(PlanConfig(**plan)).roles["policy"].trained
    for options, gradients, optimizer in (
        ({}, 4, 8),
        ({"dtype": "bf16"}, 2, 12),
        ({"optimizer": "adamw_8bit"}, 4, 2 + 8 / 256),
        ({"optimizer_in_backward": True}, 0, 8),
    ):
        static = Planner(PlanConfig(**plan, **options)).static["policy"]
        assert static.gradients == gradients * parameters
        assert static.optimizer == pytest.approx(optimizer * parameters, abs=1)


def test_gradients_that_are_stepped_at_once_leave_the_peak(shapes):
    options = {"batch_size": 2, "prompt_length": 4, "response_length": 4}  # gradients outweigh activations
    kept, stepped = (phases(shapes["gpt2"], "sft", **options, optimizer_in_backward=x) for x in (False, True))
    assert stepped["policy_update"].parts["pass"] < 0.6 * kept["policy_update"].parts["pass"]


def test_later_micro_batches_meet_the_gradients_of_earlier_ones(shapes):
    once, twice = (phases(shapes["small"], micro_batch_size=n) for n in (4, 2))
    gradients = Planner(PlanConfig(model=shapes["small"], method="ppo", **LENGTHS)).static
    assert "value gradients" not in once["policy_update"].parts
    assert twice["policy_update"].parts["value gradients"] == gradients["value"].gradients
    assert once["value_update"].parts["policy gradients"] == gradients["policy"].gradients
    assert twice["policy_update"].parts["pass"] > gradients["policy"].gradients


def test_checkpointing_trades_activations(shapes):
    options = {"batch_size": 16, "prompt_length": 64}
    kept, recomputed = (phases(shapes["grouped"], "sft", **options, gradient_checkpointing=x) for x in (False, True))
    assert recomputed["policy_update"].parts["pass"] < 0.5 * kept["policy_update"].parts["pass"]


def test_offloaded_models_are_there_in_their_phase_only(shapes):
    planner = Planner(
        PlanConfig(model=shapes["small"], method="remax", offload=True, offload_optimizer=True, **LENGTHS)
    )
    parts = {name: phase.parts for name, phase in planner.phases("cpu").items()}
    assert [name for name, part in parts.items() if "reward weights" in part] == ["scoring"]
    assert [name for name, part in parts.items() if "reference weights" in part] == ["reference"]
    assert not any("policy optimizer" in part or "policy gradients" in part for part in parts.values())


def test_zero_splits(shapes):
    plan = {"model": shapes["small"], "method": "remax", "gpus": 4, **LENGTHS}
    whole = Planner(PlanConfig(**plan)).static
    for stage, split in ((1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))):
        static = Planner(PlanConfig(**plan, zero=stage)).static
        for part, n in zip(("weights", "gradients", "optimizer"), split, strict=True):
            assert getattr(static["policy"], part) == -(-getattr(whole["policy"], part) // n)
        assert static["reward"].weights == -(-whole["reward"].weights // split[0])
    parts = Planner(PlanConfig(**plan, zero=2, frozen_zero=3)).phases("cpu")["reference"].parts
    layer, embedding = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128, 1000 * 128
    assert parts["reference weights"] == whole["reference"].weights // 4 + 4 * (2 * layer + embedding)


def test_truncated_sampling_keeps_sets(shapes):
    """A bit a token of the vocabulary and place, longest where the rollout makes them and in a copied minibatch."""
    ppo = phases(shapes["small"], top_p=0.9, minibatches=2)
    one = 8 * 125  # response length x vocabulary / 8
    kept = {name: phase.parts["kept"] / one for name, phase in ppo.items()}
    assert kept == {
        "rollout": 4, "scoring": 4, "reference": 4, "value": 4, "policy_update": 6, "value_update": 6, "optimizer": 6
    }  # fmt: skip
    remax = phases(shapes["small"], "remax", top_k=5)
    kept = {name: phase.parts["kept"] / one for name, phase in remax.items()}
    assert kept == {"rollout": 8, "scoring": 8, "reference": 8, "policy_update": 4, "optimizer": 4}
    assert all("kept" not in phase.parts for phase in phases(shapes["small"]).values())
    assert all("kept" not in phase.parts for phase in phases(shapes["small"], "sft", top_p=0.5).values())


def test_truncated_sampling_goes_through_the_logits(shapes):
    plain, logits, truncated = (
        phases(shapes["wide"], "reinforce", **options) for options in ({}, {"fused_head": False}, {"top_p": 0.5})
    )
    masks = 4 * 8 * 20001  # a byte of each place on the way to a mask
    assert truncated["reference"].parts["pass"] == logits["reference"].parts["pass"] + 2 * masks
    assert truncated["policy_update"].parts["pass"] >= logits["policy_update"].parts["pass"]
    assert truncated["rollout"].parts["pass"] > plain["rollout"].parts["pass"]
    with pytest.raises(ValueError, match="critic: expected a model of its own beside top_k or top_p"):
        Planner(PlanConfig(model=shapes["small"], method="ppo", critic="shared", top_k=5))


def test_a_server_decodes_in_memory_of_its_own(shapes):
    local, served = (phases(shapes["small"], sampler=sampler, eval_rows=4) for sampler in ("local", "vllm"))
    assert list(served) == ["rescoring" if name == "rollout" else name for name in local]
    assert served["rescoring"].peak_bytes < local["rollout"].peak_bytes  # no cache of keys and values
    assert "sampling" in local["evaluation"].how and "sampling" not in served["evaluation"].how
    for name in ("policy_update", "value_update", "optimizer"):
        assert served[name] == local[name]
    with pytest.raises(ValueError, match="^sampler: expected local with measure"):
        phases(shapes["small"], sampler="vllm", measure=True)
