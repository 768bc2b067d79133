"""TRL 1.12's PPOTrainer (`trl.experimental.ppo`, the last there was) as a contender. Run by `compare`.

Set up for speed as in `run_trl`; one rollout forward for the whole batch. It always samples completions of full
length, and logs every step.
"""

from typing import Any

import datasets
import torch
import trl.experimental.ppo.ppo_trainer as module
from replay import Completions
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from turns import Turns


class TakeTurns(TrainerCallback):
    """Ends every step with a report."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.facts = turns, {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the numbers of the step."""
        self.facts = {key: value for key, value in logs.items() if isinstance(value, int | float)}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """End the step."""
        self.turns.end_step(lambda: self.facts, {"policy": model.policy, "value": model.value_model})


def replay_first(completions: Completions, pad: int, temperature: float) -> None:
    """Makes the first rollout take the given completions; their log-probs come from a pass over them."""
    sample = module.batch_generation

    @torch.no_grad()
    def first(model: torch.nn.Module, queries: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        module.batch_generation = sample
        drawn = torch.tensor([completions.of(query[query != pad].tolist()) for query in queries])
        both = torch.cat([queries, drawn], dim=1)
        logits = module.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / temperature

    module.batch_generation = first


def main() -> None:
    """Train as the spec on the command line says."""
    turns = Turns.from_command_line("trl")
    spec, models = turns.spec, turns.spec["models"]
    datasets.disable_progress_bars()
    args = module.PPOConfig(
        output_dir=spec["output_dir"],
        per_device_train_batch_size=spec["batch_size"],
        local_rollout_forward_batch_size=spec["batch_size"],
        total_episodes=spec["batch_size"] * spec["steps"],
        num_ppo_epochs=spec["epochs"],
        num_mini_batches=spec["minibatches"],
        response_length=spec["response_length"],
        temperature=1.0,
        kl_coef=spec["kl_coef"],
        vf_coef=1.0,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=spec["bf16"],
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(models["start"], padding_side="left")
    # The trainer takes a sampled pad token for the end, and writes 0 over every pad token before a model sees it. An id
    # beyond the vocabulary cannot be sampled.
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    rows = datasets.Dataset.from_json(spec["rows"])
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(models[role], dtype=torch.float32) for role in ("start", "reference")
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(models["reward"], dtype=torch.float32) for _ in range(2)
    )
    trainer = module.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
    )
    in_order = DataLoader(rows, batch_size=spec["batch_size"], collate_fn=trainer.data_collator, drop_last=True)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TakeTurns(turns))
    replay_first(Completions(spec["completions"]), tokenizer.pad_token_id, args.temperature)
    trainer.train()
    turns.end()


if __name__ == "__main__":
    main()
