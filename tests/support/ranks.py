"""Several processes on one machine: starting them as torchrun does, and the stages that a process trains in a test.

python -m tests.support.ranks JOBS.json    trains every job, a list of [stage, options]

The variable FILE_BYTES says how many bytes of weights the files of a model in shards have.
"""

import fcntl
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf_fast.data.rows import write_rows
from rlhf_fast.stages.init import init_model
from tests.support.models import model_config
from tests.support.stages import LENGTHS, PARITY, REWARD, distance, numbers, weights

ROOT = Path(__file__).parent.parent.parent
Job = tuple[str, dict[str, Any]]  # the name of a stage, and the fields of its config
COMMON = {"batch_size": 16, "learning_rate": 3e-4, "lr_schedule": "constant", "seed": 3}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
DAPO = {"loss_type": "dapo", "clip_high": 0.28, "scale_rewards": "batch", "mask_truncated_completions": True}
DAPO |= {"soft_punish_cache": 4, "kl_in": "reward"}
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0}
JOBS: dict[str, Job] = {
    "sft": ("sft", {"epochs": 1, "micro_batch_size": 4, "max_length": 48}),
    "sft_lora": ("sft", {"epochs": 1, "max_length": 48, **LORA}),
    "sft_in_backward": ("sft", {"epochs": 1, "max_length": 48, **IN_BACKWARD}),
    "sft_8bit": ("sft", {"epochs": 1, "max_length": 48, "optimizer": "adamw_8bit", **LORA}),
    "reward": ("reward", {"epochs": 1, "normalize_samples": 20, **LENGTHS}),
    "dpo": (
        "dpo",
        {
            "epochs": 1,
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "eval_reward": REWARD,
            "eval_data": "prompts",
            "eval_pairs": "pairs",
            **LENGTHS,
        },
    ),
    "kto": ("kto", {"epochs": 1, "eval_rows": "unpaired", **LENGTHS}),
    "ppo": ("ppo", {"steps": 3, "minibatches": 4, "epochs": 2, "whiten_rewards": True, "eval_data": "prompts"}),
    "ppo_shared": ("ppo", {"steps": 2, "critic": "shared", "micro_batch_size": 4}),
    "ppo_base": ("ppo", {"steps": 2, "share_base": True, "reward": "adapter", "offload": True, **LORA}),
    "ppo_in_backward": ("ppo", {"steps": 2, "minibatches": 8, "epochs": 1, **IN_BACKWARD}),  # a process may have no row
    "ppo_shared_in_backward": ("ppo", {"steps": 2, "critic": "shared", **IN_BACKWARD, **LORA}),
    "remax": ("remax", {"steps": 3, "kl_target": 0.5, "kl_horizon": 100}),
    "reinforce": ("reinforce", {"steps": 2, "gradient_checkpointing": True, "normalize_advantages": True}),
    "rloo": ("rloo", {"steps": 3, "group_size": 2, "top_k": 5, "normalize_advantages": True}),
    "grpo": ("grpo", {"steps": 2, "group_size": 4, "minibatches": 2, "epochs": 2, **DAPO}),
    "grpo_dynamic": ("grpo", {"steps": 2, "group_size": 2, "max_num_gen_batches": 3, "reward": PARITY}),
    "online_dpo": ("online-dpo", {"steps": 2}),
}
SHORT = {"epochs": 1, "max_length": 48}
OWN: dict[str, Job] = {  # trained in shards too, and with models of their own
    "sft_one_row": ("sft", {**SHORT, "micro_batch_size": 1, "gradient_checkpointing": True}),
    "sft_tied": ("sft", {**SHORT, "model": "tied", "micro_batch_size": 8}),
    "sft_logits": ("sft", {**SHORT, "fused_head": False, "eval_data": "sft", "weight_decay": 0.1}),
    "sft_bf16": ("sft", {**SHORT, "bf16": True}),
    "ppo_models": ("ppo", {"steps": 2, "minibatches": 2, "reward": "scorer", "eval_data": "prompts", **LORA}),
    "remax_bf16": ("remax", {"steps": 2, "reward": "scorer", "bf16": True}),
    "remax_scored": ("remax", {"steps": 2, "reward": "scorer", "eval_data": "few", "micro_batch_size": 4}),
}
RESUMED: dict[str, Job] = {
    "sft_saved": ("sft", {**SHORT, "save_steps": 4}),
    "ppo_saved": ("ppo", {"steps": 5, "save_steps": 4, "minibatches": 2}),
    "sft_bf16_saved": ("sft", {**SHORT, "save_steps": 4, "dtype": "bf16"}),
}
ALL = JOBS | OWN | RESUMED
HALVES = ("sft_bf16", "sft_bf16_saved", "remax_bf16")
DATA = {"sft": "sft", "reward": "pairs", "dpo": "pairs", "kto": "unpaired"}


def jobs_in(directory: Path, files: dict[str, str], jobs: dict[str, Job] = JOBS, **common: Any) -> list[Job]:
    """The jobs over rows of `files`; each writes to the folder of its name in `directory`. common: for every job.

    The model is the file `model`, except where a job names another model.
    An option whose value is a name in `files` gets that file, except the name of the stage's own rows.
    """
    rows = [json.loads(line) for line in Path(files["prompts"]).read_text().splitlines()]
    repeated = str(directory.parent / "repeated.jsonl")
    write_rows(repeated, [row for row in rows[:6] for _ in range(4)])  # the processes have equal prompts in a round
    files = files | {"repeated": repeated}
    made = []
    for name, (stage, options) in jobs.items():
        options = {k: files.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
        online = stage not in DATA
        own = {"reward": REWARD, **LENGTHS} if online else {}
        files_of = {"train_data": files[DATA.get(stage, "repeated")], "model": files["model"]}
        made.append((stage, {**COMMON, **own, **files_of, **options, **common, "output_dir": str(directory / name)}))
    return made


def plain(
    factory: pytest.TempPathFactory, files: dict[str, str], model: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, dict[str, str]]:
    """The directory of all jobs' runs in one process, and `files` with what the jobs name beside them.

    `model` is the model of all jobs: that of the worker that has made the runs, because workers have copies.
    `tied` and `large` are models, `scorer` and `adapter` are reward models on `model`, and `few` has a single prompt,
    so that some processes have none.
    """

    def make(directory: Path) -> dict[str, str]:
        settings = model_config("llama", len(tokenizer)) | {"tie_word_embeddings": True}
        del settings["vocab_size"]
        init_model(settings, tokenizer, directory / "tied", seed=0)
        # Of many layers, because a machine holds a model once more in the 32nd part of it that moves at a time.
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 24, "num_key_value_heads": 4}
        init_model(settings | sizes, tokenizer, directory / "large", seed=0)
        large = AutoModelForCausalLM.from_pretrained(directory / "large")
        large.resize_token_embeddings(8192, mean_resizing=False)  # of a share in the weights as in a real model
        large.save_pretrained(directory / "large")
        (directory / "large" / "checkpoint.json").unlink()  # it says that the model is as it was made
        few = directory / "few.jsonl"
        few.write_text("".join(Path(files["prompts"]).read_text().splitlines(keepends=True)[:1]))
        names = ("tied", "large", "scorer", "adapter")
        named = files | {"model": model} | {name: str(directory / name) for name in names} | {"few": str(few)}
        options = {**COMMON, **SHORT, "train_data": files["pairs"], "model": model, "normalize_samples": 0}
        train([("reward", {**options, **own, "output_dir": named[name]}) for name, own in
               (("scorer", {}), ("adapter", LORA))])  # fmt: skip
        train(jobs_in(directory, named, ALL))
        return named

    return once(factory, "plain", make)


def check_same(name: str, one: Path, several: Path) -> None:
    """The runs of job `name` in one and in several processes have the same metrics, weights and tokens.

    A metric may differ by 1e-5 of it, or by 1e-6: the KL and DPO's margins are differences of near numbers, and so is
    everything that has a part in them.
    """
    rows, others = numbers(one), numbers(several)
    assert len(rows) == len(others) > 1
    relative, absolute, moved = (2e-2, 2e-3, 2e-3) if name in HALVES else (1e-5, 1e-6, 1e-5)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"val/logprob_drift", "val/logprob_drift_mean"}:  # differences of rounding
            assert other[key] == pytest.approx(row[key], rel=relative, abs=absolute), (row["step"], key)
    assert distance(weights(one), weights(several)) < moved
    for file in ("samples.json", "samples_before.json"):
        if (one / file).exists():
            mine, theirs = (json.loads((path / file).read_text()) for path in (one, several))
            assert [row["completion"] for row in mine] == [row["completion"] for row in theirs]


def check_bits(one: Path, other: Path) -> None:
    """Two runs have the same bits in every metric and weight."""
    assert numbers(one) == numbers(other)
    assert distance(weights(one), weights(other)) == 0


def start(size: int, *command: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Starts `python COMMAND` in `size` processes with the variables of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def launch(size: int, *command: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python COMMAND` in `size` processes; the results by rank."""
    return results_of(start(size, *command, **environment))


def results_of(running: list[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for the processes; their results by rank."""
    results = []
    for process in running:
        out, err = process.communicate(timeout=900)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """What make(directory) returns, and its directory: made once for all workers of a test run, which share it."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    directory, note = root / name, root / f"{name}.pickle"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second worker waits, because two at once would take turns on the cores
        if not note.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            note.write_bytes(pickle.dumps(make(directory)))
    return directory, pickle.loads(note.read_bytes())


def train(jobs: list[Job]) -> None:
    """Trains one stage after the other in this process. The stage "load" measures the loading of a model."""
    from rlhf_fast import methods

    for stage, options in jobs:
        if stage == "load":
            from tests.support import loads

            loads.measure(options["warm"], options["model"], options["output_dir"])
            continue
        row = methods.STAGES[stage]
        methods.load(row.train)(methods.load(row.config)(**options))


def train_in(size: int, jobs: list[Job], directory: Path, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Trains the jobs in `size` processes."""
    path = directory / f"jobs_{size}.json"
    path.write_text(json.dumps(jobs))
    return launch(size, "-m", "tests.support.ranks", str(path), **environment)


if __name__ == "__main__":
    import torch

    from rlhf_fast.lm import saving

    torch.set_num_threads(1)
    saving.FILE_BYTES = int(os.environ.get("FILE_BYTES", saving.FILE_BYTES))
    train(json.loads(Path(sys.argv[1]).read_text()))
