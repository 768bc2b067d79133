"""The operators on CUDA tensors, by the CUDA C++ kernels of `csrc/cuda`. Imported only where torch has CUDA.

Each function has its operator's signature, allocates the outputs and launches on the current stream; none waits for the
device. Tensors in, tensors out: what a kernel needs beyond them is `_scratch`, one per stream, or allocated here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _cuda
from rlhf_fast.ops import dpo, groups, kl, pair_options, policy_loss, policy_options, preference, returns, sampling
from rlhf_fast.ops.dispatch import code, contiguous, kernel, pointer
from rlhf_fast.ops.logprobs import token_logprobs_outputs
from rlhf_fast.ops.row_blocks import gradient_kernels, over_rows, rows_contiguous
from rlhf_fast.ops.token_kl import token_kl_outputs

_scratches: dict[tuple[torch.device, int], Tensor] = {}


def _launch(name: str, like: Tensor, *arguments: float, scratch: bool = False) -> None:
    """Run the kernel on the current stream of the device of `like`."""
    with _current_stream(like.device) as stream:
        shared = (_scratch(like.device, stream).data_ptr(),) if scratch else ()
        getattr(_cuda, name)(*arguments, *shared, stream)


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _scratch(device: torch.device, stream: int) -> Tensor:
    """Memory that the blocks of a launch share: its counters are 0 between launches, which take turns in a stream.

    A launch captured into a CUDA graph gets its own, which lives as long as the graph: replays may run on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return _new_scratch(device)
    if (device, stream) not in _scratches:
        _scratches[device, stream] = _new_scratch(device)
    return _scratches[device, stream]


def _new_scratch(device: torch.device) -> Tensor:
    return torch.zeros(_cuda.scratch_bytes, dtype=torch.uint8, device=device)


def _normalizer(normalizer: Tensor | None, like: Tensor) -> tuple[float, Tensor | None]:
    """The denominator by value where the host knows it, else as a double on the device, which the kernel reads."""
    if normalizer is None:
        return 0.0, None
    if normalizer.device.type == "cpu" != like.device.type:
        return normalizer.item(), None
    return 0.0, normalizer.to(like.device, torch.float64)


@kernel("token_logprobs", "cuda")
def _token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits, ids = rows_contiguous(logits), token_ids.contiguous()
    outputs = token_logprobs_outputs(logits, ids, temperature, softcap, inplace_backward)
    for _, (z,), (z_ids, *results) in over_rows((logits,), (ids, *outputs)):
        _launch(
            "token_logprobs", z, z.data_ptr(), code(z), z.stride(0), z_ids.data_ptr(), *z.shape, 1.0 / temperature,
            softcap, *map(pointer, results), scratch=True,
        )  # fmt: skip
    return outputs


@gradient_kernels("token_logprobs_backward", "cuda")
def _token_logprobs_gradient(
    grad: Tensor, z: Tensor, temperature: float, softcap: float, ids: Tensor, *per_row: Tensor | None
) -> None:
    """per_row: logprobs, entropy, stats, the gradients by the first two."""
    _launch(
        "token_logprobs_backward", z, z.data_ptr(), code(z), z.stride(0), ids.data_ptr(), *z.shape, 1.0 / temperature,
        softcap, *map(pointer, per_row), grad.data_ptr(), grad.stride(0),
    )  # fmt: skip


@kernel("token_kl", "cuda")
def _token_kl(
    logits: Tensor, ref_logits: Tensor, token_ids: Tensor, temperature: float, softcap: float, inplace_backward: bool
) -> tuple[Tensor, ...]:
    both, ids = (rows_contiguous(logits), rows_contiguous(ref_logits)), token_ids.contiguous()
    outputs = token_kl_outputs(*both, ids, temperature, softcap, inplace_backward)
    for _, (z, z_ref), (z_ids, *results) in over_rows(both, (ids, *outputs)):
        _launch(
            "token_kl", z, z.data_ptr(), code(z), z.stride(0), z_ref.data_ptr(), z_ref.stride(0), z_ids.data_ptr(),
            *z.shape, 1.0 / temperature, softcap, *map(pointer, results),
        )  # fmt: skip
    return outputs


@gradient_kernels("token_kl_backward", "cuda", references=1)
def _token_kl_gradient(
    grad: Tensor, z: Tensor, z_ref: Tensor, temperature: float, softcap: float, ids: Tensor, *per_row: Tensor | None
) -> None:
    """per_row: logprobs, entropy, stats, the gradients by the first three."""
    _launch(
        "token_kl_backward", z, z.data_ptr(), code(z), z.stride(0), z_ref.data_ptr(), z_ref.stride(0), ids.data_ptr(),
        *z.shape, 1.0 / temperature, softcap, *map(pointer, per_row), grad.data_ptr(), grad.stride(0),
    )  # fmt: skip


@kernel("sample_tokens", "cuda")
def _sample_tokens(
    logits: Tensor, uniforms: Tensor, greedy_mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_contiguous(logits)
    uniforms, greedy = contiguous(uniforms, greedy_mask)
    outputs, (n, vocabulary) = sampling.sample_outputs(logits, uniforms, greedy, temperature), logits.shape
    states = uniforms.new_empty(n, -(-vocabulary // _cuda.sample_tile), 3)
    _launch(
        "sample_tokens", logits, logits.data_ptr(), code(logits), logits.stride(0), n, vocabulary, 1.0 / temperature,
        uniforms.data_ptr(), pointer(greedy), states.data_ptr(), *map(pointer, outputs),
    )  # fmt: skip
    return outputs


@kernel("kl_penalty", "cuda")
def _kl_penalty(logp: Tensor, ref: Tensor, estimator: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    logp, ref = contiguous(logp, ref)
    outputs = kl.kl_penalty_outputs(logp, ref, estimator, with_grad)
    _launch(
        "kl_penalty", logp, code(logp), logp.data_ptr(), ref.data_ptr(), logp.numel(), kl.ESTIMATORS.index(estimator),
        *map(pointer, outputs),
    )  # fmt: skip
    return outputs


@kernel("shape_rewards", "cuda")
def _shape_rewards(
    scores: Tensor, logp: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, estimator: str, clip: float
) -> Tensor:
    tensors = contiguous(scores, logp, ref, mask)
    rewards = logp.new_empty(logp.shape)
    _launch(
        "shape_rewards", logp, code(logp), *map(pointer, tensors), *logp.shape, kl_coef,
        kl.ESTIMATORS.index(estimator), clip, rewards.data_ptr(),
    )  # fmt: skip
    return rewards


@kernel("gae", "cuda")
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, lams: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    tensors = contiguous(rewards, values, mask, lams)
    outputs = returns.gae_outputs(rewards, values, mask, lams, gamma, lam)
    _launch("gae", rewards, code(rewards), *map(pointer, tensors), *rewards.shape, gamma, lam, *map(pointer, outputs))
    return outputs


@kernel("discounted_returns", "cuda")
def _discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    tensors = contiguous(rewards, mask)
    out = rewards.new_empty(rewards.shape)
    _launch("discounted_returns", rewards, code(rewards), *map(pointer, tensors), *rewards.shape, gamma, out.data_ptr())
    return out


@kernel("remax_returns", "cuda")
def _remax_returns(
    scores: Tensor,
    greedy_scores: Tensor,
    logp: Tensor,
    ref: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    clip: float,
    variant: str,
) -> Tensor:
    tensors = contiguous(scores, greedy_scores, logp, ref, mask)
    out = logp.new_empty(logp.shape)
    _launch(
        "remax_returns", logp, code(logp), *map(pointer, tensors), *logp.shape, kl_coef, gamma, clip,
        returns.REMAX_VARIANTS.index(variant), out.data_ptr(),
    )  # fmt: skip
    return out


@kernel("whiten", "cuda")
def _whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    tensors = contiguous(x, mask)
    out = x.new_empty(x.shape)
    _launch("whiten", x, code(x), *map(pointer, tensors), x.numel(), shift_mean, out.data_ptr(), scratch=True)
    return out


@kernel("rloo_advantages", "cuda")
def _rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    return _group_advantages("rloo_advantages", scores, group_size)


@kernel("grpo_advantages", "cuda")
def _grpo_advantages(scores: Tensor, group_size: int) -> Tensor:
    return _group_advantages("grpo_advantages", scores, group_size)


def _group_advantages(name: str, scores: Tensor, group_size: int) -> Tensor:
    scores = scores.contiguous()
    out = groups.group_outputs(scores, group_size)
    _launch(name, scores, code(scores), scores.data_ptr(), scores.shape[0], group_size, out.data_ptr())
    return out


@kernel("ppo_loss", "cuda")
def _ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    logp, old_logp, advantages, mask, ref, entropy = contiguous(logp, old_logp, advantages, mask, ref, entropy)
    *terms, entropy_coef, reduction, with_grad_logp, with_grad_entropy = options
    loss, stats, *grads = policy_loss.ppo_outputs(logp, with_grad_logp, with_grad_entropy)
    denominator, normalizer = _normalizer(normalizer, logp)
    _launch(
        "ppo_loss", logp, code(logp), logp.data_ptr(), old_logp.data_ptr(), advantages.data_ptr(),
        advantages.dim() == 2, mask.data_ptr(), pointer(ref), pointer(entropy), *logp.shape,
        *policy_options.PolicyOptions(*terms).indices(), entropy_coef, policy_options.REDUCTIONS.index(reduction),
        denominator, pointer(normalizer), *map(pointer, (*grads, loss, stats)), scratch=True,
    )  # fmt: skip
    return loss, stats, *grads


@kernel("ppo_value_loss", "cuda")
def _ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    clip: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = contiguous(values, old_values, targets, mask)
    loss, stats, grad = policy_loss.ppo_value_outputs(tensors[0], with_grad)
    denominator, normalizer = _normalizer(normalizer, values)
    _launch(
        "ppo_value_loss", values, code(values), *map(pointer, tensors), values.numel(), clip, denominator,
        pointer(normalizer), *map(pointer, (grad, loss, stats)), scratch=True,
    )  # fmt: skip
    return loss, stats, grad


@kernel("reinforce_loss", "cuda")
def _reinforce_loss(
    logp: Tensor, advantages: Tensor, mask: Tensor, normalizer: Tensor | None, reduction: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    logp, advantages, mask = contiguous(logp, advantages, mask)
    loss, grad = policy_loss.reinforce_outputs(logp, with_grad)
    denominator, normalizer = _normalizer(normalizer, logp)
    _launch(
        "reinforce_loss", logp, code(logp), logp.data_ptr(), advantages.data_ptr(), advantages.dim() == 2,
        mask.data_ptr(), *logp.shape, policy_options.REDUCTIONS.index(reduction), denominator, pointer(normalizer),
        pointer(grad), loss.data_ptr(), scratch=True,
    )  # fmt: skip
    return loss, grad


@kernel("reward_loss", "cuda")
def _reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float, with_grad: bool
) -> tuple[Tensor, ...]:
    tensors = contiguous(chosen, rejected, margin)
    loss, stats, *grads = preference.reward_outputs(chosen, rejected, margin, center_coef, with_grad)
    _launch(
        "reward_loss", chosen, code(chosen), *map(pointer, tensors), chosen.shape[0], center_coef,
        *map(pointer, (*grads, loss, stats)), scratch=True,
    )  # fmt: skip
    return loss, stats, *grads


@kernel("ranking_loss", "cuda")
def _ranking_loss(scores: Tensor, ranks: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    tensors = contiguous(scores, ranks)
    loss, stats, grad = preference.ranking_outputs(scores, ranks, with_grad)
    _launch(
        "ranking_loss", scores, code(scores), *map(pointer, tensors), *scores.shape,
        *map(pointer, (grad, loss, stats)), scratch=True,
    )  # fmt: skip
    return loss, stats, grad


@kernel("dpo_loss", "cuda")
def _dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    margin: float,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    tensors = contiguous(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    outputs = dpo.dpo_outputs(chosen, with_grad)
    _launch(
        "dpo_loss", chosen, code(chosen), *map(pointer, tensors), chosen.shape[0], beta,
        pair_options.PAIR_TERMS.index(loss_type), label_smoothing, margin, *map(pointer, outputs),
    )  # fmt: skip
    return outputs
