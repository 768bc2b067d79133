"""TRL 1.16's SFTTrainer, RewardTrainer, DPOTrainer and RLOOTrainer as contenders. Run by `compare`.

Set up for speed, as far as the comparison allows: no gradient checkpointing and no bf16 (both are on by default), its
fused head (always on), the reference's log-probs taken once before DPO (`precompute_ref_log_probs`), nothing
evaluated, saved, shown or sent anywhere, and nothing logged after the first step.
"""

import importlib.util
from pathlib import Path
from typing import Any

import datasets
import torch
from replay import Completions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from turns import Turns


class ReplayingRLOOTrainer(RLOOTrainer):
    """Trains on given completions in the first step, so that it can be compared."""

    completions: Completions

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any) -> list[list[int]]:
        if self.state.global_step == 0:
            return [self.completions.of(prompt) for prompt in prompt_ids]
        return super()._generate_single_turn(prompt_ids, *others)


class TakeTurns(TrainerCallback):
    """Ends every step with a report."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """End every step but the first."""
        if state.global_step > 1:
            self.turns.end_step(dict, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """End the first step, with its numbers."""
        if state.global_step == 1:  # logged at the end of the step, after on_step_end
            facts = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            role = "reward" if self.turns.spec["method"] == "reward" else "policy"
            self.turns.end_step(lambda: facts, {role: model})


def trainer(spec: dict[str, Any]) -> Any:
    """The trainer of the spec's method."""
    options = {
        "output_dir": spec["output_dir"],
        "per_device_train_batch_size": spec["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": spec["max_grad_norm"],
        "gradient_checkpointing": False,
        "bf16": spec["bf16"],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_first_step": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    in_order = {"train_sampling_strategy": "sequential"}
    rows = datasets.Dataset.from_json(spec["rows"])
    models, method = spec["models"], spec["method"]
    tokenizer = AutoTokenizer.from_pretrained(models["start"])
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(models["start"], dtype=torch.float32)
    data = {"train_dataset": rows, "processing_class": tokenizer}
    if method == "sft":
        args = SFTConfig(**options, **in_order, max_length=None, shuffle_dataset=False)
        return SFTTrainer(model, args=args, **data)
    if method == "reward":
        return RewardTrainer(model, args=RewardConfig(**options, **in_order, max_length=None), **data)
    if method == "dpo":
        reference = AutoModelForCausalLM.from_pretrained(models["reference"], dtype=torch.float32)
        args = DPOConfig(**options, **in_order, beta=spec["beta"], max_length=None, precompute_ref_log_probs=True)
        return DPOTrainer(model, ref_model=reference, args=args, **data)
    model.config._name_or_path = models["reference"]  # where RLOOTrainer takes its reference from
    args = RLOOConfig(
        **options,
        shuffle_dataset=False,
        num_generations=spec["group_size"],
        max_completion_length=spec["response_length"],
        beta=spec["kl_coef"],
    )
    kind = ReplayingRLOOTrainer if spec["completions"] else RLOOTrainer
    made = kind(model, reward_funcs=reward_of(spec["reward"]), args=args, **data)
    if spec["completions"]:
        made.completions = Completions(spec["completions"])
    return made


def reward_of(path: str) -> Any:
    """The function of `file.py:function`, from its file, because this environment need not have the package."""
    file, _, function = path.rpartition(":")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, function)


def main() -> None:
    """Train as the spec on the command line says."""
    turns = Turns.from_command_line("trl")
    datasets.disable_progress_bars()
    made = trainer(turns.spec)
    made.remove_callback(PrinterCallback)
    made.add_callback(TakeTurns(turns))
    made.train()
    turns.end()


if __name__ == "__main__":
    main()
