"""Preference pairs from a model's own samples, labelled by Bradley-Terry on a reward.

P(a preferred over b) = sigmoid(scale * (reward(a) - reward(b))). Each label is drawn, so labels are noisy, as people's
labels are. A sample that reached the length limit has no end. Its row says so by `chosen_finished` or
`rejected_finished`: false, and training puts no EOS behind it.
"""

from contextlib import ExitStack

import torch

from rlhf_fast.config import PairsConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import continuations
from rlhf_fast.data.rows import load_rows, write_rows
from rlhf_fast.lm.loading import default_device, load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ranks import current
from rlhf_fast.rollout.samplers import Samplers
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.evaluation import check_prompts, prompt_columns, scored_prompts
from rlhf_fast.training.lock import held_file
from rlhf_fast.training.progress import passes
from rlhf_fast.training.rewards import Reward, id_pairs


@trusts_as_asked
def sample(config: PairsConfig) -> None:
    """Writes a {prompt, chosen, rejected} row per prompt to `config.output`.

    Rows of the last config.eval_rows prompts go to config.eval_output instead. A prompt with equal completions or with
    an empty completion is left out. A row says of a completion without an end that it is not finished.
    """
    with ExitStack() as locks:
        for name in ("output", "eval_output"):
            if getattr(config, name) is not None:
                locks.enter_context(held_file(getattr(config, name), name))
        _sample(config)


def _sample(config: PairsConfig) -> None:
    device, ranks = default_device(), current()
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    policy = load_policy(config.model, dtype=config.dtype, trainable=False).to(device)  # pyright: ignore[reportArgumentType]
    reward = Reward(
        config.reward,
        tokenizer,
        device,
        weights=config.reward_weights,
        max_prompt_length=config.max_prompt_length,
        dtype=config.dtype,
        timeout=config.reward_timeout,
    )
    rows = load_rows(config.prompts, "prompt", config.columns)[: config.max_rows]
    prompts = scored_prompts(rows, tokenizer, config.max_prompt_length, config.chat_template_kwargs).examples
    reward.check(prompt_columns(prompts))
    if len(prompts) <= config.eval_rows:
        raise ValueError(f"eval_rows: expected fewer than the {len(prompts)} prompts, got {config.eval_rows}")
    check_prompts(prompts, config.max_response_length, tokenizer, model=policy, **reward.readers)
    sampler = Samplers(config, tokenizer, None)(
        policy,
        [prompt.prompt_ids for prompt in prompts],
        max_new_tokens=config.max_response_length,
        temperature=config.temperature,
    )
    sampler.refresh()
    labels = torch.Generator().manual_seed(config.seed)
    pairs = []
    for rows in passes("pairs", micro_batches(len(prompts), config.batch_size)):
        batch, drawn = [*ranks.share(prompts[rows])], torch.rand(rows.stop - rows.start, generator=labels)
        if not batch:
            pairs.append([])
            continue
        earlier = [p.prompt_ids for p in ranks.earlier(prompts[rows])]
        rollout = sampler([p.prompt_ids for p in batch], seed=config.seed, samples=2, earlier=earlier).sampled
        scores = reward(rollout, prompt_columns([p for p in batch for _ in range(2)])).view(-1, 2).cpu()
        first_wins = torch.sigmoid(config.scale * (scores[:, 0] - scores[:, 1]))
        best = (drawn[ranks.part(len(drawn))] >= first_wins).long().tolist()
        finished = rollout.finished.tolist()
        asked = [p.prompt for p in batch for _ in range(2)]
        texts = continuations(asked, id_pairs(rollout), finished, tokenizer)
        made = []
        for i, prompt in enumerate(batch):
            answers = texts[2 * i : 2 * i + 2]
            useful = answers[0].strip() and answers[1].strip() and answers[0] != answers[1]
            row = {"prompt": prompt.prompt}
            for name, index in (("chosen", best[i]), ("rejected", 1 - best[i])):
                row[name] = answers[index]
                if not finished[2 * i + index]:
                    row[f"{name}_finished"] = False
            made.append(row if useful else None)
        pairs.append(made)
    pairs = ranks.join(pairs)
    if not ranks.first:
        ranks.wait()
        return
    training = len(pairs) - config.eval_rows
    if config.eval_output:  # first, because `output` says that both are there
        write_rows(config.eval_output, filter(None, pairs[training:]))
    write_rows(config.output, filter(None, pairs[:training]))
    ranks.wait()  # a stage that reads the pairs starts when the files are whole
