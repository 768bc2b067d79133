"""Best-of-N: of N completions of the SFT model the one that the reward model scores highest (arXiv 2305.18290, sec. 6).

Nothing is trained: M completions per prompt give every N up to M. The expected true reward is averaged over all subsets
of N of the M completions, so that the order of the draws does not matter. The KL to the SFT model is at most
log N - (N - 1) / N, and equal to it where no two completions tie.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config.fields import arg, required
from rlhf_fast.config.stages import (
    CHAT_TEMPLATE_HELP,
    CHAT_TEMPLATE_KWARGS_HELP,
    COLUMNS_HELP,
    REWARD_TIMEOUT_HELP,
    TRUST_REMOTE_CODE_HELP,
)
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.encoding import load_rows
from rlhf_fast.data.files import write_json
from rlhf_fast.lab.study.sampling import sample_scores
from rlhf_fast.lm.loading import default_device, load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.training.evaluation import scored_prompts
from rlhf_fast.training.fingerprint import fingerprints
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.rewards import Reward


@dataclass(frozen=True, kw_only=True)
class BestOfConfig:
    """Completions of a model on held-out prompts, scored by the reward model and by the true reward."""

    model: str = required("Model to sample from.")
    output_dir: str = required("Directory for run.json.")
    reward: str = required("Reward that chooses.")
    eval_data: str = required("Held-out prompts.")
    eval_reward: str = required("Reward that judges.")
    columns: dict[str, str] = arg({}, COLUMNS_HELP)
    chat_template: str | None = arg(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] = arg({}, CHAT_TEMPLATE_KWARGS_HELP)
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    reward_timeout: float | None = arg(None, REWARD_TIMEOUT_HELP)
    samples: int = arg(64, "Completions per prompt.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens.")
    max_response_length: int = arg(64, "Longest completion in tokens.")
    seed: int = arg(0, "Seed of sampling.")


@writes_alone("output_dir")
@trusts_as_asked
def sample(config: BestOfConfig) -> None:
    """Writes run.json: config, and `scores` and `rewards` [prompts][samples]."""
    device, tokenizer = default_device(), with_template(load_tokenizer(config.model), config.chat_template)
    model = load_policy(config.model, trainable=False).to(device)  # pyright: ignore[reportArgumentType]
    rows, length = load_rows(config.eval_data, "prompt", config.columns), config.max_prompt_length
    prompts = scored_prompts(rows, tokenizer, length, config.chat_template_kwargs).examples
    specs = (config.reward, config.eval_reward)
    options = {"max_prompt_length": length, "timeout": config.reward_timeout}
    rewards = [Reward(spec, tokenizer, device, **options) for spec in specs]
    scores, judged = sample_scores(
        model,
        tokenizer,
        prompts,
        rewards,
        max_new_tokens=config.max_response_length,
        samples=config.samples,
        seed=config.seed,
    )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    record = {
        "config": asdict(config),
        "made_of": fingerprints(config),
        "scores": scores.tolist(),
        "rewards": judged.tolist(),
    }
    write_json(Path(config.output_dir) / "run.json", record)


def load(directory: Path) -> tuple[Tensor, Tensor]:
    """(scores, rewards) [prompts, samples], float64, of a run."""
    record = read_json(directory / "run.json")
    scores, rewards = (torch.tensor(record[name], dtype=torch.float64) for name in ("scores", "rewards"))
    return scores, rewards


def expected_reward(scores: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Expected reward [P] of the best of n by score, over all subsets of n of the M columns of [P, M].

    The completion of rank i (from 1, ascending) is the best of C(i - 1, n - 1) of the C(M, n) subsets.
    """
    M = scores.shape[1]
    weights = [math.comb(i, n - 1) / math.comb(M, n) for i in range(M)]
    ranked = rewards.gather(1, scores.argsort(dim=1, stable=True))
    return ranked @ torch.tensor(weights, dtype=ranked.dtype)


def largest_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats."""
    return math.log(n) - (n - 1) / n
