"""A trainer of TRL or of transformers, as it is or with this package inside. Run by `bench.integrations`.

The spec's `change` is "plain" or "ours". Completions are drawn from the trainer's seed, so that both sides have the
same.
"""

from typing import Any

import datasets
import torch
from run_trl import TakeTurns, trainer
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
from turns import Turns


def plain_trainer(spec: dict[str, Any], kind: type[Trainer]) -> Trainer:
    """transformers' Trainer on encoded rows, padded on the right."""
    args = TrainingArguments(
        output_dir=spec["output_dir"],
        per_device_train_batch_size=spec["batch_size"],
        num_train_epochs=1,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=spec["max_grad_norm"],
        bf16=spec["bf16"],
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        logging_first_step=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
        padded = {
            name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
            for name, fill in (("input_ids", 0), ("labels", -100))
        }
        return padded | {"attention_mask": (torch.arange(width) < lengths).long()}

    model = AutoModelForCausalLM.from_pretrained(spec["models"]["start"], dtype=torch.float32)
    rows = datasets.Dataset.from_json(spec["rows"])
    return kind(model, args=args, train_dataset=rows, data_collator=collate)


def changed(spec: dict[str, Any]) -> Any:
    """The trainer of the spec, with its change."""
    ours = spec["change"] == "ours"
    if spec["trainer"] == "Trainer":
        if ours:
            from rlhf_fast.integrations.trainer import FusedTrainer
        return plain_trainer(spec, FusedTrainer if ours else Trainer)
    made = trainer(spec)
    if ours:
        from rlhf_fast.integrations.trl import accelerate_trainer

        accelerate_trainer(made)
    return made


def main() -> None:
    """Train as the spec on the command line says."""
    turns = Turns.from_command_line("trl")
    datasets.disable_progress_bars()
    made = changed(turns.spec)
    made.remove_callback(PrinterCallback)
    made.add_callback(TakeTurns(turns))
    made.train()
    turns.end()


if __name__ == "__main__":
    main()
