"""What rlhf_fast computes of a member of the zoo, beside plain transformers: float64, one row at a time, no cache."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_fast.data.examples import PreferenceExample
from rlhf_fast.lm import packing
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.switches import switching_length
from rlhf_fast.rollout import engine
from rlhf_fast.rollout.generate import Rollout, generate
from rlhf_fast.stages.dpo import pair_sequences
from rlhf_fast.stages.offline import summed_logprobs
from tests.support.zoo import make_config

# Prompt and response tokens of each row. They stand on both sides of every window, chunk and original length.
TRAINED = ((14, 18), (2, 3), (9, 12), (1, 30))
PAIRS = ((5, 9, 20), (13, 4, 16))  # prompt, chosen and rejected tokens
PROMPTS = (4, 13, 2, 12)
NEW_TOKENS = 14


class Truth(NamedTuple):
    """Of plain transformers."""

    logprobs: list[Tensor]  # of each row's response tokens
    loss: float
    gradients: dict[str, Tensor]


def save_member(name: str, directory: Path) -> None:
    """A checkpoint of the member, with weights spread enough that a small fault changes its logits."""
    torch.manual_seed(0)
    config = make_config(name)
    model = class_of(config).from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim >= 2 else parameter + noise * 0.1)
    model.save_pretrained(directory)


def class_of(config: PreTrainedConfig) -> Any:
    """The class that holds the whole checkpoint, with its vision tower if any."""
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def load_plain(directory: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint in eval mode and float64; in float32 where the model has float32 alone."""
    model = class_of(config).from_pretrained(directory, dtype=torch.float32).eval()
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")  # the other kernels have no float64
    try:
        double(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    except RuntimeError:
        return model
    return double


def ragged(lengths: tuple[tuple[int, int], ...]) -> Sequences:
    """Prompts and responses of these lengths, padded apart."""
    generator = torch.Generator().manual_seed(3)
    P, T = (max(each) for each in zip(*lengths, strict=True))
    ids = torch.randint(2, 57, (len(lengths), P + T), generator=generator)
    prompt_mask = torch.stack([torch.arange(P) >= P - p for p, _ in lengths])
    response_mask = torch.stack([torch.arange(T) < t for _, t in lengths])
    return Sequences(ids[:, :P] * prompt_mask, prompt_mask, ids[:, P:] * response_mask, response_mask)


def plain_logits(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    """The logits [t, V] behind which each row's response tokens stand."""
    found = []
    for prompt, prompt_mask, response, response_mask in zip(*sequences, strict=True):
        ids = torch.cat([prompt[prompt_mask], response[response_mask]])[None]
        found.append(model(input_ids=ids, use_cache=False).logits[0, int(prompt_mask.sum()) - 1 : -1])
    return found


def plain_logprobs(logits: list[Tensor], sequences: Sequences) -> list[Tensor]:
    """Log-probs [t] of each row's response tokens."""
    rows = zip(logits, sequences.response_ids, sequences.response_mask, strict=True)
    return [row.log_softmax(-1).gather(1, ids[mask][:, None])[:, 0] for row, ids, mask in rows]


def plain_truth(model: PreTrainedModel, sequences: Sequences) -> Truth:
    """SFT of the response tokens by autograd."""
    logprobs = plain_logprobs(plain_logits(model, sequences), sequences)
    loss = -torch.cat(logprobs).sum() / sequences.response_mask.sum()
    loss.backward()
    gradients = {_name(name): p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return Truth([row.detach() for row in logprobs], loss.item(), gradients)


def _name(name: str) -> str:
    """The name of a parameter, the same in an image-text model and in the text model inside it."""
    return name.replace("language_model.", "")


def logprobs_error(mine: Tensor, mask: Tensor, truth: list[Tensor]) -> float:
    """The largest error of a token's log-prob, relative where it is larger than 1."""
    rows = zip(mine, mask, truth, strict=True)
    return max(((row[m] - t).abs() / t.abs().clamp(min=1)).max().item() for row, m, t in rows)


def gradients_error(model: PreTrainedModel, truth: dict[str, Tensor]) -> float:
    """The largest distance of a parameter's gradient, relative to its size and to a hundredth of all gradients'."""
    whole = math.sqrt(sum(gradient.square().sum().item() for gradient in truth.values()))
    mine = {_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert truth.keys() <= mine.keys()
    zero = torch.zeros(())
    return max(
        ((g.double() - truth.get(name, zero)).norm() / (truth.get(name, zero).norm() + 0.01 * whole)).item()
        for name, g in mine.items()
    )


class Found(NamedTuple):
    """Of rlhf_fast."""

    errors: dict[str, float]  # the largest error of each computation
    decoding: str  # a name of `engine._choice`
    packed: bool  # in training


def measure(name: str, directory: Path) -> Found:
    """The member is saved to `directory`."""
    save_member(name, directory)
    model, plain = load_policy(directory), load_plain(directory, make_config(name))
    errors = training_errors(model, plain) | {"dpo": dpo_error(model, directory)} | decoding_errors(model, plain)
    backbone: Any = model.base_model
    return Found(errors, engine._chosen[model], packing._packable.get(backbone, False))


def training_errors(model: PreTrainedModel, plain: PreTrainedModel) -> dict[str, float]:
    """SFT loss, log-probs and gradients in train mode: from hidden states, from logits and without packing."""
    sequences, found = ragged(TRAINED), {}
    truth, mask = plain_truth(plain, sequences), sequences.response_mask
    ids = sequences.response_ids.masked_fill(~mask, -100)

    def check(kind: str, fused: bool) -> None:
        model.zero_grad()
        out = Objectives(model, fused=fused).sft(sequences, ids, float(mask.sum()))
        out.loss.backward()
        loss = abs(out.loss.item() - truth.loss)
        found[f"log-probs {kind}"] = max(loss, logprobs_error(out.logprobs, mask, truth.logprobs))
        found[f"gradients {kind}"] = gradients_error(model, truth.gradients)

    assert model.training
    check("from hidden states", True)
    check("from logits", False)
    backbone: Any = model.base_model
    if packing._packable.get(backbone):
        packing._packable[backbone] = False
        check("padded", True)
        packing._packable[backbone] = True
    return found


def dpo_error(policy: PreTrainedModel, directory: Path) -> float:
    """How far losses of pairs are from ln 2 where the reference is the policy: the stage's own passes."""
    generator = torch.Generator().manual_seed(4)
    pairs = [
        PreferenceExample(*(torch.randint(2, 57, (n,), generator=generator).tolist() for n in lengths), None)
        for lengths in PAIRS
    ]
    reference, cpu = Objectives(load_policy(directory, trainable=False)), torch.device("cpu")
    parts = summed_logprobs(reference, (pair_sequences([pair], 0, cpu) for pair in pairs), False)
    refs = torch.stack(list(parts), dim=1)
    out = Objectives(policy).dpo(pair_sequences(pairs, 0, cpu), (refs[0], refs[1]), 2.0)
    return (out.losses - math.log(2)).abs().max().item()


@torch.no_grad()
def decoding_errors(model: PreTrainedModel, plain: PreTrainedModel) -> dict[str, float]:
    """Log-probs of sampled and greedy tokens, and how far greedy tokens are below the largest logit."""
    limit, prompts = switching_length(model.config), ragged(tuple((prompt, 1) for prompt in PROMPTS))
    out = generate(
        model,
        prompts.prompt_ids,
        prompts.prompt_mask,
        max_new_tokens=NEW_TOKENS if limit is None else limit - max(PROMPTS),
        eos_ids=[1],
        pad_id=0,
        samples=2,
        greedy=True,
        seed=4,
    )
    assert out.greedy is not None

    def error(rollout: Rollout, logits: list[Tensor]) -> float:
        return logprobs_error(rollout.logprobs, rollout.response_mask, plain_logprobs(logits, rollout.sequences))

    logits = plain_logits(plain, out.greedy.sequences)
    rows = zip(logits, out.greedy.response_ids, out.greedy.response_mask, strict=True)
    below = [(row.amax(-1) - row.gather(1, ids[mask][:, None])[:, 0]).max().item() for row, ids, mask in rows]
    return {
        "sampled log-probs": error(out.sampled, plain_logits(plain, out.sampled.sequences)),
        "greedy log-probs": error(out.greedy, logits),
        "greedy tokens": max(below),
    }
