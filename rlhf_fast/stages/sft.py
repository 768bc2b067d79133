"""Supervised fine-tuning: the loss is the mean negative log-likelihood of completion tokens and their EOS.

The denominator is the number of trained tokens of the whole batch, so micro-batches change nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.config import SFTConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import SFTExample, pad_id, pad_right
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm.adapters import lora_of
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.loading import default_device, load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import whole
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ranks import current
from rlhf_fast.stages.offline import Offline
from rlhf_fast.training.batches import OfflineBatches, micro_batches
from rlhf_fast.training.learner import autocast
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.progress import passes
from rlhf_fast.training.resume import resume_directory
from rlhf_fast.training.tally import Tally


@writes_alone("output_dir")
@trusts_as_asked
def train(config: SFTConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Fine-tunes `config.model` on `config.train_data`; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    pad = pad_id(tokenizer)
    data = encode_stage("sft", config.train_data, tokenizer, config)
    held_out = encode_stage("sft", config.eval_data, tokenizer, config).examples if config.eval_data else []
    batches = OfflineBatches(len(data.examples), config.batch_size, config.epochs, config.seed)
    start = resume_directory(config) or config.model
    policy = load_policy(start, dtype=config.dtype, lora=lora_of(config), shard=config.shard).to(device)  # pyright: ignore[reportArgumentType]
    check_rows(policy, tokenizer, [e.input_ids for e in (*data.examples, *held_out)], "max_length")
    objectives = Objectives(policy, fused=config.fused_head, balanced=True)

    def loss(rows: list[int], tokens: int, tally: Tally) -> Tensor:
        out = objectives.sft(*completions([data.examples[i] for i in rows], pad, device), max(1, tokens))
        tally.add("loss", out.loss)
        if objectives.aux_loss is not None:
            tally.add("aux_loss", objectives.aux_loss)
        tally.add("entropy", out.entropy.sum().double() / max(1, tokens))
        tally.add("num_tokens", sum(trained_tokens(data.examples[i]) for i in rows))
        return out.loss

    stage = Offline(
        config,
        "SFT",
        policy,
        tokenizer,
        batches,
        whole=lambda rows: sum(trained_tokens(data.examples[i]) for i in rows),
        held_out=(lambda run: {"eval/loss": held_out_loss(objectives, held_out, pad, config)}) if held_out else None,
        listeners=listeners,
    )
    with stage.training(data):
        stage.steps(loss)


def trained_tokens(example: SFTExample) -> int:
    """The number of a row's tokens that the loss counts. The first token does not count, as nothing predicts it."""
    return sum(example.mask[1:])


def completions(batch: list[SFTExample], pad: int, device: torch.device) -> tuple[Sequences, Tensor]:
    """Right-padded rows, and their trained tokens [B, L-1] int64 with -100 elsewhere."""
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
    with whole(objectives.model), autocast(device, config.bf16):
        mine = current().share(examples)
        for rows in passes("held out", micro_batches(len(mine), size)):
            total = total - objectives.logprobs(*completions([*mine[rows]], pad, device)).logprobs.double().sum()
    return sum(current().gather(float(total))) / sum(map(trained_tokens, examples))
