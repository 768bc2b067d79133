"""KTO (arXiv 2402.01306): preference optimisation from single completions that are labelled good or bad.

    r = beta (log pi(y|x) - log pi_ref(y|x)),  z = beta max(0, KL),  loss = weight_y (1 - sigmoid(+-(r - z)))

KL is the mean of log pi(y'|x) - log pi_ref(y'|x) over the batch, where y' is the completion of a row with another
prompt. The mean is over the whole batch, so micro-batches change nothing. The reference's log-probs are computed once
for all rows, and the reference model is then dropped. A preference pair counts as two rows, a good and a bad row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.config import KTOConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import UnpairedExample, pad_id, pad_left, pad_right
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm import sharding
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
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
from rlhf_fast.training.resume import load_policy_and_reference
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally


class Whole(NamedTuple):
    """The numbers of a whole batch that the loss of its micro-batches needs."""

    rows: int
    good: int  # rows with label true
    kl: Tensor | None  # 0-dim, in nats; None where the loss uses no KL


@writes_alone("output_dir")
@trusts_as_asked
def train(config: KTOConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` on labelled completions; the result goes to `config.output_dir`."""
    device = default_device()
    check_file(config.reference_logprobs)
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    if config.reference is not None:
        check_tokenizer(config.reference, tokenizer, "reference")
    data = encode_stage("kto", config.train_data, tokenizer, config)
    held_out = encode_stage("kto", config.eval_rows, tokenizer, config).examples if config.eval_rows else []
    batches = OfflineBatches(len(data.examples), config.batch_size, config.epochs, config.seed)
    examples, pad, size = [*data.examples, *held_out], pad_id(tokenizer), config.micro_batch_size or config.batch_size
    policy, reference = load_policy_and_reference(config, device)
    reference.to(device)  # pyright: ignore[reportArgumentType]
    whole_rows = [prompt + ids for e in examples for prompt, ids in ((e.prompt_ids, e.completion_ids), e.unrelated)]
    check_rows(policy, tokenizer, whole_rows, "max_length")
    check_rows(reference, tokenizer, whole_rows, "max_length", role="reference")
    objectives = Objectives(policy, fused=config.fused_head, balanced=True)
    evaluator = make_evaluator(config, tokenizer, device, reference, None)
    with_kl = config.loss_type == "kto"
    refs = unrelated_refs = torch.empty(0)  # the reference's log-probs of all examples, and of unrelated completions

    def logps(of: Objectives, rows: list[int], unrelated: bool, shown: str | None = None) -> Tensor:
        mine = current().share(rows)
        cut = micro_batches(len(mine), size)
        chosen = ([examples[i] for i in mine[part]] for part in (passes(shown, cut, always=True) if shown else cut))
        parts = (sequences(some, pad, device, unrelated=unrelated) for some in chosen)
        return current().cat(torch.cat([torch.empty(0, device=device), *summed_logprobs(of, parts, config.bf16)]))

    def look_at(rows: list[int]) -> Whole:
        good = sum(examples[i].label for i in rows)
        if not with_kl:
            return Whole(len(rows), good, None)
        return Whole(len(rows), good, (logps(objectives, rows, True) - unrelated_refs[rows]).mean())

    def look_at_batch(rows: list[int]) -> Whole:
        with stage.run.meter.phase("kl"):
            return look_at(rows)

    def loss(rows: list[int], whole: Whole, tally: Tally) -> Tensor:
        some = [examples[i] for i in rows]
        labels = torch.tensor([e.label for e in some], device=device)
        out = objectives.kto(
            sequences(some, pad, device),
            refs[rows],
            labels,
            whole.kl,
            whole.rows,
            beta=config.beta,
            loss_type=config.loss_type,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        tally.add("loss", out.loss)
        if objectives.aux_loss is not None:
            tally.add("aux_loss", objectives.aux_loss)
        for name, mine, count in (("good", labels, whole.good), ("bad", ~labels, whole.rows - whole.good)):
            if count:  # a batch may lack good rows, or bad rows
                tally.add(f"rewards/{name}", out.rewards.where(mine, 0.0).sum().double() / count)
                tally.add(f"logps/{name}", out.logps.where(mine, 0.0).sum().double() / count)
        if whole.kl is not None:
            tally.add("kl", whole.kl.double() * len(rows) / whole.rows)
        return out.loss

    @torch.no_grad()
    def evaluate(run: Run) -> dict[str, float]:
        tally, rows = Tally(), list(range(len(data.examples), len(examples)))
        with sharding.whole(policy), autocast(device, config.bf16):
            whole, mine = look_at(rows), current().share(rows)
            for part in passes("held out", micro_batches(len(mine), size)):
                loss([*mine[part]], whole, tally)
        metrics = {"eval/loss": tally.read()["loss"]}
        run.note(**metrics)
        return metrics

    stage = Offline(
        config,
        "KTO",
        policy,
        tokenizer,
        batches,
        whole=look_at_batch,
        held_out=evaluate if held_out else None,
        frozen={"reference": reference if evaluator is not None else None},
        evaluator=evaluator,
        show=("loss", "rewards/good", "rewards/bad"),
        listeners=listeners,
    )
    with stage.training(data) as run:

        def compute() -> dict[str, Tensor]:
            frozen, everything = Objectives(reference, fused=config.fused_head), list(range(len(examples)))
            own = {"own": logps(frozen, everything, False, "reference")}
            if not with_kl:
                return own
            return own | {"unrelated": logps(frozen, everything, True, "reference, unrelated rows")}

        with run.meter.phase("reference"):
            ids = [(e.prompt_ids, e.completion_ids, *(e.unrelated if with_kl else ())) for e in examples]
            names = ("own", "unrelated") if with_kl else ("own",)
            found = reference_logprobs(config, reference, ids, names, compute, run.say)
            refs, unrelated_refs = found["own"], found.get("unrelated", unrelated_refs)
        del compute
        if evaluator is None:
            del reference
        else:
            sharding.shard_frozen(reference, policy, config.shard)
        stage.steps(loss)


def sequences(examples: list[UnpairedExample], pad: int, device: torch.device, *, unrelated: bool = False) -> Sequences:
    """The prompts with their own completions, or with their unrelated completions."""
    rows = [e.unrelated if unrelated else (e.prompt_ids, e.completion_ids) for e in examples]
    prompts, completions = (list(column) for column in zip(*rows, strict=True))
    return Sequences(*pad_left(prompts, pad), *pad_right(completions, pad)).to(device)
