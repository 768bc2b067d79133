"""What the trainers are compared on: the cases, and the settings of all contenders.

Where the algorithms coincide, the first step has to be equal: same weights, same batch, same completions. Ours draws
the completions, and in their first step the others train on them. The policy is not its own reference, so that the KL
is not 0.

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

from bench.trainers.starts import Start, write_rows
from rlhf_fast.data.encoding import encode_preferences, encode_sft
from rlhf_fast.data.padding import epoch_batches

TRL, TRL_PPO = "TRL 1.16.0", "TRL 1.12.0"


@dataclass(frozen=True)
class Equality:
    """Numbers of the first step that have to agree. scale: differences count relative to at least this.

    per_token: ours is summed over a completion's tokens, theirs is the mean.
    """

    quantity: str
    ours: str
    theirs: str
    per_token: bool = False
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
    gradient_per_token: bool = False  # ours times the number of tokens of a completion is theirs
    settings: dict[str, float] = field(default_factory=dict)

    def quick(self) -> "Case":
        """The case with as few steps as show that everything runs."""
        return dataclasses.replace(self, steps_per_turn=1, warmup=2)

    def at_real_size(self) -> "Case":
        """The case for a checkpoint: a step takes seconds, so fewer rows and steps; bars of their own."""
        bar, batch_size = REAL_SIZE[self.method]
        return dataclasses.replace(self, bar=bar, batch_size=batch_size, steps_per_turn=1, warmup=1)


REAL_SIZE = {"sft": (1.2, 8), "reward": (1.2, 8), "dpo": (2.5, 8), "rloo": (2, 16), "ppo": (1.5, 16)}  # bar, batch
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
            Equality("score", "objective/scores", "rewards/{reward}/mean"),
            Equality("KL per token", "objective/kl", "kl", per_token=True),
            Equality("entropy per token", "objective/entropy", "entropy", per_token=True),
        ),
        gradient_per_token=True,
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


def write_specs(case: Case, start: Start, rounds: int, directory: Path, *, bf16: bool = False) -> dict[str, Path]:
    """Data and settings of one case, for us and for the rival: the paths of two JSON files, `ours` and `theirs`."""
    directory.mkdir(parents=True)
    steps = case.warmup + rounds * case.steps_per_turn
    roles = {"sft": {"start": "init"}, "reward": {"start": "reward"}, "dpo": {"start": "policy", "reference": "sft"}}
    online = {"start": "endless policy", "reference": "endless sft", "reward": "endless reward"}
    roles = {role: start.models[name] for role, name in roles.get(case.method, online).items()}
    rows, in_their_words = _rows(case, start, steps)
    spec = {
        "method": case.method,
        "steps": steps,
        "warmup": case.warmup,
        "steps_per_turn": case.steps_per_turn,
        "batch_size": case.batch_size,
        "learning_rate": 1e-5,
        "bf16": bf16,
        "max_grad_norm": 1e6,  # clipping is on and never bites: the gradients can be compared after it
        "response_length": start.response_length,
        "models": roles,
        "completions": str(directory / "completions.pt"),
        "reward": start.reward_path,
        **case.settings,
    }
    options = {
        "model": roles["start"],
        "output_dir": str(directory / "ours"),
        "train_data": write_rows(directory / "ours.jsonl", rows),
        "batch_size": case.batch_size,
        "learning_rate": spec["learning_rate"],
        "max_grad_norm": spec["max_grad_norm"],
        "lr_schedule": "constant",
        "bf16": bf16,
        "max_prompt_length": start.prompt_length,
        **case.settings,
    }
    if case.method in ("rloo", "ppo"):
        options |= {"steps": steps, "reference": roles["reference"], "max_response_length": start.response_length}
        options["reward"] = start.reward_path if case.method == "rloo" else roles["reward"]
    else:
        options["max_length"] = start.length
    if case.method == "ppo":  # because PPOTrainer does not clip
        options |= {"value_learning_rate": spec["learning_rate"], "max_grad_norm": 0}
    if case.method == "dpo":
        options["reference"] = roles["reference"]
    if case.method == "reward":
        options["normalize_samples"] = 0
    config = {"sft": "SFTConfig", "reward": "RewardConfig"}.get(case.method, f"{case.method.upper()}Config")
    spec["ours"] = {"stage": case.method, "config": config, "options": options}
    spec["rows"] = write_rows(directory / "theirs.jsonl", in_their_words)
    paths = {}
    for side in ("ours", "theirs"):
        own = {"output_dir": str(directory / side), "gradients": str(directory / f"{side}.pt")}
        paths[side] = directory / f"{side}.json"
        paths[side].write_text(json.dumps(spec | own, indent=2))
    return paths


def _rows(case: Case, start: Start, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Our rows, and the rival's rows: encoded as the rival wants them, in the order in which we train on them."""
    tokenizer, per_step = start.tokenizer, case.batch_size
    if case.method in ("rloo", "ppo"):
        per_step //= case.settings.get("group_size", 1)
    number = steps * per_step
    order = [row for batch in epoch_batches(number, per_step, seed=0, epoch=0) for row in batch]
    rows = start.rows(case.method, number)
    theirs: list[dict[str, Any]] = rows
    if case.method == "sft":
        examples = encode_sft(rows, tokenizer, start.length, start.prompt_length).examples
        theirs = [
            {"input_ids": ids, "labels": [t if trained else -100 for t, trained in zip(ids, mask, strict=True)]}
            for ids, mask in examples
        ]
    elif case.method == "reward":
        examples = encode_preferences(rows, tokenizer, start.length, start.prompt_length).examples
        theirs = [
            {"chosen_ids": e.prompt_ids + e.chosen_ids, "rejected_ids": e.prompt_ids + e.rejected_ids} for e in examples
        ]
    elif case.method == "dpo":  # DPOTrainer takes text only; EOS it adds itself
        theirs = [{k: v if k == "prompt" else f"{start.space}{v}" for k, v in row.items()} for row in rows]
    elif case.method == "ppo":
        theirs = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
    return rows, [theirs[i] for i in order]
