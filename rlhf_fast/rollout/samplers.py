"""The samplers of a run, as its config asks for them. All samplers of one run ask the same server."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.config.sampling import SamplerOptions
from rlhf_fast.rollout.sampler import LocalSampler, Sampler
from rlhf_fast.rollout.vllm.client import Client
from rlhf_fast.rollout.vllm.sampler import VLLMSampler
from rlhf_fast.rollout.vllm.server import Server

_BOUND = 0.1  # nats a token between two engines in bf16, on average


class Samplers:
    """Makes samplers of models.

    output_dir: the run's directory, where a server finds new weights; None: the models do not change.
    Raises nothing before a sampler is made, because nothing is asked of a server before.
    """

    def __init__(
        self, config: SamplerOptions, tokenizer: PreTrainedTokenizerBase, output_dir: str | os.PathLike | None
    ) -> None:
        self.config, self.tokenizer, self.server = config, tokenizer, None
        if config.vllm_url is not None:
            client = Client(config.vllm_url, timeout=config.vllm_timeout, patience=config.vllm_patience)
            directory = None if output_dir is None else Path(output_dir)
            keeps = getattr(config, "rollouts_ahead", 0) > 0
            bound = _BOUND if keeps else getattr(config, "max_mismatch", _BOUND)
            self.server = Server(client, directory=directory, bound=bound, keeps=keeps, transfer=config.vllm_transfer)

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        top_k: int = 0,
        top_p: float = 1.0,
        **options: Any,
    ) -> Sampler:
        """A sampler of `model` for `prompts`, token ids. The options are those of `LocalSampler`.

        Raises ServerError where the server does not answer, or serves another model.
        """
        options["max_new_tokens"] = max_new_tokens
        if self.server is None:
            return LocalSampler(model, self.tokenizer, top_k=top_k, top_p=top_p, **options)
        longest = max(map(len, prompts)) + max_new_tokens
        self.server.check(model, prompts, longest, len(self.tokenizer))
        return VLLMSampler(self.server, model, self.tokenizer, **options)

    @property
    def remote(self) -> bool:
        """Whether another engine samples, whose log-probs are not ours."""
        return self.server is not None

    def changed(self) -> None:
        """The weights of the models have changed."""
        if self.server is not None:
            self.server.changed()
