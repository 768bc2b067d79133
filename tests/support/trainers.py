"""Trainers of other libraries on a tiny model: the same run twice, with this package inside and without it."""

import random
from functools import cache
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast, set_seed

from tests.support.models import model_config, random_policy

WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 20,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-6,  # with less, an entry whose gradient is rounding alone moves as far as any other
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 4,
}

datasets.disable_progress_bars()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def text(words: int, generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def sft_rows(number: int) -> datasets.Dataset:
    """Prompts of 2 to 8 words, completions of 2 to 9."""
    r = random.Random(0)
    return datasets.Dataset.from_list(
        [{"prompt": text(r.randint(2, 8), r), "completion": f" {text(r.randint(2, 9), r)}"} for _ in range(number)]
    )


def pair_rows(number: int) -> datasets.Dataset:
    r = random.Random(1)
    return datasets.Dataset.from_list(
        [
            {"prompt": text(r.randint(2, 6), r)}
            | {name: f" {text(r.randint(1, 7), r)}" for name in ("chosen", "rejected")}
            for _ in range(number)
        ]
    )


def reward_of_words(completions: list[str], **_: Any) -> list[float]:
    """The share of words that end in 7, less a tenth of the length."""
    return [sum(w.endswith("7") for w in c.split()) / 4 - len(c.split()) / 10 for c in completions]


def classifier(architecture: str = "llama", seed: int = 0) -> Any:
    settings = model_config(architecture, 64)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(settings.pop("model_type"), num_labels=1, **settings)
    return AutoModelForSequenceClassification.from_config(config)


def policy(architecture: str = "llama", seed: int = 0) -> Any:
    return random_policy(architecture, 64, seed)


def history(trainer: Any) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Train; returns each step's numbers, without times, and all trained weights side by side."""
    set_seed(0)  # the sampling of completions
    trainer.train()
    rows = [
        {k: v for k, v in row.items() if isinstance(v, float | int) and not k.endswith(("time", "runtime"))}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return rows, torch.cat(weights)


def assert_same_training(plain: Any, changed: Any, steps: int = 20, tolerance: float = 1e-5) -> None:
    """Both trainers are trained; every number that is logged agrees, and so do the weights behind the last step."""
    (rows, weights), (rows_too, weights_too) = history(plain), history(changed)
    assert len(rows) == len(rows_too) == steps
    for step, (row, row_too) in enumerate(zip(rows, rows_too, strict=True)):
        assert row.keys() == row_too.keys()
        for name in row:
            scale = max(1.0, abs(row[name]))
            assert abs(row[name] - row_too[name]) <= tolerance * scale, (step, name, row[name], row_too[name])
    assert (weights - weights_too).abs().max() <= tolerance
