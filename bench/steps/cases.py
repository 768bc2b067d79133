"""The models, rows and settings that whole steps are measured on.

Completions never end early, so that every step of a run does the same work. Settings of the checkpoint's steps are
those of `bench trainers`, so that the CPU time of a step stands beside the rivals'.
"""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from bench.trainers import starts
from rlhf_fast.data.rows import load_rows, write_rows
from rlhf_fast.lab.compare import start
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.start import Shape, llama
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.methods import STAGES, load
from rlhf_fast.training.checkpoint import save

TRAINING = ("sft", "dpo", "ppo", "remax")
STEPS = (*TRAINING, "decoding")
TOY = Shape(llama(32, 64, 2, 2, 2), llama(32, 64, 1, 2, 2), 300)


class Sizes(NamedTuple):
    """batch: rows of a step of each stage, pairs for DPO. Lengths in tokens. new_tokens: of the measured decoding."""

    batch: dict[str, int]
    prompt_length: int
    response_length: int
    length: int
    epochs: int  # of PPO over a rollout
    prompts: int
    new_tokens: int


AT_60M = Sizes({"sft": 8, "dpo": 8, "ppo": 16, "remax": 16}, 64, 32, 128, 1, 32, 32)
AT_A_CHECKPOINT = Sizes({"sft": 8, "dpo": 8, "ppo": 16, "remax": 16}, 128, 48, 320, 4, 16, 40)
AT_TOY = Sizes({"sft": 4, "dpo": 2, "ppo": 4, "remax": 4}, 8, 4, 16, 1, 4, 5)


@dataclasses.dataclass(frozen=True)
class Models:
    """A model and what its steps need. Paths of directories and files.

    policy: where online stages start, which never ends a completion. rows: of a kind of rows, so many, as a file.
    """

    name: str
    model: str
    policy: str
    reward: str
    rows: Callable[[str, int], str]
    sizes: Sizes

    def options(self, stage: str, steps: int, *, bf16: bool) -> dict[str, Any]:
        """The options of a stage's config but its directory, for so many steps."""
        row, sizes = STAGES[stage], self.sizes
        batch = sizes.batch[stage]
        values: dict[str, Any] = {
            "model": self.policy if row.online else self.model,
            "reward": self.reward,
            "train_data": self.rows(row.rows, batch * steps),
            "batch_size": batch,
            "steps": steps,
            "epochs": sizes.epochs if row.online else 1,
            "minibatches": 1,
            "learning_rate": 1e-7,  # random weights drift with any learning rate
            "lr_schedule": "constant",
            "bf16": bf16,
            "max_prompt_length": sizes.prompt_length,
            "max_response_length": sizes.response_length,
            "max_length": sizes.length,
        }
        fields = {field.name for field in dataclasses.fields(load(row.config))}
        return {name: value for name, value in values.items() if name in fields}


def untrained(name: str, shape: Shape, sizes: Sizes, directory: Path) -> Models:
    """Models of a shape with random weights, and rows of one length, made in `directory`."""
    half = sizes.length // 2
    config = CompareConfig(model="60M", output_dir=str(directory), prompt_length=half, response_length=half)
    made = start.untrained(directory, shape, config)
    assert made.pairs is not None
    pairs = load_rows(made.pairs, "preference")
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    found = {"preference": pairs, "prompt": load_rows(made.prompts, "prompt"), "sft": completions}
    return Models(name, made.model, made.model, made.reward, _files(directory, lambda kind, _: found[kind]), sizes)


def checkpoint(model: Path, data: Path, sizes: Sizes, directory: Path, *, online: bool) -> Models:
    """A checkpoint on rows of real lengths, as `trainers` takes it. online: whether the online stages' models are made.

    data: as in `starts.checkpoint`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    policy, reward = (directory / "endless_policy", directory / "endless_reward") if online else (model, model)
    if online:
        tokenizer = AutoTokenizer.from_pretrained(model)
        starts.give_pad_of_its_own(tokenizer)
        scorer = load_scorer(model)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        save(directory / "reward", models={"": scorer}, tokenizer=tokenizer, state=None, extra_files={})
        starts.without_end(load_scorer, directory / "reward", reward)
        starts.without_end(load_policy, model, policy)
        del scorer
        gc.collect()
    found = starts.checkpoint_with({}, model, data)
    named = {"sft": "sft", "preference": "dpo", "prompt": "ppo"}
    rows = _files(directory, lambda kind, number: found.rows(named[kind], number))
    return Models(model.name, str(model), str(policy), str(reward), rows, sizes)


def _files(directory: Path, rows: Callable[[str, int], list[dict[str, Any]]]) -> Callable[[str, int], str]:
    def written(kind: str, number: int) -> str:
        path = directory / f"{kind}_{number}.jsonl"
        write_rows(path, rows(kind, number)[:number])
        return str(path)

    return written
