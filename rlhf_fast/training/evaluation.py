"""Held-out evaluation: sample every prompt once, score it, and measure how far the policy has moved.

The KL is KL(policy || reference) summed over the completion's tokens. At each visited state it is the KL of the two
next-token distributions, exact over the vocabulary. It has the same expectation as the usual sum of log-ratios, but
less variance, and it is never negative.

Where every row has a `completion` column, the win rate against these completions is measured too. It is the share of
prompts whose sample gets a higher reward than the row's own completion; a tie counts half.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.config import OfflineConfig, OnlineConfig
from rlhf_fast.data.encoding import Encoded, PromptExample, encode_answers, encode_prompts, is_finished
from rlhf_fast.data.rows import Row, load_rows
from rlhf_fast.lm.limits import check_rows
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.offload import visiting
from rlhf_fast.lm.sharding import whole
from rlhf_fast.ranks import current
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.rollout.sampler import LocalSampler, Sampler
from rlhf_fast.rollout.samplers import Samplers
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.learner import autocast
from rlhf_fast.training.metrics import mean_and_se
from rlhf_fast.training.mismatch import rescored
from rlhf_fast.training.progress import passes
from rlhf_fast.training.reading import Conversation
from rlhf_fast.training.rewards import Reward, decode_responses

EVAL_ROWS = 64  # prompts that an evaluation samples at once
# The seed is fixed, so that every evaluation of a run and every method draws with the same random numbers.
_EVAL_SEED = 20240


class Evaluation(NamedTuple):
    """The result of one evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # prompt, its messages if it is a conversation, completion and reward of every row


class Evaluator:
    """Evaluates one policy against a fixed reference on fixed prompts."""

    def __init__(
        self,
        prompts: list[PromptExample],
        reward: Reward,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = EVAL_ROWS,
        micro_batch_size: int | None = None,
        fused: bool = True,
        bf16: bool = False,
        samplers: Samplers | None = None,
    ) -> None:
        """batch_size: prompts sampled at once. micro_batch_size: rows of a KL pass; default: batch_size. fused: as in
        `Objectives`. samplers: who samples; default: this process. The other arguments are those of `LocalSampler`."""
        self.prompts, self.reward, self.reference, self.tokenizer = prompts, reward, reference, tokenizer
        self.sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size or batch_size
        self.objectives = partial(Objectives, temperature=temperature, fused=fused)
        self.bf16, self.samplers = bf16, samplers
        self.completion_rewards = completion_rewards(prompts, reward)
        with visiting(reference):
            self.reference_objectives = self.objectives(reference)

    @torch.no_grad()
    def __call__(self, policy: PreTrainedModel) -> Evaluation:
        """`eval/{reward,kl,length,entropy}` with standard errors, and the samples.

        KL is in nats per completion, length in tokens, entropy in nats per token. Where the rows have completions,
        `eval/win_rate` is there too.
        """
        sampler = self._sampler(policy)
        with whole(policy):
            return self._evaluate(policy, sampler)

    def _evaluate(self, policy: PreTrainedModel, sampler: Sampler) -> Evaluation:
        remote = self.samplers is not None and self.samplers.remote
        objectives = self.objectives(policy)
        parts: list[list[tuple]] = []  # of the rows of every pass: reward, KL, length, entropy, completion
        for rows in passes("evaluation", micro_batches(len(self.prompts), self.batch_size)):
            prompts = [*current().share(self.prompts[rows])]
            if not prompts:
                with whole(self.reference):  # models in shards need all processes
                    parts.append([])
                self.reward.idle()
                continue
            with autocast(policy.device, self.bf16):
                earlier = [p.prompt_ids for p in current().earlier(self.prompts[rows])]
                ids = [p.prompt_ids for p in prompts]
                rollout = sampler(ids, seed=_EVAL_SEED, with_kept=False, earlier=earlier).sampled
                if remote:
                    rollout = rescored(rollout, objectives, self.micro_batch_size)
                with visiting(self.reference):
                    kl = self._kl(objectives, rollout)
                reward = self.reward(rollout, prompt_columns(prompts))
            length = rollout.response_mask.sum(dim=1).float()
            numbers = (reward, kl, length, rollout.entropy.sum(dim=1) / length)
            completions = decode_responses(self.tokenizer, rollout)
            parts.append([*zip(*(x.cpu() for x in numbers), completions, strict=True)])
        *values, completions = zip(*current().join(parts), strict=True)
        columns = {name: torch.stack(x) for name, x in zip(("reward", "kl", "length", "entropy"), values, strict=True)}
        if self.completion_rewards is not None:
            columns["win_rate"] = wins(columns["reward"], self.completion_rewards)
        metrics = {}
        for name, values in columns.items():
            metrics[f"eval/{name}"], metrics[f"eval/{name}_se"] = mean_and_se(values)
        rows = zip(self.prompts, completions, columns["reward"].tolist(), strict=True)
        return Evaluation(metrics, [{**_asked(p.prompt), "completion": c, "reward": r} for p, c, r in rows])

    def _sampler(self, policy: PreTrainedModel) -> Sampler:
        """The sampler of the policy, which has its weights of now."""
        if self.samplers is None:
            return LocalSampler(policy, self.tokenizer, **self.sampling)
        sampler = self.samplers(policy, [p.prompt_ids for p in self.prompts], **self.sampling)
        self.samplers.changed()
        sampler.refresh()
        return sampler

    def _kl(self, objectives: Objectives, rollout: Rollout) -> Tensor:
        """sum_t KL(policy(.|s_t) || reference(.|s_t)) over each completion [B], in micro-batches."""
        parts = map(rollout.rows, micro_batches(len(rollout.finished), self.micro_batch_size))
        return torch.cat([objectives.kl(self.reference_objectives, part.sequences).sum(dim=1) for part in parts])


def make_evaluator(
    config: OnlineConfig | OfflineConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    reference: PreTrainedModel,
    reward: Reward | None,
    samplers: Samplers | None = None,
) -> Evaluator | None:
    """The evaluator that a stage's config asks for, or None.

    reward: scores the samples where the config names no eval_reward. samplers: those of the stage, if it samples too.
    Raises ValueError where eval_steps has no eval_data, and where there is no reward at all.
    """
    if config.eval_data is None:
        if config.eval_steps:
            raise ValueError("eval_data: expected held-out prompts because eval_steps > 0, got none")
        return None
    if config.eval_reward:
        reward = Reward(
            config.eval_reward,
            tokenizer,
            device,
            max_prompt_length=config.max_prompt_length,
            offload=getattr(config, "offload", False),
            dtype=config.frozen_weights,
            timeout=config.reward_timeout,
            shard=config.shard,
        )
    if reward is None:
        raise ValueError("eval_reward: expected a reward to score the samples of eval_data with, got none")
    rows = load_rows(config.eval_data, "prompt", config.columns)
    prompts = compared_prompts(rows, tokenizer, config.max_prompt_length, config.chat_template_kwargs)
    reward.check(prompt_columns(prompts))
    models = {"reference": reference}
    models |= {f"eval_{role}" if config.eval_reward else role: model for role, model in reward.readers.items()}
    check_prompts(prompts, config.max_response_length, tokenizer, **models)
    return Evaluator(
        prompts,
        reward,
        reference,
        tokenizer,
        max_new_tokens=config.max_response_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        micro_batch_size=config.micro_batch_size,
        fused=config.fused_head,
        bf16=config.bf16,
        samplers=samplers or Samplers(config, tokenizer, config.output_dir),
    )


def check_prompts(
    prompts: list[PromptExample],
    max_response_length: int,
    tokenizer: PreTrainedTokenizerBase,
    **models: PreTrainedModel | None,
) -> None:
    """ValueError unless every one of `models` (role -> model) can read the prompts with a completion behind each.

    max_response_length: tokens of a completion at most.
    """
    for role, model in models.items():
        if model is not None:
            ids = [p.prompt_ids for p in prompts]
            lengths = "max_prompt_length, max_response_length"
            check_rows(model, tokenizer, ids, lengths, role=role, response=max_response_length)


def completion_rewards(prompts: list[PromptExample], reward: Reward) -> Tensor | None:
    """Rewards [B] of the rows' own completions, on the CPU; None where a row has no completion.

    Raises ValueError where a completion is neither text nor a list with one assistant message.
    """
    completions = [_text_of(p.columns["completion"]) for p in prompts if p.columns.get("completion") is not None]
    if len(completions) < len(prompts):
        return None
    pairs = [p.own for p in prompts if p.own is not None]
    known, found = len(pairs) == len(prompts), []
    for rows in passes("completions", micro_batches(len(prompts), EVAL_ROWS)):
        own = pairs[rows] if known else None
        found.append(reward.of_texts(completions[rows], prompt_columns(prompts[rows]), pairs=own).cpu())
    return torch.cat(found)


def _text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list with one assistant message."""
    message = completion[0] if isinstance(completion, list) and len(completion) == 1 else {}
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if isinstance(completion, str) or (role == "assistant" and isinstance(content, str)):
        return completion if isinstance(completion, str) else str(content)
    raise ValueError(
        f"completion: expected text or a list with one assistant message to compare with, got {completion!r:.80}"
    )


def wins(rewards: Tensor, others: Tensor) -> Tensor:
    """[B] float64: 1 where a reward [B] is above the other reward [B], 1/2 where they are equal, else 0."""
    return torch.heaviside((rewards - others).double(), torch.tensor(0.5, dtype=torch.float64))


def scored_prompts(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Encoded:
    """`encode_prompts` of rows whose completions a reward will score.

    A prompt that is a conversation stands in the column `messages` too, because `prompt` is its text. A row's own
    column of this name stays. Reward models find the messages with the text, which is a `Conversation`.
    """
    data = encode_prompts(rows, tokenizer, max_prompt_length, chat_template_kwargs or {})
    examples = []
    for row, example in zip(rows, data.examples, strict=True):
        if not isinstance(row["prompt"], str):
            prompt = Conversation(example.prompt, row["prompt"], row)
            example = example._replace(prompt=prompt, columns={"messages": row["prompt"], **example.columns})
        examples.append(example)
    return data._replace(examples=examples)


def compared_prompts(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[PromptExample]:
    """`scored_prompts` whose samples are compared with the rows' own completions, where every row has one.

    A completion is encoded as SFT would encode the row. Raises ValueError as `completion_rewards` does.
    """
    prompts = scored_prompts(rows, tokenizer, max_prompt_length, chat_template_kwargs).examples
    if any(row.get("completion") is None for row in rows):
        return prompts
    texts, finished = (
        [[_text_of(row["completion"])] for row in rows],
        [[is_finished(row, "completion")] for row in rows],
    )
    options = tokenizer, None, max_prompt_length, chat_template_kwargs
    encoded = encode_answers(rows, texts, *options, finished=finished)
    return [p._replace(own=(ids, own)) for p, (ids, (own,), *_) in zip(prompts, encoded, strict=True)]


def _asked(prompt: str) -> dict[str, Any]:
    """What a sample says of its prompt: the text, and a conversation's messages, which people read more easily."""
    return {"prompt": prompt} | ({"messages": prompt.messages} if isinstance(prompt, Conversation) else {})


def prompt_columns(prompts: list[PromptExample]) -> dict[str, list]:
    """The rows' columns as lists; `prompt` is the prompts' text. A row without a column has None there."""
    names = {name: None for p in prompts for name in p.columns}
    return {**{name: [p.columns.get(name) for p in prompts] for name in names}, "prompt": [p.prompt for p in prompts]}
