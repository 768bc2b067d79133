"""Published figures: parameter counts, bytes per parameter, which runs fit (arXiv 2310.10505 and its repository)."""

import pytest

from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.gpus import MEMORY, needed
from rlhf_fast.plan.phases import Planner
from rlhf_fast.plan.roles import roles_of, static_bytes


@pytest.mark.parametrize(("shape", "parameters"), [("llama-2-7b", 6_738_415_616), ("opt-1.3b", 1_315_758_080)])
def test_parameters(shape, parameters, shapes):
    roles = roles_of(PlanConfig(model=shapes[shape], method="remax"))
    assert roles["policy"].counts.all == roles["reference"].counts.all == parameters
    assert roles["policy"].trained == parameters and roles["reference"].trained == 0


def static(shapes: dict[str, str], method: str, **precision: object) -> dict[str, tuple[int, int]]:
    """Role -> parameters and static bytes."""
    plan = PlanConfig(model=shapes["llama-2-7b"], method=method, **precision)
    return {name: (role.counts.all, sum(static_bytes(role, plan))) for name, role in roles_of(plan).items()}


@pytest.mark.parametrize("precision", [{"dtype": "bf16"}, {"bf16": True}])
def test_bytes_per_parameter_and_what_the_value_model_costs(precision, shapes):
    ppo, remax = (static(shapes, method, **precision) for method in ("ppo", "remax"))
    assert {name: size / count for name, (count, size) in ppo.items()} == {
        "policy": 16, "value": 16, "reward": 2, "reference": 2,
    }  # fmt: skip
    assert sum(size / count for count, size in ppo.values()) == 36
    assert sum(size / count for count, size in remax.values()) == 20
    saved = 1 - sum(size for _, size in remax.values()) / sum(size for _, size in ppo.values())
    assert saved == pytest.approx(0.44, abs=0.005)


def test_which_runs_fit_one_and_four_gpus_of_80_gb(shapes):
    """The repository's table: Llama-2-7B, checkpointing, ZeRO-2; frozen models ZeRO-3 in CPU memory, 256 + 256 tokens.

    "offload" is the optimizer's; rows per GPU are the largest that ran. PPO's failing run is taken at ReMax's 26 rows.
    """
    table = {  # (GPUs, optimizer offloaded, rows per GPU): fits
        "ppo": {(4, False, 26): False, (4, True, 30): True, (1, True, 32): True},
        "remax": {(4, False, 26): True, (4, True, 40): True, (1, True, 42): True},
    }
    fixed = {"dtype": "bf16", "gradient_checkpointing": True, "zero": 2, "frozen_zero": 3, "offload": True}
    for method, rows in table.items():
        curves = {}
        for (gpus, offload_optimizer, batch_size), fits in rows.items():
            options = {"gpus": gpus, "offload_optimizer": offload_optimizer, "batch_size": gpus * batch_size}
            planner = Planner(PlanConfig(model=shapes["llama-2-7b"], method=method, **fixed, **options))
            planner.curves = curves  # the passes are the same in all rows
            peak = max(phase.peak_bytes for phase in planner.phases("cuda").values())
            assert (needed(peak) <= MEMORY["A100 80GB"]) == fits, (method, options, peak)
