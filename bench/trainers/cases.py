"""What the trainers are compared on: the demo's model, the embedded world's data, and the settings of all contenders.

Where the algorithms coincide, the first step has to be equal: same weights, same batch, same completions. Ours draws
the completions, and in their first step the others train on them. The policy is not its own reference, so that the KL
is not 0.

Completions have full length, because EOS is an id without a logit in the model. Otherwise the comparison would depend
on who stops decoding when: PPOTrainer never stops, and ours drops rows that are done.

Where the two differ on purpose:
- RLOO: ours averages over tokens, TRL over completions. With completions of one length the gradients differ by that
  length, which Adam takes out again. The value of TRL's loss is the mean advantage, which is 0. Ours has another value
  and the same gradient, so the values are not compared.
- PPO: ours puts the score on the EOS token, TRL on the token after it, if there is one. TRL does not clip gradients,
  so ours does not here. Ours has two optimizers, TRL one, with `vf_coef` (here 1) between the losses.
- Ours leaves padding out of every layer but attention; TRL pads (its padding-free SFT needs flash-attn, so a GPU).
- A step of ours ends with its metrics in a file; TRL's are computed, and written only for PPO and the first step.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationMixin

from rlhf_fast.config import SFTConfig
from rlhf_fast.data.encoding import encode_preferences, encode_sft
from rlhf_fast.lab.demo import MODEL, TRUE_REWARD
from rlhf_fast.lab.world import build_tokenizer, preference_rows, prompt_rows, sft_rows
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.stages import sft
from rlhf_fast.stages.init import init_model
from rlhf_fast.training.batches import offline_batches
from rlhf_fast.training.checkpoint import save

TRL, TRL_PPO = "TRL 1.16.0", "TRL 1.12.0"
RESPONSE_LENGTH = 40  # as in the demo
PROMPT_LENGTH, LENGTH = 18, 64  # longer than any text of the world, so nothing is cut


@dataclass(frozen=True)
class Equality:
    """Numbers of the first step that have to agree. scale: differences count relative to at least this."""

    quantity: str
    ours: str
    theirs: str
    factor: float = 1.0  # ours times this is theirs
    scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """bar: our steps/s as a multiple of the rival's. settings: what both sides are told in their own words."""

    method: str
    rival: str
    trainer: str
    bar: float
    batch_size: int
    steps_per_turn: int
    warmup: int = 5
    equalities: tuple[Equality, ...]
    gradient_factor: float = 1.0
    settings: dict[str, float] = field(default_factory=dict)

    def quick(self) -> "Case":
        """The case with as few steps as show that everything runs."""
        return dataclasses.replace(self, steps_per_turn=1, warmup=2)


LOSS = Equality("loss", "loss", "loss")
CASES = (
    Case(method="sft", rival=TRL, trainer="SFTTrainer", bar=1.1, batch_size=32, steps_per_turn=20, equalities=(LOSS,)),
    Case(
        method="reward", rival=TRL, trainer="RewardTrainer", bar=1.1, batch_size=32, steps_per_turn=20,
        equalities=(LOSS, Equality("pair accuracy", "accuracy", "accuracy")),
    ),
    Case(
        method="dpo", rival=TRL, trainer="DPOTrainer", bar=1.3, batch_size=32, steps_per_turn=20,
        equalities=(
            LOSS,
            Equality("reward margin", "rewards/margins", "rewards/margins", scale=1.0),  # of much larger rewards
            Equality("log-prob of the chosen", "logps/chosen", "logps/chosen"),
        ),
        settings={"beta": 0.3},
    ),
    Case(
        method="rloo", rival=TRL, trainer="RLOOTrainer", bar=2, batch_size=64, steps_per_turn=4,
        equalities=(
            Equality("score", "objective/scores", "rewards/true_reward/mean"),
            Equality("KL per token", "objective/kl", "kl", factor=1 / RESPONSE_LENGTH),
            Equality("entropy per token", "objective/entropy", "entropy", factor=1 / RESPONSE_LENGTH),
        ),
        gradient_factor=RESPONSE_LENGTH,
        settings={"group_size": 4, "kl_coef": 0.05},
    ),
    Case(
        method="ppo", rival=TRL_PPO, trainer="PPOTrainer", bar=2, batch_size=64, steps_per_turn=2, warmup=3,
        equalities=(
            # Advantages have mean 0 and variance 1, so their mean, the policy's loss, is compared on a scale of 1.
            Equality("policy loss", "loss/policy_avg", "loss/policy_avg", scale=1.0),
            Equality("value loss", "loss/value_avg", "loss/value_avg"),
            Equality("score", "objective/scores", "objective/scores"),
            Equality("KL", "objective/kl", "objective/kl"),
        ),
        settings={"epochs": 4, "minibatches": 1, "kl_coef": 0.05},
    ),
)  # fmt: skip


def prepare(directory: Path) -> dict[str, str]:
    """Makes a start with random weights, an SFT model, a policy near it and a reward model, and `endless` copies.

    Returns the directories of the models by name.
    """
    directory.mkdir(parents=True)
    paths = {name: directory / name for name in ("init", "sft", "policy", "reward")}
    tokenizer = build_tokenizer()
    init_model(MODEL, tokenizer, paths["init"], seed=0)
    data = _write(directory / "sft_start.jsonl", sft_rows(3000, seed=1))
    sft.train(
        SFTConfig(
            model=str(paths["init"]), output_dir=str(paths["sft"]), train_data=data, batch_size=32, learning_rate=3e-3
        )
    )
    torch.manual_seed(0)
    policy = load_policy(paths["sft"])
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn_like(weight)
    torch.manual_seed(1)
    for name, model in {"policy": policy, "reward": load_scorer(paths["sft"])}.items():
        save(paths[name], models={"": model}, tokenizer=tokenizer, state=None, extra_files={})
    for name, load in {"sft": load_policy, "policy": load_policy, "reward": load_scorer}.items():
        paths[f"endless {name}"] = _without_end(load, paths[name])
    return {name: str(path) for name, path in paths.items()}


def _without_end(load: Any, path: Path) -> Path:
    """A copy whose EOS is an id beyond the model's vocabulary."""
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    model.config.eos_token_id = None
    if isinstance(model, GenerationMixin):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    without = path.with_name(f"endless_{path.name}")
    save(without, models={"": model}, tokenizer=tokenizer, state=None, extra_files={})
    return without


def write_specs(case: Case, models: dict[str, str], rounds: int, directory: Path) -> dict[str, Path]:
    """Data and settings of one case, for us and for the rival: the paths of two JSON files, `ours` and `theirs`."""
    directory.mkdir(parents=True)
    steps = case.warmup + rounds * case.steps_per_turn
    roles = {"sft": {"start": "init"}, "reward": {"start": "reward"}, "dpo": {"start": "policy", "reference": "sft"}}
    online = {"start": "endless policy", "reference": "endless sft", "reward": "endless reward"}
    roles = {role: models[name] for role, name in roles.get(case.method, online).items()}
    rows, in_their_words = _rows(case, steps)
    spec = {
        "method": case.method,
        "steps": steps,
        "warmup": case.warmup,
        "steps_per_turn": case.steps_per_turn,
        "batch_size": case.batch_size,
        "learning_rate": 1e-5,
        "max_grad_norm": 1e6,  # clipping is on and never bites: the gradients can be compared after it
        "response_length": RESPONSE_LENGTH,
        "models": roles,
        "completions": str(directory / "completions.pt"),
        **case.settings,
    }
    options = {
        "model": roles["start"],
        "output_dir": str(directory / "ours"),
        "train_data": _write(directory / "ours.jsonl", rows),
        "batch_size": case.batch_size,
        "learning_rate": spec["learning_rate"],
        "max_grad_norm": spec["max_grad_norm"],
        "lr_schedule": "constant",
        "max_prompt_length": PROMPT_LENGTH,
        **case.settings,
    }
    if case.method in ("rloo", "ppo"):
        options |= {"steps": steps, "reference": roles["reference"], "max_response_length": RESPONSE_LENGTH}
        options["reward"] = TRUE_REWARD if case.method == "rloo" else roles["reward"]
    else:
        options["max_length"] = LENGTH
    if case.method == "ppo":  # because PPOTrainer does not clip
        options |= {"value_learning_rate": spec["learning_rate"], "max_grad_norm": 0}
    if case.method == "dpo":
        options["reference"] = roles["reference"]
    if case.method == "reward":
        options["normalize_samples"] = 0
    config = {"sft": "SFTConfig", "reward": "RewardConfig"}.get(case.method, f"{case.method.upper()}Config")
    spec["ours"] = {"stage": case.method, "config": config, "options": options}
    spec["rows"] = _write(directory / "theirs.jsonl", in_their_words)
    paths = {}
    for side in ("ours", "theirs"):
        own = {"output_dir": str(directory / side), "gradients": str(directory / f"{side}.pt")}
        paths[side] = directory / f"{side}.json"
        paths[side].write_text(json.dumps(spec | own, indent=2))
    return paths


def _rows(case: Case, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Our rows, and the rival's rows: encoded as the rival wants them, in the order in which we train on them."""
    tokenizer, per_step = build_tokenizer(), case.batch_size
    if case.method in ("rloo", "ppo"):
        per_step //= case.settings.get("group_size", 1)
    number = steps * per_step
    order = [row for batch in offline_batches(number, per_step, epochs=1, seed=0) for row in batch]
    if case.method == "sft":
        rows = sft_rows(number, seed=2)
        examples = encode_sft(rows, tokenizer, LENGTH, PROMPT_LENGTH).examples
        theirs = [
            {"input_ids": ids, "labels": [t if trained else -100 for t, trained in zip(ids, mask, strict=True)]}
            for ids, mask in examples
        ]
    elif case.method in ("reward", "dpo"):
        rows = _pairs(number)
        examples = encode_preferences(rows, tokenizer, LENGTH, PROMPT_LENGTH).examples
        theirs = [
            {"chosen_ids": e.prompt_ids + e.chosen_ids, "rejected_ids": e.prompt_ids + e.rejected_ids} for e in examples
        ]
        if case.method == "dpo":  # DPOTrainer takes text only; EOS it adds itself
            theirs = [{k: v if k == "prompt" else f" {v}" for k, v in row.items()} for row in rows]
    else:
        rows = prompt_rows(number, seed=3)
        theirs = rows
        if case.method == "ppo":
            theirs = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
    return rows, [theirs[i] for i in order]


def _pairs(number: int) -> list[dict[str, str]]:
    """Two endings of one review's beginning each, labelled by the true reward."""
    rows = sft_rows(2 * number + 64, seed=4)
    prompts = [row["prompt"] for row in rows[: number + 32]]
    endings = [row["completion"] for row in rows]
    return preference_rows(prompts, list(zip(endings, endings[number + 32 :], strict=False)), seed=5)[:number]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
