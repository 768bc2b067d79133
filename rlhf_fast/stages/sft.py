"""Supervised fine-tuning: the mean negative log-likelihood of completion tokens and their EOS.

The denominator is the number of trained tokens of the whole batch, so micro-batches change nothing.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.config import SFTConfig
from rlhf_fast.data import SFTExample, encode_sft, load_rows, pad_id, pad_right
from rlhf_fast.models import Sequences, default_device, load_policy, load_tokenizer, response_logits
from rlhf_fast.ops import TokenLogprobs, token_logprobs
from rlhf_fast.training import Learner, Run, autocast, micro_batches, offline_batches, resume_directory


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
    policy = load_policy(resume_directory(config) or config.model).to(device)
    learner = Learner(policy, config, len(batches))
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
                        out = completion_logprobs(policy, batch[rows], pad, training=True)
                    micro_loss = -out.logprobs.sum() / max(1, tokens)
                    micro_loss.backward()
                loss += micro_loss.item()
                entropy += out.entropy.detach().sum().item() / max(1, tokens)
            with run.meter.phase("optimizer"):
                grad_norm = learner.step()
            metrics = {"loss": loss, "entropy": entropy, "num_tokens": tokens, "grad_norm": grad_norm, "lr": learner.lr}
            if held_out and step % (len(batches) // config.epochs) == 0:
                with run.meter.phase("evaluation"):
                    metrics["eval/loss"] = held_out_loss(policy, held_out, pad, config)
            run.end_step(step, metrics)
        run.finish()


def completion_logprobs(model: PreTrainedModel, batch: list[SFTExample], pad: int, *, training: bool) -> TokenLogprobs:
    """Log-probability and entropy [B, L-1] of the trained tokens of right-padded rows; 0 elsewhere."""
    ids, real = (x.to(model.device) for x in pad_right([e.input_ids for e in batch], pad))
    trained = pad_right([list(map(int, e.mask)) for e in batch], 0)[0].bool().to(model.device)
    sequences = Sequences(ids[:, :1], real[:, :1], ids[:, 1:], real[:, 1:])
    targets = ids[:, 1:].masked_fill(~trained[:, 1:], -100)
    return token_logprobs(response_logits(model, sequences), targets, inplace_backward=training)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, examples: list[SFTExample], pad: int, config: SFTConfig) -> float:
    """Mean negative log-likelihood per trained token."""
    size = config.micro_batch_size or config.batch_size
    total: Tensor | float = 0.0
    with autocast(model.device, config.bf16):
        for rows in micro_batches(len(examples), size):
            total = total - completion_logprobs(model, examples[rows], pad, training=False).logprobs.double().sum()
    return float(total) / sum(sum(e.mask[1:]) for e in examples)
