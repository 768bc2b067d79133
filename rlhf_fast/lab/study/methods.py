"""The methods of the studies of trained models, each at several strengths, as configs of stages.

A method's strength holds it near the SFT model: the KL target of online methods (arXiv 1909.08593, sec. 2.2),
beta of DPO, alpha of Unlikelihood. Everything else is what the pipeline's config says, the same for all strengths.
`MAIN` names the strength at which methods are set side by side where each has one policy only.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.config import OfflineConfig, OnlineConfig, PipelineConfig
from rlhf_fast.data.encoding import load_rows
from rlhf_fast.lab.study.best_of import BestOfConfig
from rlhf_fast.lab.study.unlikelihood import UnlikelihoodConfig
from rlhf_fast.methods import METHODS
from rlhf_fast.report import pipeline

KL_TARGETS = (1.0, 3.0, 9.0)  # nats per completion
BETAS = (0.1, 0.3, 1.0)
ALPHAS = (0.05, 0.3, 1.0)
ROW_OPTIONS = ("columns", "chat_template", "chat_template_kwargs")  # how a run reads its rows
RUN_OPTIONS = (*ROW_OPTIONS, "reward_timeout", "trust_remote_code")  # these, and what a run calls
POINTS = 6  # evaluations of a run after its start
STUDIED = ("ppo", "remax", "reinforce", "rloo", "dpo")  # of the pipeline's methods
ONLINE = {
    name: method
    for method in STUDIED
    if METHODS[method].online
    for name in (METHODS[method].title, *["PPO-GT"] * (method == "ppo"))  # PPO-GT: PPO on the true reward
}
Strengths = Mapping[str, tuple[float | None, ...]]  # by method
STRENGTHS: Strengths = {
    **dict.fromkeys(ONLINE, KL_TARGETS),
    "DPO": BETAS,
    "Unlikelihood": ALPHAS,
    "Preferred-FT": (None,),
    "Best-of-N": (None,),
}
MAIN: Strengths = {
    **dict.fromkeys(ONLINE, (3.0,)),
    "DPO": (0.3,),
    "Unlikelihood": (0.05,),
    "Preferred-FT": (None,),
    "Best-of-N": (None,),
}
_NAMES = {**dict.fromkeys(ONLINE, "KL target"), "DPO": "beta", "Unlikelihood": "alpha"}


class Cell(NamedTuple):
    """One method at one strength from one seed's start; a name that ends in "+" was trained on other prompts too."""

    method: str
    strength: float | None
    seed: int
    target: str  # package.module:function of the config
    config: Any

    @property
    def directory(self) -> Path:
        """Where the run leaves its files."""
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        """The run for people, such as "PPO, KL target 3, seed 0"."""
        strength = "" if self.strength is None else f", {_NAMES[self.method.removesuffix('+')]} {self.strength:g}"
        return f"{self.method}{strength}, seed {self.seed}"


def cells_of(start: PipelineConfig, wanted: Strengths) -> list[Cell]:
    """What trains every method at its strengths, in directories within the start's, whose stages have run."""
    stages = pipeline.make_plan(dataclasses.replace(start, methods=list(STUDIED)))
    pairs = len(load_rows(stages["dpo"].train_data, "preference", stages["dpo"].columns))
    return [_cell(start, stages, pairs, method, one) for method, strengths in wanted.items() for one in strengths]


def given_true_reward(cells: Iterable[Cell]) -> list[str]:
    """Methods but PPO-GT that learn from, or choose by, the very reward that judges them.

    If a pipeline names one reward for both, its PPO is a PPO-GT, and a part of its lead over DPO comes from that.
    """
    configs = [(cell.method, cell.config) for cell in cells if cell.method in ONLINE or cell.method == "Best-of-N"]
    same = [method for method, config in configs if config.reward == config.eval_reward]
    return [method for method in dict.fromkeys(same) if method != "PPO-GT"]


def _cell(start: PipelineConfig, stages: Mapping[str, Any], pairs: int, method: str, strength: float | None) -> Cell:
    base = stages[ONLINE.get(method, "dpo")]
    suffix = "" if strength is None else f"-{strength:g}"
    values: dict[str, Any] = {"output_dir": str(Path(start.output_dir) / f"{method.lower()}{suffix}")}
    if method == "Best-of-N":
        target, config = "lab.study.best_of:sample", _best_of(stages["ppo"], **values)
    elif method in ONLINE:
        values |= {"kl_target": strength, "kl_horizon": 2.0 * base.batch_size}
        values["eval_steps"] = math.ceil(base.steps / POINTS)
        if method == "PPO-GT":  # its rewards have the true reward's scale, not the learned one's
            scale = start.pairs.get("scale", 1.0)
            values |= {"reward": _true_reward(base), "kl_coef": base.kl_coef / scale}
        target, config = METHODS[ONLINE[method]].train, dataclasses.replace(base, **values)
    else:
        values["eval_steps"] = math.ceil(pairs // base.batch_size * base.epochs / POINTS)
        if method == "DPO":
            target, config = METHODS["dpo"].train, dataclasses.replace(base, beta=strength, **values)
        else:
            own = {field.name for field in dataclasses.fields(OfflineConfig)}
            values = {name: getattr(base, name) for name in own} | values | {"alpha": strength or 0.0}
            target, config = "lab.study.unlikelihood:train", UnlikelihoodConfig(**values)
    return Cell(method, strength, start.seed, target, config)


def _best_of(base: OnlineConfig, output_dir: str) -> BestOfConfig:
    shared = ("model", "reward", "eval_data", "max_prompt_length", "max_response_length", "seed", *RUN_OPTIONS)
    values = {name: getattr(base, name) for name in shared}
    return BestOfConfig(**values, eval_reward=_true_reward(base), output_dir=output_dir)


def _true_reward(config: OnlineConfig) -> str:
    if config.eval_reward is None:
        raise ValueError("pipeline: expected eval_reward in its section common, the true reward; got none")
    return config.eval_reward
