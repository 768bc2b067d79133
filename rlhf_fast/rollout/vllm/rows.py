"""Completions as a vLLM server is asked for them and as it answers, checked so that no row is wrong or missing."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from rlhf_fast.rollout.vllm.client import BadAnswer, ServerError

# What the model's own generation config, or a flag of the server, could set otherwise.
_PLAIN = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Row(NamedTuple):
    """One completion of T tokens, the EOS included."""

    ids: list[int]
    logprobs: list[float]  # of the chosen tokens
    finished: bool  # an EOS came before the length limit


class Request(NamedTuple):
    """One prompt, and how its completions are drawn. temperature 0: greedy. Sample i has the seed `seed` + i."""

    prompt: list[int]
    samples: int
    temperature: float
    limit: int  # tokens
    seed: int

    def body(self, model: str, eos: Collection[int]) -> dict[str, Any]:
        """The request for `/v1/completions`. Tokens of `eos` alone end a completion, as in our own decoding."""
        return _PLAIN | {
            "model": model,
            "prompt": self.prompt,
            "n": self.samples,
            "temperature": self.temperature,
            "max_tokens": self.limit,
            "seed": self.seed,
            "ignore_eos": True,  # the EOS that the server knows; `stop_token_ids` has all of ours
            "stop_token_ids": sorted(eos),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def rows(self, answer: Any, eos: Collection[int]) -> list[Row]:
        """The completions in the order of their samples. Raises BadAnswer for an answer that cannot be right."""
        try:
            choices = {choice["index"]: choice for choice in answer["choices"]}
        except (TypeError, KeyError) as error:
            raise BadAnswer("an answer without completions") from error
        if sorted(choices) != list(range(self.samples)) or len(answer["choices"]) != self.samples:
            raise BadAnswer(f"{len(answer['choices'])} completions in place of {self.samples}")
        return [self._row(choices[i], eos) for i in range(self.samples)]

    def _row(self, choice: dict[str, Any], eos: Collection[int]) -> Row:
        ids, found = choice.get("token_ids"), choice.get("logprobs") or {}
        if ids is None or "token_logprobs" not in found:
            raise ServerError(
                "vllm_url: expected a server that returns token ids and log-probs (return_token_ids), such as "
                "vLLM 0.32, got an answer without them"
            )
        if choice.get("prompt_token_ids") not in (None, self.prompt):
            raise BadAnswer("a completion of another prompt")
        names, logprobs = found.get("tokens") or [], found["token_logprobs"]
        if not len(ids) == len(names) == len(logprobs):
            raise BadAnswer(f"a completion of {len(ids)} tokens with {len(logprobs)} log-probs")
        if any(name != f"token_id:{token}" for name, token in zip(names, ids, strict=True)):
            raise BadAnswer("log-probs of other tokens than those of the completion")
        if not all(isinstance(p, int | float) and math.isfinite(p) for p in logprobs):
            raise BadAnswer("a log-prob that is no number")
        reason, ended = choice.get("finish_reason"), bool(ids) and ids[-1] in eos
        whole = (reason == "stop" and ended) or (reason == "length" and len(ids) == self.limit)
        if not whole or len(ids) > self.limit or any(token in eos for token in ids[:-1]):
            raise BadAnswer(f"a completion of {len(ids)} tokens that ends by {reason!r} before its end")
        return Row(ids, logprobs, ended)


def text_logprobs(answer: Any, ids: list[int]) -> list[float]:
    """log p of every token of `ids` but the first, from the answer to a request with `prompt_logprobs`.

    Raises BadAnswer where one is missing.
    """
    try:
        (choice,) = answer["choices"]
        places = zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
        found = [place[str(token)]["logprob"] for place, token in places]
    except (TypeError, KeyError, ValueError) as error:
        raise BadAnswer("an answer without the log-probs of its prompt") from error
    if not all(math.isfinite(p) for p in found):
        raise BadAnswer("a log-prob that is no number")
    return found
