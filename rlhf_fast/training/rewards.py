"""Rewards: reward models and Python functions, one or several with weights, behind one call.

A completion's score is the weighted sum of its parts' scores. `reward_functions` says how a function is called. A
function that answers None for a completion takes no part in this completion's sum. A reward model with the policy's
vocabulary scores the token ids that the policy produced. For any other reward model the text is tokenised anew. A
conversation is read by the reward model's own chat template, which `reading` does.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.config.stages import Shard
from rlhf_fast.data.encoding import continuations, encode_texts, fit_answer, pad_id, pad_left, pad_right
from rlhf_fast.lm.dtypes import Dtype
from rlhf_fast.lm.limits import check_rows, context_length
from rlhf_fast.lm.loading import load_scorer, trained_here
from rlhf_fast.lm.offload import place, visiting
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.lm.sharding import shard_frozen, whole
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.training.reading import Conversation, Reader
from rlhf_fast.training.reward_functions import FunctionReward, RewardFunction, finite, load_function

__all__ = ["Answers", "ModelReward", "Reward", "RewardFunction", "Scored", "decode_responses", "load_function"]

Spec = str | Path | RewardFunction


class Scored(NamedTuple):
    """What a reward says of B completions."""

    scores: Tensor  # [B] fp32, the weighted sum
    parts: dict[str, Tensor]  # name of a part -> its scores [B] float64 on the CPU, NaN where it does not judge


class Answers:
    """Completions that are to be scored: those of a rollout, or texts.

    columns: the rows' columns; `prompt` is the prompts' text. finished: which texts have an end. pairs: prompt and
    completion as the policy's token ids; default: the texts', as training encodes them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, Sequence],
        *,
        rollout: Rollout | None = None,
        texts: list[str] | None = None,
        finished: Sequence[bool] | None = None,
        pairs: list[tuple[list[int], list[int]]] | None = None,
    ) -> None:
        self.tokenizer, self.columns, self.rollout, self._texts = tokenizer, columns, rollout, texts
        self._pairs = pairs
        if rollout is not None:
            finished = rollout.finished.tolist()
        assert rollout is not None or texts is not None
        self.finished = [True] * len(texts or ()) if finished is None else finished

    def __len__(self) -> int:
        return len(self.finished)

    @cached_property
    def texts(self) -> list[str]:
        """Without special tokens."""
        if self._texts is not None:
            return self._texts
        assert self.rollout is not None
        return decode_responses(self.tokenizer, self.rollout)

    @cached_property
    def ids(self) -> list[list[int]]:
        """The policy's token ids of every completion, its end included where it is finished."""
        return response_ids(self.rollout) if self.rollout is not None else [ids for _, ids in self.pairs]

    @cached_property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion of every text as the policy's token ids."""
        if self._pairs is None:
            prompts = list(self.columns["prompt"])
            return encode_texts(prompts, self.texts, self.finished, self.tokenizer, sys.maxsize, sys.maxsize)
        return self._pairs

    @cached_property
    def continued(self) -> list[str]:
        """The texts as they follow the prompts' texts, for a model that tokenizes both anew."""
        if self.rollout is None:
            return self.texts
        return continuations(list(self.columns["prompt"]), id_pairs(self.rollout), self.finished, self.tokenizer)

    def arguments(self) -> dict[str, Callable[[], list]]:
        """The arguments of reward functions. Every function gets lists of its own, which it may change."""
        lists: dict[str, Callable[[], Iterable]] = {
            **{
                name: (lambda values=values: map(_own, values))
                for name, values in self.columns.items()
                if name != "prompt"
            },
            "prompts": lambda: self.columns["prompt"],
            "completions": lambda: self.texts,
            "completion_ids": lambda: map(list, self.ids),
        }
        return {name: (lambda make=make: list(make())) for name, make in lists.items()}


class ModelReward:
    """One reward model. The arguments are those of `Reward`."""

    def __init__(
        self,
        spec: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        micro_batch_size: int | None,
        max_prompt_length: int,
        shared: PreTrainedModel | None,
        offload: bool,
        dtype: Dtype,
        how: Shard,
    ) -> None:
        self.tokenizer, self.device, self.name = tokenizer, device, str(spec)
        self.micro_batch_size, self.max_prompt_length = micro_batch_size, max_prompt_length
        with whole(shared):
            self.model = load_scorer(spec, dtype=dtype, head=None, trainable=False, shared=shared, shard=how)
            place(self.model, device, offload and how == "none")
            shard_frozen(self.model, shared, how, offload=offload)
        own = load_tokenizer(spec, "reward")
        self.retokenizer = None if own.get_vocab() == tokenizer.get_vocab() else own
        self.context = context_length(self.model.config) or sys.maxsize
        others = own.chat_template not in (None, tokenizer.chat_template)
        self.reader = None
        if self.retokenizer is not None or others:
            self.reader = Reader(own, self.name, as_trained=trained_here(self.model), context=self.context)

    def __call__(self, answers: Answers) -> Tensor:
        """Scores [B] fp32. Raises ValueError where the model gives a score that is not finite."""
        read_anew = self.retokenizer is not None or self._conversations(answers.columns["prompt"])
        if answers.rollout is not None and not read_anew:
            sequences = answers.rollout.sequences
        else:
            sequences = self.tokenize(answers)
        size = self.micro_batch_size or len(sequences.prompt_ids)
        starts = range(0, len(sequences.prompt_ids), size)
        scores = Scores(self.model)
        with visiting(self.model):
            scores_B = torch.cat([scores.of(sequences.rows(slice(i, i + size))) for i in starts])
        if not scores_B.isfinite().all():
            row = int((~scores_B.isfinite()).nonzero()[0])
            finite(scores_B[row].item(), self.name, row)
        return scores_B

    def _conversations(self, prompts: Sequence[str]) -> list[int]:
        """The rows that this model reads by its own template."""
        return [n for n, prompt in enumerate(prompts) if self.reader is not None and isinstance(prompt, Conversation)]

    def tokenize(self, answers: Answers) -> Sequences:
        """The texts as token ids of this model, the end behind the finished completions."""
        tok, prompts = self.retokenizer or self.tokenizer, answers.columns["prompt"]
        chats = self._conversations(prompts)
        pairs = {}
        if self.reader is not None and chats:
            texts = [(answers.continued if prompts[n].begun else answers.texts)[n] for n in chats]
            read = self.reader.encode([prompts[n] for n in chats], texts, [answers.finished[n] for n in chats])
            pairs = dict(zip(chats, read, strict=True))
        rest = [n for n in range(len(answers)) if n not in pairs]
        limits = self.context, self.max_prompt_length
        if self.retokenizer is None and rest:
            own = answers.pairs if answers.rollout is None else id_pairs(answers.rollout)
            pairs |= {n: fit_answer(*own[n], tok, *limits) for n in rest}
        elif rest:
            bos = str(self.tokenizer.bos_token or "")  # chat templates write BOS
            texts = [prompts[n].removeprefix(bos) for n in rest]
            ends = [answers.finished[n] for n in rest]
            read = encode_texts(texts, [answers.continued[n] for n in rest], ends, tok, *limits)
            pairs |= dict(zip(rest, read, strict=True))
        rows = [pairs[n] for n in range(len(answers))]
        check_rows(self.model, tok, [ids for pair in rows for ids in pair], "max_prompt_length", role="reward")
        prompt_rows, responses = (list(side) for side in zip(*rows, strict=True))
        return Sequences(*pad_left(prompt_rows, pad_id(tok)), *pad_right(responses, pad_id(tok))).to(self.device)


class Reward:
    """Scores completions by one reward, or by the weighted sum of several.

    spec: a reward function, its name as in `load_function`, or the directory or hub name of a reward model; or a list
        of these.
    tokenizer: the policy's. weights: one for each of several rewards; default: 1.
    max_prompt_length: tokens of a prompt that a reward model sees where it reads text.
    shared: a model whose base the reward models stand on. offload: reward models wait in CPU memory. dtype: of the
        reward models' weights, as in `lm.dtypes`. timeout: seconds that a call of a function may take.
    shard: how reward models are put into shards, as in `lm.sharding`; all processes then call the reward equally often.
    """

    def __init__(
        self,
        spec: Spec | Sequence[Spec],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        *,
        weights: Sequence[float] | None = None,
        micro_batch_size: int | None = None,
        max_prompt_length: int = sys.maxsize,
        shared: PreTrainedModel | None = None,
        offload: bool = False,
        dtype: Dtype = "fp32",
        timeout: float | None = None,
        shard: Shard = "none",
    ) -> None:
        self.tokenizer, self.device = tokenizer, device
        specs = [spec] if isinstance(spec, str | Path) or callable(spec) else list(spec)
        self.weights = [1.0] * len(specs) if weights is None else list(map(float, weights))
        if not specs or len(self.weights) != len(specs):
            raise ValueError(f"reward_weights: expected one for each of {len(specs)} rewards, got {len(self.weights)}")
        model = (micro_batch_size, max_prompt_length, shared, offload, dtype, shard)
        self.parts = [
            FunctionReward(one, timeout) if is_function(one) else ModelReward(one, tokenizer, device, *model)  # pyright: ignore[reportArgumentType]
            for one in specs
        ]
        self.name = ", ".join(part.name for part in self.parts)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The reward models by role: `reward`, and `reward_2` and so on where there are several."""
        models = [part.model for part in self.parts if isinstance(part, ModelReward)]
        return {f"reward_{n}" if n > 1 else "reward": model for n, model in enumerate(models, 1)}

    def idle(self) -> None:
        """Takes part in a call of the other processes, whose reward models may be in shards, without completions."""
        for model in self.models.values():
            with whole(model):
                pass

    @property
    def readers(self) -> dict[str, PreTrainedModel]:
        """The reward models, by role, that read the policy's token ids."""
        own = [part.model for part in self.parts if isinstance(part, ModelReward) and part.retokenizer is None]
        return {role: model for role, model in self.models.items() if any(model is one for one in own)}

    @property
    def reading_spec(self) -> str | None:
        """The name of the first reward model that reads the policy's token ids."""
        names = [part.name for part in self.parts if isinstance(part, ModelReward) and part.retokenizer is None]
        return names[0] if names else None

    def check(self, columns: Mapping[str, Sequence]) -> None:
        """ValueError unless the functions find their arguments, and the reward models' templates write the prompts."""
        self._check_names(columns)
        for part in self.parts:
            if isinstance(part, ModelReward) and part.reader is not None:
                part.reader.check(columns["prompt"])

    def _check_names(self, columns: Iterable[str]) -> None:
        columns = list(columns)
        for part in self.parts:
            if isinstance(part, FunctionReward):
                part.check(columns)

    def __call__(self, rollout: Rollout, columns: Mapping[str, Sequence]) -> Tensor:
        """Scores [B] fp32. `columns["prompt"]` holds the prompts' text. Other columns go to functions unchanged."""
        return self.judge(Answers(self.tokenizer, columns, rollout=rollout)).scores

    def of_texts(
        self,
        completions: list[str],
        columns: Mapping[str, Sequence],
        finished: Sequence[bool] | None = None,
        pairs: list[tuple[list[int], list[int]]] | None = None,
    ) -> Tensor:
        """Scores [B] fp32 of texts.

        finished: which completions a reward model sees with an end; default: all. pairs: prompts and completions as
            token ids; a reward model with the policy's tokenizer sees these ids.
        """
        return self.judge(Answers(self.tokenizer, columns, texts=completions, finished=finished, pairs=pairs)).scores

    @torch.no_grad()
    def judge(self, answers: Answers) -> Scored:
        """The scores of completions, and of each part where there are several.

        Raises ValueError where no part judges a completion, and where a sum is not finite in float32.
        """
        self._check_names(answers.columns)
        arguments, found = answers.arguments(), []
        for part in self.parts:
            found.append(part(answers) if isinstance(part, ModelReward) else part(arguments, len(answers)))
        if len(found) == 1 and self.weights == [1.0] and isinstance(found[0], Tensor):
            return Scored(found[0], {})
        columns_KB = [part.tolist() if isinstance(part, Tensor) else part for part in found]
        totals = []
        for row, scores in enumerate(zip(*columns_KB, strict=True)):
            judged = [weight * score for weight, score in zip(self.weights, scores, strict=True) if score is not None]
            if not judged:
                several = "from at least one function" if len(found) > 1 else "finite scores"
                expected = f"a score {several}" if len(found) > 1 else several
                raise ValueError(f"reward {self.name}: expected {expected}, got None for row {row}")
            totals.append(finite(sum(judged), self.name, row))
        scores_B = torch.tensor(totals, dtype=torch.float32, device=self.device)
        if len(found) == 1:
            return Scored(scores_B, {})
        parts = [torch.tensor([_nan(s) for s in column], dtype=torch.float64) for column in columns_KB]
        return Scored(scores_B, dict(zip(self._short_names(), parts, strict=True)))

    def _short_names(self) -> list[str]:
        """`length` for `my.py:length`, or the whole names where two parts would share one."""
        short = [part.name.rpartition(":")[2] or part.name for part in self.parts]
        if len(set(short)) == len(short):
            return short
        return [f"{part.name}_{n}" for n, part in enumerate(self.parts, 1)]


def _own(value: Any) -> Any:
    """A copy of lists and dicts inside each other, such as messages; anything else is itself."""
    if type(value) is list:
        return [_own(item) for item in value]
    return {key: _own(item) for key, item in value.items()} if type(value) is dict else value


def _nan(score: float | None) -> float:
    return float("nan") if score is None else score


def is_function(spec: Any) -> bool:
    """Whether a reward's spec is a function or the name of a function, and not a model."""
    return callable(spec) or (":" in str(spec) and not Path(spec).is_dir())


def id_pairs(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """The token ids of every prompt and of every completion, without padding."""
    prompts = zip(rollout.prompt_ids.tolist(), rollout.prompt_mask.tolist(), strict=True)
    ids = [[token for token, real in zip(*row, strict=True) if real] for row in prompts]
    return list(zip(ids, response_ids(rollout), strict=True))


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The token ids of every completion, without padding."""
    rows = zip(rollout.response_ids.tolist(), rollout.response_mask.tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in rows]


def decode_responses(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """The completions' text without special tokens and without the end, which may be no special token."""
    rows = zip(response_ids(rollout), rollout.finished.tolist(), strict=True)
    return tokenizer.batch_decode([ids[:-1] if done else ids for ids, done in rows], skip_special_tokens=True)
