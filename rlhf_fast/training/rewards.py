"""Rewards: a reward-model directory or any Python function, behind one call.

A reward function is `f(prompts, completions, **columns) -> list[float]`. `columns` are the other columns of the prompt
rows, each a list. A reward model with the policy's vocabulary scores the token ids that the policy produced. For any
other reward model the text is tokenised anew.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.encoding import encode_texts, pad_id, pad_left, pad_right
from rlhf_fast.lm.limits import check_rows, context_length
from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.lm.offload import place, visiting
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.rollout.generate import Rollout

RewardFunction = Callable[..., Sequence[float]]


class Reward:
    """Scores rollouts. `model` is the reward model, or None where a function gives the reward.

    spec: a reward function, its name as in `load_function`, or the directory or hub name of a reward model.
    tokenizer: the policy's. max_prompt_length: tokens of a prompt that a reward model sees where it reads text.
    shared: a model whose base the reward model stands on. offload: the reward model waits in CPU memory.
    """

    def __init__(
        self,
        spec: str | RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        *,
        micro_batch_size: int | None = None,
        max_prompt_length: int = sys.maxsize,
        shared: PreTrainedModel | None = None,
        offload: bool = False,
    ) -> None:
        self.tokenizer, self.device, self.micro_batch_size = tokenizer, device, micro_batch_size
        self.max_prompt_length = max_prompt_length
        self.model: PreTrainedModel | None = None
        self.function: RewardFunction | None = None
        self.retokenizer: PreTrainedTokenizerBase | None = None
        if callable(spec):
            self.function, self.name = spec, getattr(spec, "__name__", "reward")
        elif ":" in spec and not Path(spec).is_dir():
            self.function, self.name = load_function(spec), spec
        else:
            self.model, self.name = load_scorer(spec, head=None, trainable=False, shared=shared), str(spec)
            place(self.model, device, offload)
            own = load_tokenizer(spec, "reward")
            self.retokenizer = None if own.get_vocab() == tokenizer.get_vocab() else own

    @property
    def reader(self) -> PreTrainedModel | None:
        """The reward model where it reads the policy's token ids."""
        return self.model if self.retokenizer is None else None

    @torch.no_grad()
    def __call__(self, rollout: Rollout, columns: Mapping[str, Sequence]) -> Tensor:
        """Scores [B] fp32. `columns["prompt"]` holds the prompts' text. Other columns go to a function unchanged."""
        if self.function is not None or self.retokenizer is not None:
            return self.of_texts(decode_responses(self.tokenizer, rollout), columns, rollout.finished.tolist())
        return self._call_model(rollout.sequences)

    @torch.no_grad()
    def of_texts(
        self,
        completions: list[str],
        columns: Mapping[str, Sequence],
        finished: Sequence[bool] | None = None,
        prompt_ids: list[list[int]] | None = None,
    ) -> Tensor:
        """Scores [B] fp32 of texts.

        finished: which completions a reward model sees with an EOS at the end; default: all. prompt_ids: the prompts as
            the policy gets them; a reward model with the policy's tokenizer sees the same ids.
        """
        if self.function is not None:
            return self._call_function(completions, columns)
        finished = [True] * len(completions) if finished is None else finished
        return self._call_model(self._tokenize(completions, columns["prompt"], finished, prompt_ids))

    def _call_model(self, sequences: Sequences) -> Tensor:
        assert self.model is not None  # a reward is a function or a model
        size = self.micro_batch_size or len(sequences.prompt_ids)
        starts = range(0, len(sequences.prompt_ids), size)
        scores = Scores(self.model)
        with visiting(self.model):
            return torch.cat([scores.of(sequences.rows(slice(i, i + size))) for i in starts])

    def _call_function(self, completions: list[str], columns: Mapping[str, Sequence]) -> Tensor:
        assert self.function is not None  # a reward is a function or a model
        others = {name: list(values) for name, values in columns.items() if name != "prompt"}
        if taken := sorted(others.keys() & {"prompts", "completions"}):
            raise ValueError(
                f"reward {self.name}: expected no column of the prompts' rows to have the name of an argument of every "
                f"reward function, got {', '.join(taken)}"
            )
        scores = self.function(list(columns["prompt"]), completions, **others)
        if isinstance(scores, str) or not hasattr(scores, "__iter__"):
            raise ValueError(f"reward {self.name}: expected {len(completions)} scores, got {scores!r}")
        scores = list(scores)
        if len(scores) != len(completions):
            raise ValueError(f"reward {self.name}: expected {len(completions)} scores, got {len(scores)}")
        return torch.tensor([self._finite(score, row) for row, score in enumerate(scores)], device=self.device)

    def _finite(self, score: Any, row: int) -> float:
        try:
            number = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError, RuntimeError):  # torch: RuntimeError for several elements
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"reward {self.name}: expected finite scores, got {score!r} for row {row}")
        return number

    def _tokenize(
        self, completions: list[str], prompts: Sequence[str], finished: Sequence[bool], prompt_ids: list | None
    ) -> Sequences:
        assert self.model is not None  # functions read text
        tok = self.retokenizer or self.tokenizer
        if self.retokenizer is None and prompt_ids is not None:
            prompts = prompt_ids
        elif self.retokenizer is not None and self.tokenizer.bos_token is not None:  # chat templates write BOS
            prompts = [text.removeprefix(str(self.tokenizer.bos_token)) for text in prompts]
        context = context_length(self.model.config) or sys.maxsize
        pairs = encode_texts(list(prompts), completions, finished, tok, context, self.max_prompt_length)
        check_rows(self.model, tok, [ids for pair in pairs for ids in pair], "max_prompt_length", role="reward")
        prompt_rows, responses = (list(rows) for rows in zip(*pairs, strict=True))
        return Sequences(*pad_left(prompt_rows, pad_id(tok)), *pad_right(responses, pad_id(tok))).to(self.device)


def decode_responses(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """The completions' text without special tokens."""
    rows = zip(rollout.response_ids.tolist(), rollout.response_mask.tolist(), strict=True)
    ids = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def load_function(spec: str) -> RewardFunction:
    """The function that `package.module:name` or `path/to/file.py:name` names.

    Raises ValueError where there is no such file, module or function.
    """
    module_name, _, name = spec.rpartition(":")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise ValueError(f"reward: expected `file.py:name` with an existing file, got {spec!r}")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward: expected a directory, `package.module:name` or `file.py:name`, got {spec!r}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(f"reward: expected a function {name!r} in {module_name}, which defines {names}")
    return function  # pyright: ignore[reportReturnType]


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"rlhf_fast_reward {path}".replace(".", "_")  # a name that no import statement can hold
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.parent)
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        _make_importable(Path.cwd())  # a console script does not look there
    return importlib.import_module(name)


def _make_importable(folder: Path) -> None:
    """Adds the folder to the end of the path, so that no file beside a reward function hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
