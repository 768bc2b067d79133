"""The whole pipeline from one config: SFT -> (sampled pairs ->) reward model -> every method, then a report.

Stages meet on disk only. All methods start from the same SFT model, on the same prompts, with the same reward model;
what one config section leaves out is filled in from the stages before it.
"""

import dataclasses
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
    """Run every stage of `config` and write the report; everything goes to `config.output_dir`."""
    run_stages(config)
    write_report(config)


def run_stages(config: PipelineConfig) -> None:
    """Run the stages. With `resume`, finished ones are skipped and the one cut off continues from its checkpoint."""
    for name, stage_config in make_plan(config).items():
        if not (config.resume and _finished(name, stage_config)):
            module = import_module(f"rlhf_fast.stages.{name}")
            (module.sample if name == "pairs" else module.train)(stage_config)


def make_plan(config: PipelineConfig) -> dict[str, Any]:
    """Stage name -> its full config, in order of execution. Every config error shows here, before anything runs."""
    for method in config.methods:
        if method not in METHODS:
            raise ValueError(f"methods: expected some of {sorted(METHODS)}, got {method!r}")
    for key in config.common:
        if not any(key in _fields(METHODS[method]) for method in config.methods):
            raise ValueError(f"common: unknown key {key!r}; none of the methods {config.methods} has it")
    out = Path(config.output_dir)
    start, pairs_file, eval_pairs = str(out / "sft"), str(out / "pairs.jsonl.gz"), str(out / "pairs_eval.jsonl.gz")

    def stage(cls: type, name: str, given: dict[str, Any], **defaults: Any) -> Any:
        defaults |= {"output_dir": str(out / name), "seed": config.seed, "resume": config.resume}
        values = {k: v for k, v in defaults.items() if k in _fields(cls) and v is not None} | given
        return from_dict(cls, values, f"section {name!r}")

    plan: dict[str, Any] = {"sft": stage(configs.SFTConfig, "sft", config.sft, model=config.model)}
    preferences: dict[str, str] = {}
    held_out: dict[str, str | None] = {}
    if config.pairs:
        eval_file = {"eval_output": eval_pairs} if config.pairs.get("eval_rows") else {}
        plan["pairs"] = stage(configs.PairsConfig, "pairs", config.pairs, model=start, output=pairs_file, **eval_file)
        preferences = {"train_data": plan["pairs"].output}
        held_out = {"eval_data": plan["pairs"].eval_output}
    plan["reward"] = stage(configs.RewardConfig, "reward", config.reward, model=start, **preferences, **held_out)
    for method in config.methods:
        cls = METHODS[method]
        given = {k: v for k, v in config.common.items() if k in _fields(cls)} | getattr(config, method)
        if method == "dpo":  # `common` names prompts; DPO trains on the reward model's pairs unless told otherwise
            given["train_data"] = config.dpo.get("train_data", plan["reward"].train_data)
        plan[method] = stage(cls, method, given, model=start, reward=str(out / "reward"))
    return plan


def write_report(config: PipelineConfig) -> None:
    """report.html, report.json and plots/*.png from what the finished stages left on disk."""
    raise NotImplementedError


def _fields(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _finished(name: str, config: Any) -> bool:
    if name == "pairs":
        return Path(config.output).is_file()
    return (Path(config.output_dir) / "run.json").is_file()
