"""The whole pipeline from one config: SFT -> (sampled pairs ->) reward model -> every method, then a report.

Stages meet on disk only. All methods start from the same SFT model, on the same prompts, with the same reward model;
what one config section leaves out is filled in from the stages before it.
"""

import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_fast import config as configs
from rlhf_fast.config import PipelineConfig, from_dict

METHODS = {
    "ppo": configs.PPOConfig,
    "remax": configs.ReMaxConfig,
    "reinforce": configs.ReinforceConfig,
    "rloo": configs.RLOOConfig,
    "dpo": configs.DPOConfig,
}


def run(config: PipelineConfig) -> None:
    """Run every stage of `config`; results and report.html go to `config.output_dir`.

    With `resume`, stages that finished are skipped and the one that was cut off continues from its checkpoint.
    """
    plan = make_plan(config)
    for name, stage_config in plan.items():
        if not (config.resume and _finished(name, stage_config)):
            _function(name)(stage_config)
    write_pipeline_report(config)


def make_plan(config: PipelineConfig) -> dict[str, Any]:
    """Stage name -> its full config, in order of execution. Every config error shows here, before anything runs."""
    for method in config.methods:
        if method not in METHODS:
            raise ValueError(f"methods: expected some of {sorted(METHODS)}, got {method!r}")
    for key in config.common:
        if not any(key in _fields(METHODS[method]) for method in config.methods):
            raise ValueError(f"common: unknown key {key!r}; none of the methods {config.methods} has it")
    out = Path(config.output_dir)
    start, pairs_file = str(out / "sft"), str(out / "pairs.jsonl.gz")

    def stage(cls: type, name: str, given: dict[str, Any], **defaults: Any) -> Any:
        defaults |= {"output_dir": str(out / name), "seed": config.seed, "resume": config.resume}
        values = {k: v for k, v in defaults.items() if k in _fields(cls) and v is not None} | given
        return from_dict(cls, values, f"section {name!r}")

    plan: dict[str, Any] = {"sft": stage(configs.SFTConfig, "sft", config.sft, model=config.model)}
    if config.pairs:
        plan["pairs"] = stage(configs.PairsConfig, "pairs", config.pairs, model=start, output=pairs_file)
    preferences = pairs_file if config.pairs else None
    plan["reward"] = stage(configs.RewardConfig, "reward", config.reward, model=start, train_data=preferences)
    preferences = preferences or plan["reward"].train_data
    for method in config.methods:
        cls = METHODS[method]
        given = {k: v for k, v in config.common.items() if k in _fields(cls)} | getattr(config, method)
        if method == "dpo":
            given.pop("train_data", None) if "train_data" not in config.dpo else None
            plan[method] = stage(cls, method, given, model=start, train_data=preferences)
        else:
            plan[method] = stage(cls, method, given, model=start, reward=str(out / "reward"))
    return plan


def write_pipeline_report(config: PipelineConfig) -> None:
    """report.html, report.json and plots/*.png from what the finished stages left on disk."""
    from rlhf_fast import report

    report.from_directories(Path(config.output_dir), config.methods, title=config.title)


def _fields(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _function(name: str) -> Callable[[Any], None]:
    return import_module(f"rlhf_fast.stages.{name}").train


def _finished(name: str, config: Any) -> bool:
    if name == "pairs":
        return Path(config.output).is_file()
    return (Path(config.output_dir) / "run.json").is_file()
