"""Supervised fine-tuning: the mean negative log-likelihood of completion tokens and their EOS.

The denominator is the number of trained tokens of the whole batch, so micro-batches change nothing.
"""

import torch
from torch import Tensor

from rlhf_fast.config import SFTConfig
from rlhf_fast.data.encoding import SFTExample, encode_sft, load_rows, pad_id, pad_right
from rlhf_fast.lm.adapters import lora_of
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.loading import default_device, load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.training.batches import micro_batches, offline_batches
from rlhf_fast.training.learner import Learner, autocast
from rlhf_fast.training.resume import resume_directory
from rlhf_fast.training.run import Run


def train(config: SFTConfig) -> None:
    """Fine-tune `config.model` on `config.train_data`; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = load_tokenizer(config.model)
    data = encode_sft(load_rows(config.train_data, "sft"), tokenizer, config.max_length, config.max_prompt_length)
    held_out = None
    if config.eval_data:
        rows = load_rows(config.eval_data, "sft")
        held_out = encode_sft(rows, tokenizer, config.max_length, config.max_prompt_length).examples
    batches = offline_batches(len(data.examples), config.batch_size, config.epochs, config.seed)
    policy = load_policy(resume_directory(config) or config.model, lora=lora_of(config)).to(device)
    check_rows(policy, tokenizer, [e.input_ids for e in (*data.examples, *(held_out or []))], "max_length")
    learner = Learner(policy, config, len(batches))
    objectives = Objectives(policy, fused=config.fused_head)
    pad = pad_id(tokenizer)

    with Run(config, "SFT", len(batches), learners={"policy": learner}, tokenizer=tokenizer, show=("loss",)) as run:
        run.note(rows=len(data.examples), truncated_rows=data.truncated)
        for step in run.steps():
            batch = [data.examples[i] for i in batches[step - 1]]
            tokens = sum(sum(example.mask[1:]) for example in batch)
            loss = entropy = 0.0
            for rows in micro_batches(len(batch), config.micro_batch_size):
                with run.meter.phase("policy_update"):
                    with learner.autocast():
                        out = objectives.sft(*completions(batch[rows], pad, device), max(1, tokens))
                    out.loss.backward()
                loss += out.loss.item()
                entropy += out.entropy.sum().item() / max(1, tokens)
            with run.meter.phase("optimizer"):
                grad_norm = learner.step()
            metrics = {"loss": loss, "entropy": entropy, "num_tokens": tokens, "grad_norm": grad_norm, "lr": learner.lr}
            if held_out and step % (len(batches) // config.epochs) == 0:
                with run.meter.phase("evaluation"):
                    metrics["eval/loss"] = held_out_loss(objectives, held_out, pad, config)
            run.end_step(step, metrics)
        run.finish()


def completions(batch: list[SFTExample], pad: int, device: torch.device) -> tuple[Sequences, Tensor]:
    """Right-padded rows and their trained tokens [B, L-1], -100 elsewhere."""
    ids, real = (x.to(device) for x in pad_right([e.input_ids for e in batch], pad))
    trained = pad_right([list(map(int, e.mask)) for e in batch], 0)[0].bool().to(device)
    sequences = Sequences(ids[:, :1], real[:, :1], ids[:, 1:], real[:, 1:])
    return sequences, ids[:, 1:].masked_fill(~trained[:, 1:], -100)


@torch.no_grad()
def held_out_loss(objectives: Objectives, examples: list[SFTExample], pad: int, config: SFTConfig) -> float:
    """Mean negative log-likelihood per trained token."""
    device = objectives.model.device
    size = config.micro_batch_size or config.batch_size
    total: Tensor | float = 0.0
    with autocast(device, config.bf16):
        for rows in micro_batches(len(examples), size):
            total = total - objectives.logprobs(*completions(examples[rows], pad, device)).logprobs.double().sum()
    return float(total) / sum(sum(e.mask[1:]) for e in examples)
