"""Which runs there are, and the whole command on a tiny model."""

import inspect
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_fast.cli import main
from rlhf_fast.config import PPOConfig
from rlhf_fast.failing import lost
from rlhf_fast.lab.compare import command, processes
from rlhf_fast.lab.compare.cell import end_with
from rlhf_fast.lab.compare.cell import main as cell_main
from rlhf_fast.lab.compare.cells import cells_of
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.processes import run_cell
from rlhf_fast.lab.compare.start import SHAPES, Shape, Start, prepare
from rlhf_fast.lab.world import preference_rows, prompt_rows, sft_rows
from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.methods import METHODS
from rlhf_fast.ranks import Ranks
from rlhf_fast.training import checkpoint
from tests.support.stages import numbers


@pytest.fixture
def start(tmp_path):
    rows = sft_rows(24, seed=0)
    completions = [row["completion"] for row in rows]
    answers = list(zip(completions, completions[1:] + completions[:1], strict=True))
    pairs = preference_rows([row["prompt"] for row in rows], answers, 0)
    files = {"prompts": prompt_rows(24, seed=1), "pairs": pairs}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    prompts, pairs = (str(tmp_path / f"{name}.jsonl") for name in files)
    common = {"kl_coef": 0.3, "steps": 99, "learning_rate": 0.02}
    return Start("policy", "reward", "adapter", "small", prompts, pairs, {"common": common})


def test_cells_have_the_same_budget(start, tmp_path):
    options = {"steps": 3, "batch_size": 4, "lora_rank": 2, "options": {"ppo": {"epochs": 2}}}
    every = cells_of(CompareConfig(output_dir=str(tmp_path), **options), start)
    assert {cell.method for cell in every} == METHODS.keys()
    methods = ["ppo", "remax", "reinforce", "rloo", "grpo", "online-dpo", "dpo", "kto"]
    config = CompareConfig(output_dir=str(tmp_path), methods=methods, **options)
    cells = {cell.name: cell for cell in cells_of(config, start)}
    assert list(cells) == [
        "PPO", "PPO, small critic", "PPO, shared trunk", "ReMax", "REINFORCE", "RLOO", "GRPO", "Online DPO",
        "DPO", "KTO",
        "PPO, LoRA 2", "PPO, shared trunk, LoRA 2", "ReMax, LoRA 2", "REINFORCE, LoRA 2", "RLOO, LoRA 2",
        "GRPO, LoRA 2", "Online DPO, LoRA 2", "DPO, LoRA 2", "KTO, LoRA 2",
    ]  # fmt: skip
    for name, cell in cells.items():
        assert cell.options["batch_size"] == (2 if name.startswith("DPO") else 4)  # two completions a pair
        assert cell.options.get("steps", 3) == 3  # the token budget is ours, not the start's
        assert cell.options.get("kl_coef", 0.3) == 0.3
        assert cell.options["learning_rate"] == pytest.approx(0.2 if "LoRA" in name else 0.02)
        assert cell.options["lora_rank"] == (2 if "LoRA" in name else 0)
    assert cells["PPO"].options["epochs"] == 2
    assert cells["GRPO"].options["epochs"] == 1
    assert cells["PPO, small critic"].options["value_model"] == "small"
    assert cells["PPO, shared trunk, LoRA 2"].options["critic"] == "shared"
    assert cells["PPO, LoRA 2"].options["share_base"] and cells["PPO, LoRA 2"].options["reward"] == "adapter"
    for name in ("DPO", "KTO"):  # a pair makes two rows of KTO
        assert len(Path(cells[name].options["train_data"]).read_text().splitlines()) == 3 * 2


def test_config_errors(start, tmp_path):
    with pytest.raises(ValueError, match="critics: expected some of same, small, shared, got \\['tiny'\\]"):
        CompareConfig(output_dir="x", critics=["tiny"])
    with pytest.raises(ValueError, match="options: expected sections common, ppo, got 'dpo'"):
        CompareConfig(output_dir="x", methods=["ppo"], options={"dpo": {}})
    with pytest.raises(ValueError, match="pairs: expected at least steps \\* batch_size / 2 = 512 rows, got"):
        cells_of(CompareConfig(output_dir=str(tmp_path), methods=["dpo"], steps=64, batch_size=16), start)
    with pytest.raises(ValueError, match="model: expected demo, 10M, .* or a directory, got 'nowhere'"):
        command.run(CompareConfig(model="nowhere", output_dir=str(tmp_path)))


def test_the_whole_command(start, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--reward", "rlhf_fast.world:true_reward", "--train-data", start.prompts, "--pairs", start.pairs]
    flags += ["--steps", "3", "--batch-size", "4", "--prompt-length", "18", "--response-length", "8"]
    flags += ["--methods", "reinforce", "dpo", "--memory", "24GiB"]
    assert main(["compare", "--model", tiny_model, "--output-dir", str(out), *flags]) == 0
    record = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in record["methods"]] == ["REINFORCE", "DPO"]
    for row in record["methods"]:
        assert row["samples_per_second"] * row["step_seconds"] == pytest.approx(4)
        assert 0 < row["peak_bytes"] < 2**30
        assert row["largest_batch"] > 100
    (prediction,) = record["time_model"]
    assert prediction["method"] == "PPO" and prediction["measured seconds"] is None
    assert (out / "plots" / "memory.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "compare.md").read_text()
    assert "| REINFORCE |" in text and "plots/step_time.png" in text
    # nothing runs again, and a failing stage shows what it said
    before = (out / "dpo-seed0" / "run.json").stat().st_mtime_ns
    assert main(["compare", "--model", tiny_model, "--output-dir", str(out), *flags, "--resume"]) == 0
    assert (out / "dpo-seed0" / "run.json").stat().st_mtime_ns == before
    cell = SimpleNamespace(name="PPO", method="ppo", options={"model": tiny_model, "lora_rank": 0, "nonsense": 1})
    # in two processes a run over both of them has the same numbers
    two = [*flags[:-5], "--methods", "reinforce", "--model", tiny_model, "--output-dir", str(tmp_path / "two")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rlhf_fast"]
    done = subprocess.run([*torchrun, "compare", *two], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("REINFORCE, seed 0") == 1 and done.stdout.count("compare.md") == 1
    runs = [json.loads((path / "reinforce-seed0/run.json").read_text()) for path in (out, tmp_path / "two")]
    assert [len(one.get("processes", [])) for one in runs] == [0, 2]
    one, several = (numbers(path / "reinforce-seed0") for path in (out, tmp_path / "two"))
    for row, other in zip(one, several, strict=True):
        assert other == pytest.approx(row, rel=1e-5, abs=1e-6)
    with pytest.raises(ValueError, match="PPO failed with exit code 1; its last lines are above"):
        run_cell(cell, tmp_path / "failing", None)
    assert "nonsense" in capsys.readouterr().err
    assert PPOConfig(model="a", output_dir="b", train_data="c", reward="d").epochs == 4  # compare's 1 is its own


def test_a_run_of_other_settings_data_or_memory_or_a_damaged_one_is_not_taken(start, tiny_model, tmp_path):
    config = CompareConfig(
        model=tiny_model,
        output_dir=str(tmp_path / "out"),
        reward=start.reward,
        train_data=start.prompts,
        pairs=start.pairs,
        methods=["dpo"],
        steps=1,
        batch_size=4,
        prompt_length=18,
        response_length=8,
    )
    (cell,) = cells_of(config, prepare(config))
    directory, memory = tmp_path / "out" / cell.key, 24 * 2**30
    directory.mkdir()
    assert command._changed(cell, directory, memory) == ""
    given = directory / "cell.json"
    given.write_text(json.dumps(cell.options | {"output_dir": str(directory), "memory": memory}))
    cell_main("dpo", str(given), str(directory / "result.json"))
    assert command._changed(cell, directory, memory) is None
    assert command._changed(cell, directory, None) == f"memory is None bytes and was {memory}"
    other = cell._replace(options=cell.options | {"micro_batch_size": 1})
    assert command._changed(other, directory, memory) == "micro_batch_size is 1 and was None"
    pairs = Path(cell.options["train_data"])
    pairs.write_text(pairs.read_text().replace("e", "a", 1))
    assert command._changed(cell, directory, memory) == f"the content of train_data, '{pairs}', has changed"
    unfinished = tmp_path / "out" / "unfinished"
    config_of = command._config(cell, unfinished)
    checkpoint.save(
        unfinished / "checkpoint-1",
        models={},
        state={},
        extra_files={"run_config.json": {**vars(config_of), "seed": 5}},
    )
    assert command._changed(cell, unfinished, memory).startswith("seed: expected 5 as in the run to resume")
    (directory / "config.json").unlink()
    assert command._changed(cell, directory, memory) == "config.json is missing"


@pytest.mark.parametrize("which", ["fails", "does not fit"])
def test_a_run_in_several_processes_ends_with_the_first_that_fails(which, tmp_path, monkeypatch):
    """This process's part would sleep for a minute. The other process's part has failed."""
    unfit = {"ran": False, "error": "out of memory"}
    theirs = (1, None, "no luck", "their.txt") if which == "fails" else (0, unfit, "", "their.txt")

    class Two(Ranks):
        def gather(self, value):
            return [value, theirs] if isinstance(value, tuple) else [value, value]

    said = str(lost(RuntimeError("gloo: connection closed")))
    program = [sys.executable, "-S", "-c", f"import time; print({said!r}, flush=True); time.sleep(60)"]

    class Sleeping(subprocess.Popen):
        def __init__(self, _, **options):
            assert options["env"]["MASTER_PORT"].isdecimal()
            super().__init__(program, **options)

    monkeypatch.setattr(processes, "current", lambda: Two(0, 2))
    monkeypatch.setattr(processes, "flagged", lambda name: True)
    monkeypatch.setattr(processes, "flag", lambda name: None)
    monkeypatch.setattr(processes.subprocess, "Popen", Sleeping)
    cell = SimpleNamespace(name="PPO", method="ppo", options={})
    if which == "fails":
        with pytest.raises(ValueError, match="PPO failed with exit code 1; its last lines are above, .* in their.txt"):
            run_cell(cell, tmp_path, None)
    else:
        run_cell(cell, tmp_path, None)
        assert json.loads((tmp_path / "result.json").read_text()) == unfit


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_run_ends_with_the_command_that_started_it(how, tmp_path, monkeypatch):
    """The run would sleep for a minute. A process that is killed runs no code of its own, so the pipe alone tells."""
    lines = inspect.getsource(end_with) + "end_with(0)\nprint('there', flush=True)\ntime.sleep(60)\nprint('end')\n"
    program = [sys.executable, "-S", "-c", "import os, threading, time\n" + lines]
    reading, writing = os.pipe()

    class Sleeping(subprocess.Popen):
        def __init__(self, _, stdin, stdout, stderr, env):
            super().__init__(program, stdin=stdin, stdout=writing)
            os.write(writing, f"{self.pid}\n".encode())

        def wait(self, timeout=None):
            if how == "interrupted" and timeout is None and not self.stdin.closed:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(processes.subprocess, "Popen", Sleeping)
    parent = os.fork()
    if parent == 0:
        with suppress(KeyboardInterrupt):
            run_cell(SimpleNamespace(name="PPO", method="ppo", options={}), tmp_path, None)
        os._exit(3)
    os.close(writing)
    with os.fdopen(reading) as file:
        if how == "killed":
            assert "there\n" in [file.readline(), file.readline()]  # beside the number of the process
            os.kill(parent, signal.SIGKILL)
        assert os.waitpid(parent, 0)[1] == (9 if how == "killed" else 3 << 8)
        assert "end" not in file.read()  # which returns when no process is left that could write


def test_a_built_in_shapes_data_have_the_lengths_asked_for(tmp_path, monkeypatch):
    small = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    monkeypatch.setattr("rlhf_fast.lab.compare.start._ROWS", 16)
    monkeypatch.setitem(SHAPES, "10M", Shape(small | {"hidden_size": 32}, small, 200))
    for prompt, response in ((12, 6), (20, 9)):  # the second time the models are there already
        sizes = {"prompt_length": prompt, "response_length": response, "lora_rank": 2}
        start = prepare(CompareConfig(model="10M", output_dir=str(tmp_path), **sizes))
        tokenizer = load_tokenizer(start.model)
        assert len(tokenizer) == 200
        row = json.loads(Path(start.pairs).read_text().splitlines()[3])
        lengths = [len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")]
        assert lengths == [prompt, response - 1, response - 1]  # an EOS follows the answers
    scorer = load_scorer(start.reward_adapter, trainable=False)
    assert scorer.score.in_features == 32 and load_scorer(start.small_critic).score.in_features == 16
    before = (tmp_path / "start" / "policy" / "model.safetensors").read_bytes()
    prepare(CompareConfig(model="10M", output_dir=str(tmp_path), seeds=[1], **(sizes | {"lora_rank": 3})))
    assert (tmp_path / "start" / "policy" / "model.safetensors").read_bytes() != before  # another seed: other weights
    assert not Path(start.reward_adapter).exists()  # it stood on the earlier policy
