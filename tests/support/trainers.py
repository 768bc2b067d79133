"""Trainers of other libraries on a tiny model: the same run twice, with this package inside and without it."""

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
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


def labelled_rows(number: int) -> datasets.Dataset:
    return sft_rows(number).add_column("label", [n % 3 != 0 for n in range(number)])


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


def made(name: str, tmp_path: Path, model: Any, *, adapter: Any = None, given: Any = None, **options: Any) -> Any:
    """A trainer of TRL by its name. model: a model, or a directory. given: more arguments; options: of the config."""
    import trl  # which needs Python 3.11

    torch.manual_seed(3)
    base = PLAIN | {"gradient_checkpointing": False, "output_dir": str(tmp_path)}
    given = {"processing_class": tokenizer(), **(given or {})}
    if adapter:
        given["peft_config"] = copy.deepcopy(adapter)
    if name in ("RLOO", "GRPO"):
        base |= {"num_generations": 4, "max_completion_length": 4, "beta": 0.05}
        base |= {"per_device_train_batch_size": 8}  # two prompts, of which the shorter is padded
        given["reward_funcs"] = reward_of_words
    if name == "Reward":
        model = classifier()
    rows = {"DPO": pair_rows, "Reward": pair_rows, "KTO": labelled_rows}.get(name, sft_rows)(80)
    args = getattr(trl, f"{name}Config")(**base | options)
    return getattr(trl, f"{name}Trainer")(model, args=args, train_dataset=rows, **given)


def refused(trainer: Any, message: str) -> None:
    """`accelerate_trainer` refuses the trainer in one line, and changes nothing."""
    from rlhf_fast.integrations.trl import accelerate_trainer

    forward = trainer.model.forward
    with pytest.raises(ValueError, match=rf"^trainer(\.model)?: expected .*{message}") as caught:
        accelerate_trainer(trainer)
    assert "\n" not in str(caught.value)
    assert trainer.model.forward == forward


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
