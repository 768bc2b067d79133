"""Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling.

The reference's log-probs are computed once for all pairs and reused in every epoch; the reference model is then
dropped. Chosen and rejected answers of a pair go through the policy in one forward pass.
"""

import torch

from rlhf_fast.config import DPOConfig
from rlhf_fast.data import PreferenceExample, encode_preferences, load_rows, pad_id, pad_left, pad_right
from rlhf_fast.evaluation import make_evaluator
from rlhf_fast.models import Sequences, default_device, load_tokenizer
from rlhf_fast.objectives import Objectives
from rlhf_fast.training import Learner, Run, load_policy_and_reference, micro_batches, offline_batches


def train(config: DPOConfig) -> None:
    """Train `config.model` on preference pairs; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = load_tokenizer(config.model)
    rows = load_rows(config.train_data, "preference")
    data = encode_preferences(rows, tokenizer, config.max_length, config.max_prompt_length)
    batches = offline_batches(len(data.examples), config.batch_size, config.epochs, config.seed)
    pad = pad_id(tokenizer)
    policy, reference = load_policy_and_reference(config, device)
    reference.to(device)
    learner = Learner(policy, config, len(batches))
    objectives = Objectives(policy, fused=config.fused_head)
    size = config.micro_batch_size or config.batch_size
    evaluator = make_evaluator(config, tokenizer, device, reference, None)

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
            frozen = Objectives(reference, fused=config.fused_head)
            parts = [
                frozen.logprobs(pair_sequences(data.examples[rows], pad, device)).logprobs.sum(dim=1).chunk(2)
                for rows in micro_batches(len(data.examples), size)
            ]
            del frozen
        ref_chosen, ref_rejected = (torch.cat(column) for column in zip(*parts, strict=True))
        if evaluator is None:
            del reference
        for step in run.steps():
            indices = torch.tensor(batches[step - 1])
            sums: dict[str, float] = {}
            for rows in micro_batches(len(indices), config.micro_batch_size):
                micro = indices[rows]
                weight = len(micro) / len(indices)
                with run.meter.phase("policy_update"):
                    pairs = pair_sequences([data.examples[i] for i in micro], pad, device)
                    chosen_lengths, rejected_lengths = pairs.response_mask.sum(dim=1).chunk(2)
                    with learner.autocast():
                        out = objectives.dpo(
                            pairs,
                            (ref_chosen[micro], ref_rejected[micro]),
                            len(indices),
                            beta=config.beta,
                            loss_type=config.loss_type,
                            label_smoothing=config.label_smoothing,
                            chosen_lengths=chosen_lengths,
                            rejected_lengths=rejected_lengths,
                        )
                    out.loss.backward()
                margins = out.chosen_rewards - out.rejected_rewards
                for name, value in {
                    "loss": out.losses.mean(),
                    "rewards/chosen": out.chosen_rewards.mean(),
                    "rewards/rejected": out.rejected_rewards.mean(),
                    "rewards/margins": margins.mean(),
                    "rewards/accuracies": (margins > 0).float().mean(),
                    "logps/chosen": out.chosen_logps.mean(),
                    "logps/rejected": out.rejected_logps.mean(),
                }.items():
                    sums[name] = sums.get(name, 0.0) + weight * value.item()
            with run.meter.phase("optimizer"):
                grad_norm = learner.step()
            run.end_step(step, {**sums, "grad_norm": grad_norm, "lr": learner.lr})
        run.finish()


def pair_sequences(batch: list[PreferenceExample], pad: int, device: torch.device) -> Sequences:
    """[2B, ...]: the prompts with their chosen answers, then again with the rejected ones."""
    prompts = pad_left([e.prompt_ids for e in batch] * 2, pad)
    responses = pad_right([e.chosen_ids for e in batch] + [e.rejected_ids for e in batch], pad)
    return Sequences(*prompts, *responses).to(device)
