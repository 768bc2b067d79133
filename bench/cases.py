"""What is measured: the operations on logits and log-probs beside their rivals (see `bench.case`).

torch.compile is a rival of all but `gae`, whose loop of 1024 steps it would unroll, and packed attention.

B sequences, T response tokens, N tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention_cases import attention_cases
from bench.case import Case, Function
from bench.linear_cases import linear_cases
from rlhf_fast import ops
from rlhf_fast.ops.head_layers import bf16_unit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shapes(NamedTuple):
    """tokens: [N, V] logits. sequences: [B, T]. heads: N, H, V. attention: as in `attention_cases`. pairs: B."""

    tokens: tuple[int, int]
    sequences: tuple[int, int]
    heads: tuple[int, int, int]
    attention: tuple[tuple[int, int, int, int], ...] = ()  # none on a GPU, because there is no GPU kernel of ours
    pairs: int = 64


QUICK = Shapes((64, 5003), (16, 128), (128, 32, 1009), ((8, 16, 2, 16),))
"""Toy shapes that take seconds and prove only that everything runs."""
FULL = {
    "cpu": Shapes((1024, 50257), (64, 1024), (4096, 512, 32000), ((64, 57, 4, 16), (16, 512, 8, 64), (4, 2048, 8, 64))),
    "cuda": Shapes((8192, 151_936), (512, 4096), (8192, 4096, 151_936)),
}


def all_cases(quick: bool = False, device: str = "cpu") -> list[Case]:
    """Every case at the shapes of the bars, or at toy shapes."""
    return cases_at(QUICK if quick else FULL[device], device)


def cases_at(shapes: Shapes, device: str) -> list[Case]:
    """Every case at these shapes, in the dtypes that are measured on the device."""
    dtypes = (("fp32", "bf16", "fp16"), ("fp32", "bf16")) if device == "cpu" else (["bf16"], ["bf16"])
    return [
        *_token_cases(*shapes.tokens, *dtypes),
        *_sequence_cases(*shapes.sequences),
        *_pair_cases(shapes.pairs),
        *attention_cases(*shapes.attention),
        *linear_cases(*shapes.heads, torch.float32 if device == "cpu" else torch.bfloat16),
        *(_bf16_cases(*shapes.heads) if device == "cpu" and bf16_unit() else []),
    ]


def _bf16_cases(*heads: int) -> list[Case]:
    """The heads that have bars in bfloat16."""
    names = "linear_ppo_loss bf16", "linear_token_logprobs bf16"
    return [case for case in linear_cases(*heads, torch.bfloat16, " bf16") if case.name.startswith(names)]


# Log-probabilities and entropy from logits


def eager_token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N] from logits [N, V] by log_softmax."""
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def upcast_token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same after the logits were widened to float32."""
    return eager_token_logprobs(logits.float(), ids)


def policy_gradient(token_logprobs: Function, **options: bool) -> Function:
    """REINFORCE's loss from logits, and the log-probs and entropies that a training loop logs beside it."""

    def loss(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = token_logprobs(logits, ids, **options)
        return (weights * logprobs).mean(), logprobs.detach(), entropy.detach()

    return loss


def _token_cases(n: int, vocabulary: int, forward: Sequence[str], backward: Sequence[str]) -> list[Case]:
    def inputs(dtype: torch.dtype, weighted: bool) -> Callable[[], tuple[Tensor, ...]]:
        def make() -> tuple[Tensor, ...]:
            logits, ids = (3 * torch.randn(n, vocabulary)).to(dtype), torch.randint(0, vocabulary, (n,))
            return (logits, ids, torch.randn(n)) if weighted else (logits, ids)

        return make

    def case(what: str, dtype: str, ours: Function, **options: object) -> Case:
        weighted = "backward" in what
        wrap = policy_gradient if weighted else lambda function: function
        return Case(
            name=f"token_logprobs {what} {dtype}",
            shape=f"[{n}, {vocabulary}]",
            make_inputs=inputs(DTYPES[dtype], weighted),
            ours=ours,
            eager=wrap(eager_token_logprobs),
            upcast=None if dtype == "fp32" else wrap(upcast_token_logprobs),
            compiled=True,
            differentiable=(0,) if weighted else (),
            **options,
        )

    def overwriting(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops.token_logprobs(logits.view_as(logits), ids, inplace_backward=True)  # a leaf itself is refused

    plain, in_place = policy_gradient(ops.token_logprobs), policy_gradient(overwriting)
    over = {"traffic": "read, overwrite", "overwrites": True}
    return [
        *(case("forward", d, ops.token_logprobs, traffic="read") for d in forward),
        *(case("forward + backward", d, plain, traffic="read, copy") for d in backward),
        *(case("forward + in-place backward", d, in_place, **over) for d in backward),
    ]


# Rewards, returns and losses over [B, T]


def eager_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple:
    """GAE by a Python loop over time; [B, T] each."""
    advantages = []
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages.append(next_advantage)
    advantages = torch.stack(advantages[::-1], 1)
    return advantages * mask, (advantages + values) * mask


def eager_ppo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> tuple:
    """The clipped objective, the clip fraction and the approximate KL by the formulas."""
    log_ratio = logprobs - old
    ratio = torch.exp(log_ratio)
    unclipped, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
    loss = (torch.max(unclipped, clipped) * mask).sum() / mask.sum()
    with torch.no_grad():
        clip_fraction = ((clipped > unclipped) * mask).sum() / mask.sum()
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum() / mask.sum()
    return loss, clip_fraction, approx_kl


def eager_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2) -> tuple:
    """The clipped value loss and its clip fraction by the formulas."""
    unclipped = (values - returns) ** 2
    clipped = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
    loss = 0.5 * (torch.max(unclipped, clipped) * mask).sum() / mask.sum()
    with torch.no_grad():
        return loss, ((clipped > unclipped) * mask).sum() / mask.sum()


def eager_whiten(x: Tensor, mask: Tensor) -> tuple[Tensor]:
    """Masked whitening by the formulas."""
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    return ((x - mean) * torch.rsqrt(variance + 1e-8) * mask,)


def eager_shape_rewards(scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, kl_coef: float = 0.05) -> tuple:
    """The KL penalty on each token, and the clipped score on the last."""
    rewards = -kl_coef * (logprobs - ref) * mask
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += torch.clamp(scores, -5, 5)
    return (rewards,)


def eager_remax(scores: Tensor, greedy: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, kl_coef: float = 0.05):
    """ReMax's per-token weights in verl's form."""
    rewards = -kl_coef * (logprobs - ref) * mask
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    returns = rewards.flip(-1).cumsum(-1).flip(-1)
    return ((returns - greedy[:, None]) * mask,)


def _sequence_cases(b: int, t: int) -> list[Case]:
    def floats(count: int, scores: int = 0) -> Callable[[], tuple[Tensor, ...]]:
        """`scores` tensors [B], then `count` tensors [B, T] close to each other, and the mask of ragged responses."""

        def make() -> tuple[Tensor, ...]:
            mask = torch.arange(t) < torch.randint(t // 4, t + 1, (b, 1))
            centre = torch.randn(b, t) - 2
            near = (centre + 0.2 * torch.randn(b, t) for _ in range(count))
            return *(torch.randn(b) for _ in range(scores)), *near, mask

        return make

    def case(name: str, make_inputs: Callable, ours: Function, eager: Function, **options: object) -> Case:
        return Case(name=name, shape=f"[{b}, {t}]", make_inputs=make_inputs, ours=ours, eager=eager, **options)

    return [
        case("gae", floats(2), ops.gae, eager_gae),
        case(
            "ppo_loss forward + backward",
            floats(3),
            lambda *x: ops.ppo_loss(*x)[:3],
            eager_ppo_loss,
            compiled=True,
            differentiable=(0,),
        ),
        case(
            "ppo_value_loss forward + backward",
            floats(3),
            ops.ppo_value_loss,
            eager_value_loss,
            compiled=True,
            differentiable=(0,),
        ),
        case("whiten", floats(1), lambda *x: (ops.whiten(*x),), eager_whiten, compiled=True),
        case(
            "shape_rewards",
            floats(2, scores=1),
            lambda *x: (ops.shape_rewards(*x, kl_coef=0.05, clip=5.0),),
            eager_shape_rewards,
            compiled=True,
        ),
        case(
            "remax_returns",
            floats(2, scores=2),
            lambda *x: (ops.remax_returns(*x, kl_coef=0.05, variant="verl"),),
            eager_remax,
            compiled=True,
        ),
    ]


# Preference losses over [B]


def eager_dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1):
    """The mean sigmoid loss of DPO and both implicit rewards."""
    losses = -F.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))
    return losses.mean(), beta * (chosen - ref_chosen).detach(), beta * (rejected - ref_rejected).detach()


def our_dpo_loss(*logps: Tensor) -> tuple[Tensor, ...]:
    """The same by our operation."""
    losses, chosen_rewards, rejected_rewards = ops.dpo_loss(*logps)
    return losses.mean(), chosen_rewards, rejected_rewards


def eager_reward_loss(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss and the accuracy."""
    return -F.logsigmoid(chosen - rejected).mean(), (chosen > rejected).float().mean()


def _pair_cases(b: int) -> list[Case]:
    def make(count: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(5 * torch.randn(b) for _ in range(count))

    def case(name: str, count: int, ours: Function, eager: Function) -> Case:
        return Case(
            name=f"{name} forward + backward", shape=f"[{b}]", make_inputs=make(count), ours=ours, eager=eager,
            compiled=True, differentiable=(0, 1),
        )  # fmt: skip

    return [
        case("dpo_loss", 4, our_dpo_loss, eager_dpo_loss),
        case("reward_loss", 2, lambda *x: ops.reward_loss(*x)[:2], eager_reward_loss),
    ]
