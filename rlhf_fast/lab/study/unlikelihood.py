"""Two baselines of the DPO paper that learn from pairs (arXiv 2305.18290, section 6): Unlikelihood and Preferred-FT.

Both minimise mean(alpha log pi(rejected) - log pi(chosen)), log-probs summed over a completion: alpha 0 is fine-tuning
on the preferred completions. With alpha > 0 the loss has no lower bound, so more steps are not better steps.
"""

from dataclasses import dataclass

import torch

from rlhf_fast.config import OfflineConfig
from rlhf_fast.config.fields import arg, check
from rlhf_fast.data.encoding import encode_preferences, load_rows, pad_id
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages.dpo import pair_sequences
from rlhf_fast.training.batches import micro_batches, offline_batches
from rlhf_fast.training.evaluation import make_evaluator
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.resume import load_policy_and_reference
from rlhf_fast.training.run import Run


@dataclass(frozen=True, kw_only=True)
class UnlikelihoodConfig(OfflineConfig):
    """Unlikelihood training on preference pairs, or fine-tuning on the preferred ones."""

    alpha: float = arg(0.0, "Weight of the rejected completions' log-probs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "alpha", lambda v: v >= 0, "a number >= 0")


def train(config: UnlikelihoodConfig) -> None:
    """Train `config.model` on preference pairs; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = load_tokenizer(config.model)
    rows = load_rows(config.train_data, "preference")
    data = encode_preferences(rows, tokenizer, config.max_length, config.max_prompt_length)
    batches = offline_batches(len(data.examples), config.batch_size, config.epochs, config.seed)
    policy, reference = load_policy_and_reference(config, device)
    evaluator = make_evaluator(config, tokenizer, device, reference.to(device), None)
    learner = Learner(policy, config, len(batches))
    objectives = Objectives(policy, fused=config.fused_head)

    with Run(
        config,
        "Unlikelihood" if config.alpha else "Preferred-FT",
        len(batches),
        learners={"policy": learner},
        tokenizer=tokenizer,
        evaluator=evaluator,
        show=("loss", "logps/chosen", "logps/rejected"),
    ) as run:
        run.note(rows=len(data.examples), truncated_rows=data.truncated)
        for step in run.steps():
            batch = [data.examples[i] for i in batches[step - 1]]
            sums = torch.zeros(2, device=device)  # log-probs of the chosen and of the rejected, over the batch
            for rows in micro_batches(len(batch), config.micro_batch_size):
                with run.meter.phase("policy_update"):
                    pairs = pair_sequences(batch[rows], pad_id(tokenizer), device)
                    with learner.autocast():
                        logps = objectives.logprobs(pairs).logprobs.sum(dim=1).view(2, -1).sum(dim=1) / len(batch)
                    (config.alpha * logps[1] - logps[0]).backward()
                sums += logps.detach()
            with run.meter.phase("optimizer"):
                grad_norm = learner.step()
            chosen, rejected = sums.tolist()
            metrics = {"loss": config.alpha * rejected - chosen, "logps/chosen": chosen, "logps/rejected": rejected}
            run.end_step(step, {**metrics, "grad_norm": grad_norm, "lr": learner.lr})
        run.finish()
