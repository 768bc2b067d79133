"""What all contenders start from: models, rows and lengths, of the demo's world or of a checkpoint.

Every start has models of these names: `init` (where SFT begins), `sft` (the reference), `policy` (near `sft`, so that
the KL is not 0), `reward`, and `endless` copies of the last three, whose EOS is an id without a logit. Completions of
these copies have full length. Otherwise the comparison would depend on who stops decoding when: PPOTrainer never stops,
and ours drops rows that are done.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from bench.trainers import reward
from rlhf_fast.config import SFTConfig
from rlhf_fast.data.encoding import load_rows
from rlhf_fast.lab import world
from rlhf_fast.lab.demo import MODEL
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.stages import sft
from rlhf_fast.stages.init import init_model
from rlhf_fast.training.checkpoint import save

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """models: directories by name. rows: so many rows of a method. Lengths in tokens. reward: of RLOO, a function."""

    name: str
    models: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    rows: Callable[[str, int], Rows]
    reward: Callable[..., list[float]]
    prompt_length: int
    response_length: int
    length: int
    space: str  # what DPOTrainer has to find in front of an answer

    @property
    def reward_path(self) -> str:
        """The reward as `file.py:function`."""
        return f"{self.reward.__code__.co_filename}:{self.reward.__name__}"


def demo(directory: Path, rows: int = 3000) -> Start:
    """The demo's model, trained by SFT on so many of the embedded world's reviews."""
    directory.mkdir(parents=True)
    tokenizer = world.build_tokenizer()
    init, trained = directory / "init", directory / "sft"
    init_model(MODEL, tokenizer, init, seed=0)
    data = write_rows(directory / "sft_start.jsonl", world.sft_rows(rows, seed=1))
    sft.train(SFTConfig(model=str(init), output_dir=str(trained), train_data=data, batch_size=32, learning_rate=3e-3))
    return demo_with({"init": str(init), **_models(directory, tokenizer, trained, noise=lambda weight: 0.02)})


def demo_with(models: dict[str, str]) -> Start:
    """The demo's rows and lengths with models in these directories."""
    return Start(
        name="the demo's model on the embedded world's data",
        models=models,
        tokenizer=world.build_tokenizer(),
        rows=_demo_rows,
        reward=world.true_reward,
        prompt_length=18,  # longer than any text of the world, so nothing is cut
        response_length=40,  # as in the demo
        length=64,
        space=" ",
    )


def checkpoint(directory: Path, model: Path, data: Path) -> Start:
    """A checkpoint on rows of real lengths.

    data: a folder with sft.jsonl.gz (messages), pairs.jsonl.gz (prompt as messages, chosen, rejected) and
    prompts.jsonl.gz (prompt as messages), as `examples/smollm2/prepare.py` writes it.
    """
    directory.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    give_pad_of_its_own(tokenizer)
    models = _models(directory, tokenizer, model, noise=lambda weight: 0.01 * weight.std())
    return checkpoint_with({"init": str(model), **models}, model, data)


def checkpoint_with(models: dict[str, str], model: Path, data: Path) -> Start:
    """The rows and lengths of `checkpoint` with models in these directories."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    files = {"sft": "sft", "reward": "pairs", "dpo": "pairs", "rloo": "prompts", "ppo": "prompts"}

    def rows(method: str, number: int) -> Rows:
        name = files[method]
        kind = {"sft": "sft", "pairs": "preference", "prompts": "prompt"}[name]
        found = [_as_text(row, tokenizer) for row in load_rows(data / f"{name}.jsonl.gz", kind)]
        found = [row for row in found if _longest(row, tokenizer) <= 320]
        return (found * (number // len(found) + 1))[:number]

    return Start(
        name=f"{model.name} on {data.name}",
        models=models,
        tokenizer=tokenizer,
        rows=rows,
        reward=reward.vowels,
        prompt_length=128,
        response_length=48,
        length=320,
        space="",
    )


def give_pad_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token that is not EOS, because transformers' classifiers take every pad id at a row's end for padding."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        ends = {tokenizer.eos_token_id}
        others = [
            token
            for token, n in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
            if n not in ends
        ]
        tokenizer.pad_token = others[-1]


def _as_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The row with its prompt rendered by the template, because DPOTrainer and PPOTrainer are handed plain text."""
    prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
    text = {"prompt": tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)}
    if "messages" in row:
        text["completion"] = row["messages"][-1]["content"]
    return text | {key: row[key][-1]["content"] for key in ("chosen", "rejected") if key in row}


def _longest(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer(row["prompt"] + text)["input_ids"]) + 1 for text in ("", *list(row.values())[1:]))


def _models(
    directory: Path, tokenizer: PreTrainedTokenizerBase, trained: Path, noise: Callable[[torch.Tensor], Any]
) -> dict[str, str]:
    """A policy near the model in `trained`, a reward model on its trunk, and `endless` copies, by name."""
    paths = {"sft": trained, "policy": directory / "policy", "reward": directory / "reward"}
    torch.manual_seed(0)
    policy = load_policy(trained)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += noise(weight) * torch.randn_like(weight)
    torch.manual_seed(1)
    for name, model in {"policy": policy, "reward": load_scorer(trained)}.items():
        model.config.pad_token_id = tokenizer.pad_token_id
        save(paths[name], models={"": model}, tokenizer=tokenizer, state=None, extra_files={})
    for name, load in {"sft": load_policy, "policy": load_policy, "reward": load_scorer}.items():
        paths[f"endless {name}"] = without_end(load, paths[name], directory / f"endless_{name}")
    return {name: str(path) for name, path in paths.items()}


def without_end(load: Callable[[Path], PreTrainedModel], path: Path, copy: Path) -> Path:
    """A copy whose EOS is an id beyond the model's vocabulary."""
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = None  # which names the end of a turn
    model.config.eos_token_id = None
    if isinstance(model, GenerationMixin):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    save(copy, models={"": model}, tokenizer=tokenizer, state=None, extra_files={})
    return copy


def _demo_rows(method: str, number: int) -> Rows:
    if method == "sft":
        return world.sft_rows(number, seed=2)
    if method in ("reward", "dpo"):
        return _demo_pairs(number)
    return world.prompt_rows(number, seed=3)


def _demo_pairs(number: int) -> Rows:
    """Two endings of one review's beginning each, labelled by the true reward."""
    rows = world.sft_rows(2 * number + 64, seed=4)
    prompts = [row["prompt"] for row in rows[: number + 32]]
    endings = [row["completion"] for row in rows]
    return world.preference_rows(prompts, list(zip(endings, endings[number + 32 :], strict=False)), seed=5)[:number]


def write_rows(path: Path, rows: Rows) -> str:
    """Writes JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
