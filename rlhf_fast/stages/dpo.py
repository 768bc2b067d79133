"""Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling.

The reference's log-probs are computed once for all pairs and reused in every epoch; the reference model is then
dropped. Chosen and rejected answers of a pair go through the policy in one forward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast.config import DPOConfig
from rlhf_fast.data import PreferenceExample, encode_preferences, load_rows, pad_id, pad_left, pad_right
from rlhf_fast.evaluation import make_evaluator
from rlhf_fast.models import Sequences, default_device, load_policy, load_tokenizer, response_logprobs
from rlhf_fast.ops import dpo_loss
from rlhf_fast.training import Learner, Run, micro_batches, offline_batches, resume_directory


class PairLogps(NamedTuple):
    """Summed log-probs and token counts [B] of both answers."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


def train(config: DPOConfig) -> None:
    """Train `config.model` on preference pairs; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = load_tokenizer(config.model)
    rows = load_rows(config.train_data, "preference")
    data = encode_preferences(rows, tokenizer, config.max_length, config.max_prompt_length)
    batches = offline_batches(len(data.examples), config.batch_size, config.epochs, config.seed)
    pad = pad_id(tokenizer)
    policy = load_policy(resume_directory(config) or config.model).to(device)
    reference = load_policy(config.reference or config.model, trainable=False).to(device)
    learner = Learner(policy, config, len(batches))
    size = config.micro_batch_size or config.batch_size
    evaluator = make_evaluator(config, tokenizer, reference, None)

    with Run(
        config,
        "DPO",
        len(batches),
        learners={"policy": learner},
        tokenizer=tokenizer,
        evaluator=evaluator,
        show=("loss", "rewards/accuracies", "rewards/margins"),
    ) as run:
        run.note(rows=len(data.examples), truncated_rows=data.truncated)
        with run.meter.phase("reference"), torch.no_grad(), learner.autocast():
            parts = [
                pair_logps(reference, data.examples[rows], pad) for rows in micro_batches(len(data.examples), size)
            ]
        ref_logps = PairLogps(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if evaluator is None:
            del reference
        for step in run.steps():
            indices = torch.tensor(batches[step - 1])
            sums: dict[str, float] = {}
            for rows in micro_batches(len(indices), config.micro_batch_size):
                micro = indices[rows]
                weight = len(micro) / len(indices)
                with run.meter.phase("policy_update"):
                    with learner.autocast():
                        logps = pair_logps(policy, [data.examples[i] for i in micro], pad, training=True)
                    out = dpo_loss(
                        logps.chosen,
                        logps.rejected,
                        ref_logps.chosen[micro],
                        ref_logps.rejected[micro],
                        beta=config.beta,
                        loss_type=config.loss_type,
                        label_smoothing=config.label_smoothing,
                        chosen_lengths=logps.chosen_lengths,
                        rejected_lengths=logps.rejected_lengths,
                    )
                    loss = out.losses.mean()
                    (loss * weight).backward()
                margins = out.chosen_rewards - out.rejected_rewards
                for name, value in {
                    "loss": loss,
                    "rewards/chosen": out.chosen_rewards.mean(),
                    "rewards/rejected": out.rejected_rewards.mean(),
                    "rewards/margins": margins.mean(),
                    "rewards/accuracies": (margins > 0).float().mean(),
                    "logps/chosen": logps.chosen.mean(),
                    "logps/rejected": logps.rejected.mean(),
                }.items():
                    sums[name] = sums.get(name, 0.0) + weight * value.item()
            with run.meter.phase("optimizer"):
                grad_norm = learner.step()
            run.end_step(step, {**sums, "grad_norm": grad_norm, "lr": learner.lr})
        run.finish()


def pair_logps(
    model: PreTrainedModel, batch: list[PreferenceExample], pad: int, *, training: bool = False
) -> PairLogps:
    prompts = pad_left([e.prompt_ids for e in batch] * 2, pad)
    responses = pad_right([e.chosen_ids for e in batch] + [e.rejected_ids for e in batch], pad)
    sequences = Sequences(*prompts, *responses).to(model.device)
    chosen, rejected = response_logprobs(model, sequences, training=training).logprobs.sum(dim=1).chunk(2)
    return PairLogps(chosen, rejected, *sequences.response_mask.sum(dim=1).float().chunk(2))
