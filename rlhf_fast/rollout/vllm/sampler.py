"""`VLLMSampler`: the completions of a policy by a vLLM server, in the form of our own decoding."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.encoding import pad_id, pad_left
from rlhf_fast.ranks import current
from rlhf_fast.rollout.generate import Generation, Rollout, eos_token_ids
from rlhf_fast.rollout.uniforms import prompt_keys, row_seeds
from rlhf_fast.rollout.vllm.client import ServerError
from rlhf_fast.rollout.vllm.rows import Request, Row
from rlhf_fast.rollout.vllm.server import Restarted, Server

_AT_ONCE = 128  # requests under way; the server's scheduler makes its batches of them
_TRIES = 3  # of a round whose server was started again


class Asked(NamedTuple):
    """The requests for the completions of some prompts."""

    ids: Tensor  # [B, P] int64, the prompts, left-padded
    mask: Tensor  # [B, P] bool
    requests: list[Request]  # of each prompt in turn: for its samples, for its greedy completion
    eos: frozenset[int]
    samples: int
    greedy: bool


class VLLMSampler:
    """Completions by the server of `server`, which has to have the weights of `model`.

    max_new_tokens, temperature, greedy_max_new_tokens: as in `generate`. There is no top_k and no top_p, because the
    server does not say which tokens it has kept.
    log-probs are the server's, of greedy rows at temperature 1. Entropies are NaN, because the server does not return
    them; `training.mismatch.rescored` computes them. A row depends on the seed, its prompt and its number among the
    prompt's samples, up to the rounding of the server.
    """

    def __init__(
        self,
        server: Server,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        greedy_max_new_tokens: int | None = None,
    ) -> None:
        self.server, self.model, self.tokenizer = server, model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.greedy_max_new_tokens = min(greedy_max_new_tokens or max_new_tokens, max_new_tokens)

    def refresh(self) -> None:
        """As in `Sampler`."""
        self.server.refresh(self.model)

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
        """As in `Sampler`. Raises ServerError where the server gives no right answer."""
        asked = self.ask(prompts, seed=seed, samples=samples, greedy=greedy, earlier=earlier)
        return self.generation(asked, self.rows(asked, self.refresh))

    def ask(
        self,
        prompts: Sequence[list[int]],
        *,
        seed: int = 0,
        samples: int = 1,
        greedy: bool = False,
        earlier: Sequence[list[int]] = (),
    ) -> Asked:
        """What a call with these arguments asks of the server."""
        if samples + greedy < 1:
            raise ValueError(f"samples: expected at least one row per prompt, got samples={samples}, greedy={greedy}")
        ids, mask = pad_left(list(prompts), pad_id(self.tokenizer))
        counts = Counter(map(tuple, earlier))
        before = torch.tensor([counts[tuple(prompt)] for prompt in prompts]) if counts else None
        seeds = row_seeds(seed, prompt_keys(ids, mask, before)).tolist()
        requests = []
        for prompt, first in zip(prompts, seeds, strict=True):
            if samples:
                requests.append(Request(prompt, samples, self.temperature, self.max_new_tokens, first))
            if greedy:
                requests.append(Request(prompt, 1, 0.0, self.greedy_max_new_tokens, first))
        eos = frozenset(eos_token_ids(self.model, self.tokenizer))
        return Asked(ids, mask, requests, eos, samples, greedy)

    def generation(self, asked: Asked, found: list[list[Row]]) -> Generation:
        """The rows of every request as tensors on the model's device."""
        drawn = [row for r, rows in zip(asked.requests, found, strict=True) if r.temperature for row in rows]
        best = [row for r, rows in zip(asked.requests, found, strict=True) if not r.temperature for row in rows]
        sides, pad = (x.to(self.model.device) for x in (asked.ids, asked.mask)), pad_id(self.tokenizer)
        ids, mask = sides
        sampled = _rollout(ids, mask, drawn, asked.samples, pad)
        return Generation(sampled, _rollout(ids, mask, best, 1, pad) if asked.greedy else None)

    def rows(self, asked: Asked, again: Callable[[], None]) -> list[list[Row]]:
        """The rows of every request, from one version of the weights. Any thread may wait for them.

        again: gives the weights to a server that was started again.
        """
        tries = _TRIES if current().size == 1 and self.server.way is not None else 1
        for left in reversed(range(tries)):
            try:
                rows = self._ask(asked.requests, asked.eos)
                self.server.confirm()
                return rows
            except Restarted:
                if not left:
                    raise
                again()
        raise AssertionError  # the last try returns or raises

    def _ask(self, requests: list[Request], eos: frozenset[int]) -> list[list[Row]]:
        client, name = self.server.client, self.server.name
        pool = ThreadPoolExecutor(max(1, min(len(requests), _AT_ONCE)))
        try:
            asked = [
                pool.submit(
                    client.ask, "POST", "/v1/completions", r.body(name, eos), lambda answer, r=r: r.rows(answer, eos)
                )
                for r in requests
            ]
            return [rows.result() for rows in asked]
        except BaseException as error:
            client.break_off()  # else the end of the process would wait for answers that nobody reads
            if not isinstance(error, ServerError) or error.status != 404:
                raise
            lost = error
        finally:
            pool.shutdown(cancel_futures=True)
            client.close()  # the pool's threads are gone
            client.stopped.clear()
        self.server.confirm()  # a server that was started again has no adapter of this name
        raise lost


def _rollout(ids: Tensor, mask: Tensor, rows: list[Row], samples: int, pad: int) -> Rollout:
    """The rows as tensors on the device of `ids`; each prompt has `samples` consecutive rows."""
    device, width = ids.device, max((len(row.ids) for row in rows), default=0)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    response = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows], device=device)
    logprobs = torch.tensor([row.logprobs + [0.0] * (width - len(row.ids)) for row in rows], device=device)
    response_mask = torch.arange(width, device=device) < lengths.view(-1, 1)
    return Rollout(
        ids.repeat_interleave(samples, dim=0),
        mask.repeat_interleave(samples, dim=0),
        response.view(len(rows), width).long(),
        response_mask,
        logprobs.view(len(rows), width).float(),
        torch.full((len(rows), width), torch.nan, device=device).where(response_mask, 0.0),
        torch.tensor([row.finished for row in rows], device=device, dtype=torch.bool),
    )
