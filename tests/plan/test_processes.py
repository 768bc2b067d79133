"""The plan of several processes against real runs in 2 and 4 of them, and what it says of their memory."""

import json
import os
import socket

import pytest

from rlhf_fast import ranks
from rlhf_fast.lm import sharding
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.measure import measure
from rlhf_fast.plan.phases import Planner
from tests.support.forked import Forked
from tests.support.ranks import once

SHAPES = {
    "untied": {  # 1001 rows of a matrix make no equal parts
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 1001,
    },
    "wide": {  # tied, grouped queries, nearly all of it vocabulary; enough layers to extrapolate to
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 5,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 5003, "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32, "vocab_size": 1500,
    },
}  # fmt: skip
METHODS = ("sft", "dpo", "ppo", "remax", "reward")
MATRIX = [(method, shape, {"shard": "full"}) for shape in SHAPES for method in METHODS]
OTHERS = [
    ("sft", "untied", {}),  # replicas
    ("ppo", "untied", {"lora_rank": 4, "shard": "full"}),
    ("remax", "wide", {"dtype": "bf16", "shard": "full", "eval_rows": 5, "micro_batch_size": 1}),
]
HYBRID = [("sft", "wide", {"shard": "hybrid", "machines": 2, "gradient_checkpointing": True})]
CHECKS = {2: MATRIX + OTHERS, 4: [MATRIX[i] for i in (0, 6, 12, 3, 9)] + HYBRID}
LENGTHS = {"prompt_length": 24, "response_length": 6}


def plan(size, method, shape, options, directory):
    """A plan with two rows, or pairs, for each process but the last one, which has one more."""
    values = LENGTHS | {"batch_size": 2 * size + 1, "gpus": size} | options
    return PlanConfig(model=str(directory / f"{shape}.json"), method=method, **values)


def run_one(size, rank, port, directory):
    """What one process of a run does for all checks of `size` processes."""
    local = size // max(options.get("machines", 1) for *_, options in CHECKS[size])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks._current = None  # the tests' process is a run of one process
    sharding.mesh_of.cache_clear()
    found = [measure(Planner(plan(size, *check, directory))) for check in CHECKS[size]]
    if not rank:
        (directory / f"{size}.json").write_text(json.dumps(found))
    return 0


def run_all(directory):
    """{number of processes: for each check what every process held}."""
    for name, shape in SHAPES.items():
        (directory / f"{name}.json").write_text(json.dumps(shape))
    found = {}
    for size in CHECKS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running = [
            Forked(lambda rank=rank: run_one(size, rank, port, directory), directory / f"{size}_{rank}.txt")  # noqa: B023
            for rank in range(size)
        ]
        assert [one.code(300) for one in running] == [0] * size, running[0].said
        found[size] = json.loads((directory / f"{size}.json").read_text())
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return once(tmp_path_factory, "planned", run_all)


@pytest.mark.parametrize(("size", "number"), [(size, n) for size, checks in CHECKS.items() for n in range(len(checks))])
def test_bytes_by_role_and_phase_of_every_process(size, number, measured):
    directory, found = measured
    planner = Planner(plan(size, *CHECKS[size][number], directory))
    for rank, (phases, run) in enumerate(zip(planner.processes("cpu"), found[size][number], strict=True)):
        for role, held in run["static_bytes"].items():
            planned = planner.at(rank).static[role]._asdict()
            assert planned == pytest.approx(held, rel=0.001, abs=300), (rank, role)  # rotary tables, counts of steps
        peaks = {name: phase["peak_bytes"] for name, phase in run["phases"].items() if isinstance(phase, dict)}
        assert phases.keys() == peaks.keys()
        for name, peak in peaks.items():
            assert phases[name].peak_bytes == pytest.approx(peak, rel=0.03), (rank, name)
