"""The true reward of policies' completions on held-out prompts, at several temperatures, beside the rows' completions.

Policies are the studies' cells at their main strength, the SFT model they started from, and Best-of-N of that model.
Each (policy, prompts, temperature) is a JSON file beside the policy and is not made again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from rlhf_fast.lab.study.config import TrainedStudyConfig
from rlhf_fast.lab.study.methods import RUN_OPTIONS, Cell
from rlhf_fast.lab.study.runs import Job, run_jobs
from rlhf_fast.lab.study.sampling import sample_scores
from rlhf_fast.lm.loading import default_device, load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusting
from rlhf_fast.training.evaluation import compared_prompts, completion_rewards
from rlhf_fast.training.fingerprint import fingerprints
from rlhf_fast.training.rewards import Reward

BEST_OF = 16
SFT, ROWS = "SFT", "rows' completions"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """One policy on one set of prompts at one temperature."""

    model: str = required("Policy.")
    eval_data: str = required("Prompts, with a completion column to compare with.")
    eval_reward: str = required("Reward that judges.")
    columns: dict[str, str] = arg({}, COLUMNS_HELP)
    chat_template: str | None = arg(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] = arg({}, CHAT_TEMPLATE_KWARGS_HELP)
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    reward_timeout: float | None = arg(None, REWARD_TIMEOUT_HELP)
    temperature: float = arg(1.0, "Sampling temperature; 0 takes the likeliest tokens.")
    best_of: int = arg(1, "Completions per prompt, of which the reward model's best is judged.")
    reward: str | None = arg(None, "Reward model that chooses, where best_of is above 1.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens.")
    max_response_length: int = arg(64, "Longest completion in tokens.")
    seed: int = arg(0, "Seed of sampling.")


class Judged(NamedTuple):
    """Of the same prompts, by (method, seed): rewards [P], float64. The rows' completions are the method `ROWS`."""

    rewards: dict[tuple[str, int], Tensor]

    def methods(self) -> list[str]:
        """Names of the methods, in the order of the rewards."""
        return list(dict.fromkeys(method for method, _ in self.rewards))

    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return sorted({seed for _, seed in self.rewards})


def judge_all(
    config: TrainedStudyConfig,
    cells: Sequence[Cell],
    data: str,
    temperatures: Sequence[float],
    columns: dict[str, str] | None = None,
) -> dict[float, Judged]:
    """Every policy of `cells`, the SFT models and the rows' own completions on the prompts of `data`.

    columns: our names -> the names in `data`; default: those of the cells.
    """
    files = {
        (method, seed, temperature): (directory / f"judged-{Path(data).name.split('.')[0]}-{temperature:g}.json", one)
        for method, seed, directory, base in _policies(cells)
        for temperature in temperatures
        for own in [base.columns if columns is None else columns]
        for one in [dataclasses.replace(base, eval_data=data, temperature=float(temperature), columns=own)]
    }
    missing: dict[tuple[str, int], list[tuple[Path, JudgeConfig]]] = {}
    for (method, seed, _), file in files.items():
        if not _is_there(*file):
            missing.setdefault((method, seed), []).append(file)
    jobs = [
        Job(f"{method} on {data}, seed {seed}", parts[0][0].with_suffix(".log"), _judge, parts)
        for (method, seed), parts in missing.items()
    ]
    run_jobs(jobs, config.workers)
    results = {}
    for temperature in temperatures:
        rewards = {}
        for (method, seed, at), (path, _) in files.items():
            if at == temperature:
                record = read_json(path)
                rewards[method, seed] = torch.tensor(record["rewards"], dtype=torch.float64)
                rewards[ROWS, seed] = torch.tensor(record["completion_rewards"], dtype=torch.float64)
        results[temperature] = Judged(rewards)
    return results


def _policies(cells: Sequence[Cell]) -> list[tuple[str, int, Path, JudgeConfig]]:
    """(method, seed, its directory, how it samples) of every policy; data and temperature are filled in later."""
    policies = []
    for cell in cells:
        names = ("max_prompt_length", "max_response_length", "seed", "eval_data", *RUN_OPTIONS)
        shared: dict[str, Any] = {name: getattr(cell.config, name) for name in names}
        shared["eval_reward"] = cell.config.eval_reward
        if not any(method == SFT and seed == cell.seed for method, seed, *_ in policies):
            start = cell.config.model
            policies.append((SFT, cell.seed, Path(start), JudgeConfig(model=start, **shared)))
        if cell.method == "Best-of-N":
            chosen = JudgeConfig(model=cell.config.model, best_of=BEST_OF, reward=cell.config.reward, **shared)
            policies.append((f"Best-of-{BEST_OF}", cell.seed, cell.directory, chosen))
        else:
            policies.append((cell.method, cell.seed, cell.directory, JudgeConfig(model=str(cell.directory), **shared)))
    return policies


def _is_there(path: Path, config: JudgeConfig) -> bool:
    wanted = {"config": dataclasses.asdict(config), "made_of": fingerprints(config)}
    return path.is_file() and wanted.items() <= read_json(path).items()


def _judge(parts: Sequence[tuple[Path, JudgeConfig]]) -> None:
    """Of one policy and one set of prompts, at several temperatures."""
    with trusting(parts[0][1].trust_remote_code):
        _judge_all(parts)


def _judge_all(parts: Sequence[tuple[Path, JudgeConfig]]) -> None:
    first = parts[0][1]
    device, tokenizer = default_device(), with_template(load_tokenizer(first.model), first.chat_template)
    model = load_policy(first.model, trainable=False).to(device)  # pyright: ignore[reportArgumentType]
    rows = load_rows(first.eval_data, "prompt", first.columns)
    prompts = compared_prompts(rows, tokenizer, first.max_prompt_length, first.chat_template_kwargs)
    specs = [first.eval_reward] if first.reward is None else [first.eval_reward, first.reward]
    options = {"max_prompt_length": first.max_prompt_length, "timeout": first.reward_timeout}
    judge, *_ = rewards = [Reward(one, tokenizer, device, **options) for one in specs]
    completions = completion_rewards(prompts, judge)
    if completions is None:
        raise ValueError(f"{first.eval_data}: expected a completion column in every row, to compare with")
    for path, config in parts:
        judged, *scores = sample_scores(
            model,
            tokenizer,
            prompts,
            rewards,
            max_new_tokens=config.max_response_length,
            samples=config.best_of if config.temperature else 1,  # all completions are equal at temperature 0
            temperature=config.temperature,
            seed=config.seed,
        )
        best = scores[0].argmax(dim=1, keepdim=True) if scores else torch.zeros(len(prompts), 1, dtype=torch.int64)
        record: dict[str, Any] = {"config": dataclasses.asdict(config), "made_of": fingerprints(config)}
        record |= {"rewards": judged.gather(1, best)[:, 0].tolist()}
        write_json(path, record | {"completion_rewards": completions.tolist()})
