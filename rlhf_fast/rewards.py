"""Rewards: a reward-model directory or any Python function, behind one call.

A reward function is `f(prompts, completions, **columns) -> list[float]`, the extra columns of the prompt rows as
keyword lists. A reward model scores the very token ids the policy produced when both use the same vocabulary;
otherwise the text is tokenised anew.
"""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data import pad_id, pad_left, pad_right
from rlhf_fast.models import Sequences, load_scorer, load_tokenizer, sequence_scores
from rlhf_fast.offload import place, visiting
from rlhf_fast.rollout import Rollout

RewardFunction = Callable[..., Sequence[float]]


class Reward:
    """Scores rollouts; `model` is the reward model when there is one (for memory figures), else None.

    shared: the model on whose base a reward model stands that is an adapter. offload: it waits in CPU memory.
    """

    def __init__(
        self,
        spec: str | RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        *,
        micro_batch_size: int | None = None,
        shared: PreTrainedModel | None = None,
        offload: bool = False,
    ) -> None:
        self.tokenizer, self.device, self.micro_batch_size = tokenizer, device, micro_batch_size
        self.model: PreTrainedModel | None = None
        self.function: RewardFunction | None = None
        if callable(spec):
            self.function, self.name = spec, getattr(spec, "__name__", "reward")
        elif ":" in spec and not Path(spec).is_dir():
            self.function, self.name = load_function(spec), spec
        else:
            self.model, self.name = load_scorer(spec, head=None, trainable=False, shared=shared), str(spec)
            place(self.model, device, offload)
            own = load_tokenizer(spec)
            self.retokenizer = None if own.get_vocab() == tokenizer.get_vocab() else own

    @torch.no_grad()
    def __call__(self, rollout: Rollout, columns: Mapping[str, Sequence]) -> Tensor:
        """Scores [B] fp32. `columns["prompt"]` holds the prompts' text; the others go to a function as they are."""
        if self.function is not None or self.retokenizer is not None:
            return self.of_texts(decode_responses(self.tokenizer, rollout), columns, rollout.finished.tolist())
        return self._call_model(rollout.sequences)

    @torch.no_grad()
    def of_texts(
        self, completions: list[str], columns: Mapping[str, Sequence], finished: Sequence[bool] | None = None
    ) -> Tensor:
        """Scores [B] fp32 of texts. finished: which of them a model sees with an EOS at the end; default: all."""
        if self.function is not None:
            return self._call_function(completions, columns)
        return self._call_model(self._tokenize(completions, columns, finished or [True] * len(completions)))

    def _call_model(self, sequences: Sequences) -> Tensor:
        size = self.micro_batch_size or len(sequences.prompt_ids)
        starts = range(0, len(sequences.prompt_ids), size)
        with visiting(self.model):
            return torch.cat([sequence_scores(self.model, sequences.rows(slice(i, i + size))) for i in starts])

    def _call_function(self, completions: list[str], columns: Mapping[str, Sequence]) -> Tensor:
        others = {name: list(values) for name, values in columns.items() if name != "prompt"}
        scores = list(self.function(list(columns["prompt"]), completions, **others))
        if len(scores) != len(completions):
            raise ValueError(f"reward {self.name}: expected {len(completions)} scores, got {len(scores)}")
        for row, score in enumerate(scores):
            if not math.isfinite(score):
                raise ValueError(f"reward {self.name}: expected finite scores, got {score} for row {row}")
        return torch.tensor([float(s) for s in scores], device=self.device)

    def _tokenize(self, completions: list[str], columns: Mapping[str, Sequence], finished: Sequence[bool]) -> Sequences:
        tok = self.retokenizer or self.tokenizer
        prompts = [tok(text)["input_ids"] for text in columns["prompt"]]
        responses = [
            tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id] * done
            for text, done in zip(completions, finished, strict=True)
        ]
        return Sequences(*pad_left(prompts, pad_id(tok)), *pad_right(responses, pad_id(tok))).to(self.device)


def decode_responses(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """The completions' text without special tokens."""
    rows = zip(rollout.response_ids.tolist(), rollout.response_mask.tolist(), strict=True)
    ids = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def load_function(spec: str) -> RewardFunction:
    """The function named by `package.module:name` or `path/to/file.py:name`."""
    module_name, _, name = spec.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ValueError(f"reward: expected `file.py:name` with an existing file, got {spec!r}")
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        if importlib.util.find_spec(module_name.partition(".")[0]) is None:
            raise ValueError(f"reward: expected a directory, `package.module:name` or `file.py:name`, got {spec!r}")
        module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(f"reward: expected a function {name!r} in {module_name}, which defines {names}")
    return function
