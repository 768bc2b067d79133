"""The plan of several processes against real runs in 2 and 4 of them, and what it says of their memory."""

import json
import os
import socket

import pytest
import torch

from rlhf_fast import cli, ranks
from rlhf_fast.config import SFTConfig
from rlhf_fast.lm import sharding
from rlhf_fast.plan import command
from rlhf_fast.plan.command import process_rows
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.measure import measure
from rlhf_fast.plan.phases import Planner
from rlhf_fast.plan.spread import rows_of_minibatch
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
CHECKS = {2: MATRIX + OTHERS, 4: [MATRIX[i] for i in (0, 6, 13)] + HYBRID}
LENGTHS = {"prompt_length": 24, "response_length": 6}


def plan(size, method, shape, options, directory):
    """A plan with two rows, or pairs, for each process but the last one, which has one more."""
    values = LENGTHS | {"batch_size": 2 * size + 1, "gpus": size} | options
    return PlanConfig(model=str(directory / f"{shape}.json"), method=method, **values)


def run_one(checks, size, rank, port, directory):
    """What one process of a run does for the checks."""
    local = size // max(options.get("machines", 1) for *_, options in checks)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks._current = None  # the tests' process is a run of one process
    sharding.mesh_of.cache_clear()
    found = [measure(Planner(plan(size, *check, directory))) for check in checks]
    if not rank:
        (directory / f"{size}.json").write_text(json.dumps(found))
    return 0


def run(checks, size, directory):
    """For each check what every one of `size` processes held."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        Forked(lambda rank=rank: run_one(checks, size, rank, port, directory), directory / f"{size}_{rank}.txt")
        for rank in range(size)
    ]
    assert [one.code(900) for one in running] == [0] * size, running[0].said
    return json.loads((directory / f"{size}.json").read_text())


def write_shapes(directory):
    for name, shape in SHAPES.items():
        (directory / f"{name}.json").write_text(json.dumps(shape))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{number of processes: for each check what every process held}."""

    def run_all(directory):
        write_shapes(directory)
        return {size: run(checks, size, directory) for size, checks in CHECKS.items()}

    return once(tmp_path_factory, "planned", run_all)


@pytest.mark.parametrize(("size", "number"), [(size, n) for size, checks in CHECKS.items() for n in range(len(checks))])
def test_bytes_by_role_and_phase_of_every_process(size, number, measured, tmp_path):
    """On a busy machine a thread of gloo may hold a message for longer, so that a larger peak is measured once more."""
    check, found = CHECKS[size][number], measured[1][size][number]
    write_shapes(tmp_path)
    planner = Planner(plan(size, *check, tmp_path))
    planned = planner.processes("cpu")
    if any(held > 1.03 * planned[rank][name].peak_bytes for rank, name, held in peaks(found)):
        (found,) = run([check], size, tmp_path)
    for rank, one in enumerate(found):
        for role, held in one["static_bytes"].items():
            static = planner.at(rank).static[role]._asdict()
            assert static == pytest.approx(held, rel=0.001, abs=300), (rank, role)  # rotary tables, counts of steps
    assert {(rank, name) for rank, name, _ in peaks(found)} == {(i, name) for i in range(size) for name in planned[i]}
    for rank, name, held in peaks(found):
        assert planned[rank][name].peak_bytes == pytest.approx(held, rel=0.03), (rank, name)


def peaks(found):
    """(rank, phase, bytes) of every process's phases."""
    return [
        (rank, name, phase["peak_bytes"])
        for rank, one in enumerate(found)
        for name, phase in one["phases"].items()
        if isinstance(phase, dict)
    ]


def test_parts_by_hand(shapes):
    """1001 rows over 4 processes are 251, 251, 251 and 248 rows; every process keeps 251."""
    planner = Planner(PlanConfig(model=shapes["small"], method="sft", batch_size=4, gpus=3, shard="full"))
    rows, layer = 334 * 128, 4 * 43 * 128 + 2 * 115 * 128 + 43 * 344 + 2 * 43  # of 1000, 128 and 344 rows
    kept = 2 * rows + 4 * layer + 43
    assert planner.static["policy"] == (4 * kept, 4 * kept, 8 * kept)
    rows, layer = 332 * 128, 4 * 42 * 128 + 2 * 114 * 128 + 42 * 344 + 2 * 42
    assert planner.at(2).static["policy"] == (4 * kept, 4 * kept, 8 * (2 * rows + 4 * layer + 42))


def test_a_copy_that_has_no_room_is_told_before_the_run(shapes, tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = f"--model {shapes['small']} --method reinforce --gpus 2 --shard full --prompt-length 8 --response-length 8"
    assert cli.main(["plan", *flags.split(), "--reward", "none", "--memory", "1034MiB", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    line = report["refused"]["your 1034MiB"]
    assert line.startswith("shard: expected room for the whole policy in rollouts, 0.0039 GiB, got ")
    assert line.endswith("GiB on your 1034MiB; the sampler `vllm` decodes on a server, without this copy")
    assert line in capsys.readouterr().out and [*report["refused"]] == ["your 1034MiB"]
    assert report["fits"]["your 1034MiB"] is False and report["fits"]["T4 16GB"] is True
    first, last = report["processes"]
    assert first["static_bytes"] == report["static_bytes"] and [*first["phases"]] == [*report["phases"]]
    peaks = [max(phase["peak_bytes"] for phase in process["phases"].values()) for process in (first, last)]
    assert report["peak_bytes"] == max(peaks)


def test_processes_with_the_same_bytes_share_a_row():
    def process(size):
        return {"static_bytes": {"policy": {"weights": 1 << 30}}, "phases": {"a": {"peak_bytes": size << 30}}}

    assert process_rows([process(2), process(2), process(3), process(2)]) == [
        {"process": "0-1", "static GiB": "1", "peak GiB": "2", "phase of the peak": "a"},
        {"process": "2", "static GiB": "1", "peak GiB": "3", "phase of the peak": "a"},
        {"process": "3", "static GiB": "1", "peak GiB": "2", "phase of the peak": "a"},
    ]


def test_rows_of_a_random_minibatch():
    assert rows_of_minibatch(8, 8, 4, 1) == 2  # one process has all rows
    assert rows_of_minibatch(4, 8, 1, 2) == 4
    assert rows_of_minibatch(2, 8, 2, 4) == 2  # all of them may fall into one minibatch
    # hypergeometric: mean 16, deviation sqrt(128 / 8 * 7 / 8 * 384 / 511)
    assert rows_of_minibatch(64, 512, 4, 8) == 33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 4, "machines": 3, "shard": "hybrid"}, "machines: expected a divisor of gpus=4, got 3"),
        ({"gpus": 4, "machines": 2, "shard": "full"}, "machines: expected shard hybrid beside it, got 2 with full"),
        ({"gpus": 4, "zero": 3, "shard": "full"}, "zero: expected 0 with shard=full, which splits everything; got 3"),
        ({"gpus": 16}, "batch_size: expected a row for each of 16 GPUs, got 8"),
        ({"gpus": 4, "method": "rloo"}, "batch_size: expected a prompt with 4 samples for each of 4 GPUs, got 8"),
        ({"gpus": 2, "shard": "full", "optimizer": "adamw_8bit"}, "optimizer: expected adamw with shard=full, got .*"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        PlanConfig(**{"model": "m", "method": "sft", "batch_size": 8} | options)


def test_a_plan_alone_is_one_process(shapes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^measure: expected true in 2 processes"):
        command.run(PlanConfig(model=shapes["small"], method="sft", gpus=2))


def test_a_dry_run_plans_as_many_processes_as_a_launcher_starts(tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = SFTConfig(model=tiny_model, output_dir="o", train_data="t", shard="hybrid", max_length=32)
    monkeypatch.setenv("RANK", "1")
    command.dry_run("sft", config)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    command.dry_run("sft", config)
    assert "of the first of 4 GPUs in 2 machines, in shards (hybrid)" in capsys.readouterr().out


def test_messages_that_add_up_gradients():
    """Gradients of one dtype share a message until it has 16 million numbers; half precision is added in float32.

    With each gradient goes a number.
    """
    large, small, half = (
        torch.empty(n, dtype=d, device="meta") for n, d in ((1 << 24, None), (5, None), (7, torch.bfloat16))
    )
    assert ranks.bytes_to_add([large, small, half]) == 4 * ((1 << 24) + 1)
    assert ranks.bytes_to_add([small, large, half]) == 4 * ((1 << 24) + 5 + 2)
    assert ranks.bytes_to_add([half]) == 4 * (7 + 1) and ranks.bytes_to_add([]) == 0
