"""Samplers: prompts in, completions with their log-probs out. Another engine than ours is another `Sampler`.

Left out on purpose: text and rewards, and the choice of a round's prompts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.encoding import pad_id, pad_left
from rlhf_fast.lm.sharding import whole
from rlhf_fast.rollout.generate import Generation, eos_token_ids, generate


class Sampler(Protocol):
    """What stages ask of an engine. B prompts give B * samples sampled rows and, with `greedy`, B greedy rows."""

    def __call__(
        self,
        prompts: Sequence[list[int]],
        *,
        seed: int = 0,
        samples: int = 1,
        greedy: bool = False,
        with_kept: bool = True,
        earlier: Sequence[list[int]] = (),
    ) -> Generation:
        """Completions of prompts, lists of token ids without padding. The arguments are those of `generate`.

        earlier: the prompts that other processes have before these.
        """
        ...

    def refresh(self) -> None:
        """Gives the engine the weights that the policy has now. Every process calls it before a round of samples."""
        ...


class LocalSampler:
    """Our own decoding of a policy in this process, on the policy's device.

    All processes call the sampler of a model in shards.
    max_new_tokens, temperature, top_k, top_p, greedy_max_new_tokens: as in `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy_max_new_tokens: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "greedy_max_new_tokens": greedy_max_new_tokens,
        }

    def refresh(self) -> None:
        """Nothing: the policy is here."""

    def __call__(
        self,
        prompts: Sequence[list[int]],
        *,
        seed: int = 0,
        samples: int = 1,
        greedy: bool = False,
        with_kept: bool = True,
        earlier: Sequence[list[int]] = (),
    ) -> Generation:
        """As in `Sampler`."""
        pad = pad_id(self.tokenizer)
        ids, mask = (x.to(self.model.device) for x in pad_left(list(prompts), pad))
        counts = Counter(map(tuple, earlier))
        before = torch.tensor([counts[tuple(prompt)] for prompt in prompts], device=ids.device) if counts else None
        with whole(self.model):
            return generate(
                self.model,
                ids,
                mask,
                eos_ids=eos_token_ids(self.model, self.tokenizer),
                pad_id=pad,
                seed=seed,
                samples=samples,
                greedy=greedy,
                with_kept=with_kept,
                earlier=before,
                **self.options,
            )
