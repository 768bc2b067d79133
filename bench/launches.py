"""A launch of every operator that has a GPU kernel, at a size: what `bench static` counts and `bench gpu` times.

All masks are full and every output is asked for, so that the bytes that a launch cannot avoid are those of its tensors:
each input read once, each output written once.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Kernels = Mapping[str, Callable]
GROUP = 4  # samples of a prompt
ANSWERS = 8  # of a ranking


class Launch(NamedTuple):
    """An operator and its arguments. shape: of its first tensor, in words."""

    operator: str
    args: tuple
    shape: str

    def run(self, kernels: Kernels) -> tuple[Tensor, ...]:
        """The results of one launch by the kernels of a back end."""
        results = kernels[self.operator](*self.args)
        return results if isinstance(results, tuple) else () if results is None else (results,)

    @property
    def overwrites(self) -> bool:
        """Whether the results take the place of the first tensor, as torch's names say with an underscore."""
        return self.operator.endswith("_")

    def ideal_bytes(self, results: tuple[Tensor, ...]) -> tuple[int, int]:
        """(bytes of loads, bytes of stores) that no kernel can avoid."""
        loads = sum(x.nbytes for x in self.args if isinstance(x, Tensor))
        return loads, self.args[0].nbytes if self.overwrites else sum(x.nbytes for x in results)


def on_rows(kernels: Kernels, rows: int, vocabulary: int, dtype: torch.dtype) -> list[Launch]:
    """The operators on logits [rows, vocabulary]. kernels: of the back end whose forward results backward takes."""
    shape = f"[{rows}, {vocabulary}] {str(dtype).removeprefix('torch.')}"
    z = (3 * torch.randn(rows, vocabulary)).to(dtype)
    ref = z + (torch.randn(rows, vocabulary) / 8).to(dtype)  # near the policy, as a reference is
    ids, uniforms = torch.randint(0, vocabulary, (rows,)), torch.rand(rows, dtype=torch.float64)
    by = [torch.randn(rows) for _ in range(3)]
    plain = kernels["token_logprobs"](z, ids, 1.0, 0.0, False)
    *pair, _, _, stats = kernels["token_kl"](z, ref, ids, 1.0, 0.0, False)
    backward, pair_backward = (z, ids, *plain, *by[:2], 1.0, 0.0), (z, ref, ids, *pair, stats, *by, 1.0, 0.0)
    found = {
        "token_logprobs": (z, ids, 1.0, 0.0, False),
        "token_logprobs_backward": backward,
        "token_logprobs_backward_": (z.clone(), *backward[1:]),
        "token_kl": (z, ref, ids, 1.0, 0.0, False),
        "token_kl_backward": pair_backward,
        "token_kl_backward_": (z.clone(), *pair_backward[1:]),
        "sample_tokens": (z, uniforms, None, 1.0),
    }
    return [Launch(name, args, shape) for name, args in found.items()]


def on_tokens(rows: int, length: int) -> list[Launch]:
    """The operators on log-probs, rewards and values [rows, length], float32."""
    centre = torch.randn(rows, length) - 2
    x, y, z, ref, entropy = (centre + 0.2 * torch.randn(rows, length) for _ in range(5))
    scores, greedy, mask = torch.randn(rows), torch.randn(rows), torch.ones(rows, length, dtype=torch.bool)
    clip = ("clip", False, 0.2, 0.2, 0.0, 1.0, 1.05)
    found = {
        "kl_penalty": (x, ref, "k3", True),
        "shape_rewards": (scores, x, ref, mask, 0.05, "k1", 5.0),
        "gae": (x, y, mask, None, 1.0, 0.95),
        "discounted_returns": (x, mask, 0.99),
        "remax_returns": (scores, greedy, x, ref, mask, 0.05, 1.0, 5.0, "verl"),
        "whiten": (x, mask, True),
        "ppo_loss": (x, y, z, mask, ref, entropy, None, *clip, 0.05, "k3", False, 0.01, "token_mean", True, True),
        "ppo_value_loss": (x, y, z, mask, None, 0.2, True),
        "reinforce_loss": (x, y, mask, None, "token_mean", True),
    }
    by_scores = ("shape_rewards", "remax_returns")
    return [Launch(n, args, f"[{rows}]" if n in by_scores else f"[{rows}, {length}]") for n, args in found.items()]


def on_pairs(number: int) -> list[Launch]:
    """The operators on sequences' log-probs and scores [number], float32."""
    chosen, rejected, ref_chosen, ref_rejected = (5 * torch.randn(number) for _ in range(4))
    rankings = torch.randn(number, ANSWERS), torch.randint(0, ANSWERS, (number, ANSWERS))
    scores = torch.randn(GROUP * number)
    found = {
        "rloo_advantages": (scores, GROUP),
        "grpo_advantages": (scores, GROUP),
        "reward_loss": (chosen, rejected, None, 0.0, True),
        "ranking_loss": (*rankings, True),
        "dpo_loss": (chosen, rejected, ref_chosen, ref_rejected, None, None, 0.1, "sigmoid", 0.0, 0.0, True),
    }
    return [Launch(name, args, str(list(args[0].shape))) for name, args in found.items()]
