"""Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling.

The reference's log-probs are computed once for all pairs, held-out pairs too, and reused in every epoch. The reference
model is then dropped. Chosen and rejected answers of a pair go through the policy in one forward pass. SimPO, CPO and
ORPO (`loss_type`) have no reference; it is then loaded only where evaluations report the KL to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.config import DPOConfig, OnlineDPOConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import (
    PreferenceExample,
    pad_id,
    pad_left,
    pad_right,
)
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import shard_frozen, whole
from rlhf_fast.lm.tokenizers import check_tokenizer, load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ranks import current
from rlhf_fast.stages.offline import Offline, summed_logprobs
from rlhf_fast.training.batches import OfflineBatches, micro_batches
from rlhf_fast.training.evaluation import make_evaluator
from rlhf_fast.training.learner import autocast
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.progress import passes
from rlhf_fast.training.reference_logprobs import check_file, reference_logprobs
from rlhf_fast.training.resume import load_policy_and_reference, load_trained
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally


@writes_alone("output_dir")
@trusts_as_asked
def train(config: DPOConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` on preference pairs; the result goes to `config.output_dir`."""
    device = default_device()
    check_file(config.reference_logprobs)
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    if config.reference is not None:
        check_tokenizer(config.reference, tokenizer, "reference")
    data = encode_stage("dpo", config.train_data, tokenizer, config)
    held_out = encode_stage("dpo", config.eval_pairs, tokenizer, config).examples if config.eval_pairs else []
    batches = OfflineBatches(len(data.examples), config.batch_size, config.epochs, config.seed)
    examples, pad, size = [*data.examples, *held_out], pad_id(tokenizer), config.micro_batch_size or config.batch_size
    if config.reference_free and config.eval_data is None:
        policy, reference = load_trained(config, device), None
    else:
        policy, reference = load_policy_and_reference(config, device)
        reference.to(device)  # pyright: ignore[reportArgumentType]
    rows = [e.prompt_ids + ids for e in examples for ids in (e.chosen_ids, e.rejected_ids)]
    check_rows(policy, tokenizer, rows, "max_length")
    if reference is not None:
        check_rows(reference, tokenizer, rows, "max_length", role="reference")
    objectives = Objectives(policy, fused=config.fused_head, balanced=True)
    evaluator = None if reference is None else make_evaluator(config, tokenizer, device, reference, None)
    refs = torch.empty(2, 0)  # the reference's log-probs of the chosen and rejected answers of all examples

    def whole_of(rows: list[int]) -> Whole:
        return Whole(len(rows), sum(len(examples[i].chosen_ids) for i in rows) / len(rows))

    def loss(rows: list[int], batch: Whole, tally: Tally) -> Tensor:
        """Tallies the means over the micro-batch, weighted by the micro-batch's share of the pairs of `batch`."""
        total = batch.pairs
        pairs = pair_sequences([examples[i] for i in rows], pad, device)
        chosen_lengths, rejected_lengths = pairs.response_mask.sum(dim=1).chunk(2)
        out = objectives.dpo(
            pairs,
            (None, None) if config.reference_free else (refs[0, rows], refs[1, rows]),
            total,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            mean_chosen_length=batch.mean_chosen_length,
            **pair_options(config),
        )
        margins = out.chosen_rewards - out.rejected_rewards
        tally.add("loss", out.loss)
        if objectives.aux_loss is not None:
            tally.add("aux_loss", objectives.aux_loss)
        values = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
        }
        for name, value in values.items():
            tally.add(name, value.mean().double() * len(rows) / total)
        return out.loss

    @torch.no_grad()
    def look(run: Run) -> dict[str, float]:
        held_out_rows = range(len(data.examples), len(examples))
        tally, mine, held_out_whole = Tally(), current().share(held_out_rows), whole_of([*held_out_rows])
        with whole(policy), autocast(device, config.bf16):
            for rows in passes("held out", micro_batches(len(mine), size)):
                loss([*mine[rows]], held_out_whole, tally)
        sums = tally.read()
        metrics = {"eval/loss": sums["loss"], "eval/accuracy": sums["rewards/accuracies"]}
        run.note(**metrics)
        return metrics

    stage = Offline(
        config,
        "DPO",
        policy,
        tokenizer,
        batches,
        whole=whole_of,
        held_out=look if held_out else None,
        frozen={"reference": reference if evaluator is not None else None},
        evaluator=evaluator,
        show=("loss", "rewards/accuracies", "rewards/margins"),
        listeners=listeners,
    )
    with stage.training(data) as run:

        def compute() -> dict[str, Tensor]:
            assert reference is not None  # it is called where the loss has a reference
            mine = current().share(examples)
            cut = passes("reference", micro_batches(len(mine), size), always=True)
            parts = (pair_sequences([*mine[rows]], pad, device) for rows in cut)
            logps = summed_logprobs(Objectives(reference, fused=config.fused_head), parts, config.bf16)
            chosen, rejected = current().cat(torch.cat([part.view(2, -1) for part in logps], dim=1).t()).t()
            return {"chosen": chosen, "rejected": rejected}

        if reference is not None and not config.reference_free:
            with run.meter.phase("reference"):
                ids = [(e.prompt_ids, e.chosen_ids, e.rejected_ids) for e in examples]
                names = ("chosen", "rejected")
                found = reference_logprobs(config, reference, ids, names, compute, run.say)
                refs = torch.stack([found[name] for name in names])
        if evaluator is None:
            reference = None  # nobody needs its weights any more
        elif reference is not None:
            shard_frozen(reference, policy, config.shard)
        stage.steps(loss)


class Whole(NamedTuple):
    """Of the pairs of a whole batch, of which a micro-batch is a part."""

    pairs: int
    mean_chosen_length: float  # tokens


def pair_options(config: DPOConfig | OnlineDPOConfig) -> dict[str, Any]:
    """The options of `dpo_loss` that a config asks for."""
    return {
        name: getattr(config, name)
        for name in ("beta", "loss_type", "loss_weights", "label_smoothing", "simpo_gamma", "cpo_alpha")
    }


def pair_sequences(batch: list[PreferenceExample], pad: int, device: torch.device) -> Sequences:
    """2 B rows: the prompts with their chosen answers, then the prompts with their rejected answers."""
    prompts = pad_left([e.prompt_ids for e in batch] * 2, pad)
    responses = pad_right([e.chosen_ids for e in batch] + [e.rejected_ids for e in batch], pad)
    return Sequences(*prompts, *responses).to(device)
