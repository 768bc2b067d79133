"""Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling.

The reference's log-probs are computed once for all pairs, held-out ones too, and reused in every epoch; the reference
model is then dropped. Chosen and rejected answers of a pair go through the policy in one forward pass.
"""

from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import DPOConfig
from rlhf_fast.data.encoding import (
    Encoded,
    PreferenceExample,
    encode_preferences,
    load_rows,
    pad_id,
    pad_left,
    pad_right,
)
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.tokenizers import check_tokenizer, load_tokenizer
from rlhf_fast.training.batches import micro_batches, offline_batches
from rlhf_fast.training.evaluation import make_evaluator
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.resume import load_policy_and_reference
from rlhf_fast.training.run import Run


def train(config: DPOConfig) -> None:
    """Train `config.model` on preference pairs; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = load_tokenizer(config.model)
    if config.reference is not None:
        check_tokenizer(config.reference, tokenizer, "reference")
    data = _encode(config.train_data, tokenizer, config)
    held_out = _encode(config.eval_pairs, tokenizer, config).examples if config.eval_pairs else []
    batches = offline_batches(len(data.examples), config.batch_size, config.epochs, config.seed)
    pad = pad_id(tokenizer)
    policy, reference = load_policy_and_reference(config, device)
    reference.to(device)
    rows = [e.prompt_ids + ids for e in (*data.examples, *held_out) for ids in (e.chosen_ids, e.rejected_ids)]
    check_rows(policy, tokenizer, rows, "max_length")
    check_rows(reference, tokenizer, rows, "max_length", role="reference")
    learner = Learner(policy, config, len(batches))
    objectives = Objectives(policy, fused=config.fused_head)
    size = config.micro_batch_size or config.batch_size
    evaluator = make_evaluator(config, tokenizer, device, reference, None)

    def metrics(examples: list[PreferenceExample], refs: Tensor, total: int, *, learn: bool) -> dict[str, float]:
        """Of a micro-batch and its reference's log-probs [2, B]: means, weighted by its share of `total` pairs."""
        pairs = pair_sequences(examples, pad, device)
        chosen_lengths, rejected_lengths = pairs.response_mask.sum(dim=1).chunk(2)
        with learner.autocast():
            out = objectives.dpo(
                pairs,
                (refs[0], refs[1]),
                total,
                beta=config.beta,
                loss_type=config.loss_type,
                label_smoothing=config.label_smoothing,
                chosen_lengths=chosen_lengths,
                rejected_lengths=rejected_lengths,
            )
        if learn:
            out.loss.backward()
        margins = out.chosen_rewards - out.rejected_rewards
        values = {
            "loss": out.losses,
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
        }
        return {name: value.mean().item() * len(examples) / total for name, value in values.items()}

    with Run(
        config,
        "DPO",
        len(batches),
        learners={"policy": learner},
        tokenizer=tokenizer,
        frozen={"reference": reference if evaluator is not None else None},
        evaluator=evaluator,
        show=("loss", "rewards/accuracies", "rewards/margins"),
    ) as run:
        run.note(rows=len(data.examples), truncated_rows=data.truncated)
        examples = [*data.examples, *held_out]
        with run.meter.phase("reference"), torch.no_grad(), learner.autocast():
            frozen = Objectives(reference, fused=config.fused_head)
            parts = [
                frozen.logprobs(pair_sequences(examples[rows], pad, device)).logprobs.sum(dim=1).view(2, -1)
                for rows in micro_batches(len(examples), size)
            ]
            del frozen
        refs = torch.cat(parts, dim=1)
        if evaluator is None:
            del reference
        for step in run.steps():
            indices, sums = batches[step - 1], Counter()
            for rows in micro_batches(len(indices), config.micro_batch_size):
                micro = indices[rows]
                with run.meter.phase("policy_update"):
                    sums.update(metrics([examples[i] for i in micro], refs[:, micro], len(indices), learn=True))
            with run.meter.phase("optimizer"):
                grad_norm = learner.step()
            measured = {**sums, "grad_norm": grad_norm, "lr": learner.lr}
            if held_out and step % (len(batches) // config.epochs) == 0:
                first, sums = len(data.examples), Counter()
                with run.meter.phase("evaluation"), torch.no_grad():
                    for rows in micro_batches(len(held_out), size):
                        own = refs[:, first:][:, rows]
                        sums.update(metrics(held_out[rows], own, len(held_out), learn=False))
                evaluated = {"eval/loss": sums["loss"], "eval/accuracy": sums["rewards/accuracies"]}
                run.note(**evaluated)
                measured |= evaluated
            run.end_step(step, measured)
        run.finish()


def _encode(path: str, tokenizer: PreTrainedTokenizerBase, config: DPOConfig) -> Encoded:
    return encode_preferences(load_rows(path, "preference"), tokenizer, config.max_length, config.max_prompt_length)


def pair_sequences(batch: list[PreferenceExample], pad: int, device: torch.device) -> Sequences:
    """[2B, ...]: the prompts with their chosen answers, then again with the rejected ones."""
    prompts = pad_left([e.prompt_ids for e in batch] * 2, pad)
    responses = pad_right([e.chosen_ids for e in batch] + [e.rejected_ids for e in batch], pad)
    return Sequences(*prompts, *responses).to(device)
