"""The whole pipeline from one config: SFT -> (sampled pairs ->) reward model -> every method, then a report.

Stages meet on disk only. All methods start from the same SFT model, on the same prompts, with the same reward model.
Keys that a config section leaves out are filled in from the stages before it. `sft: null` leaves out SFT: the methods
start from `model`. `reward: null` leaves out the reward model: the methods name a reward of their own.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlhf_fast import config as configs
from rlhf_fast.config import PipelineConfig
from rlhf_fast.config.arguments import from_dict
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.readers import data_files
from rlhf_fast.lm.adapters import base_path
from rlhf_fast.lm.paths import existing
from rlhf_fast.lm.trust import trusting
from rlhf_fast.methods import METHODS, load, section
from rlhf_fast.ranks import current
from rlhf_fast.report.reuse import make_pairs, make_stage
from rlhf_fast.training import checkpoint
from rlhf_fast.training.apart import check_apart
from rlhf_fast.training.lock import held, writes_alone
from rlhf_fast.training.metrics import print_table
from rlhf_fast.training.reward_functions import FunctionReward
from rlhf_fast.training.rewards import is_function

_DATA = ("train_data", "eval_data", "eval_pairs", "eval_rows", "prompts")  # the fields of configs that name data
_MODELS = ("model", "reference", "value_model", "reward", "eval_reward")
BEFORE_METHODS = ("sft", "pairs", "reward")  # the stages that make what every method starts from


@writes_alone("output_dir")
def run(config: PipelineConfig) -> None:
    """Run every stage of `config` and write the report; everything goes to `config.output_dir`."""
    run_stages(config)
    if current().first:
        write_report(config)
    current().wait()


def run_stages(config: PipelineConfig, names: Collection[str] | None = None) -> None:
    """Run the stages, or only the stages of these names.

    With `resume` finished stages are skipped, and an interrupted stage continues from its checkpoint. A stage whose
    settings, data, models or rewards are not those that it was made with is made anew.
    """
    plan, note = make_plan(config), Path(config.output_dir, "pairs.json")
    look_up(plan, Path(config.output_dir))
    for name, stage_config in plan.items():
        if name != "pairs":
            check_apart(stage_config)
            if not config.resume:
                checkpoint.check_no_unfinished(stage_config.output_dir)
    with held(config.output_dir):
        for name, stage_config in plan.items():
            if names is None or name in names:
                if name == "pairs":
                    make_pairs(stage_config, note, resume=config.resume)
                else:
                    make_stage(name, stage_config)


def make_plan(config: PipelineConfig) -> dict[str, Any]:
    """Stage name -> its full config, in order of execution. Every config error shows here, before anything runs."""
    for method in config.methods:
        if method not in METHODS:
            raise ValueError(f"methods: expected some of {sorted(METHODS)}, got {method!r}")
        if config.methods.count(method) > 1:
            raise ValueError(f"methods: expected each method once, got {method} {config.methods.count(method)} times")
    for method, row in METHODS.items():  # a section of a method that does not run is checked all the same
        unknown = getattr(config, section(method)).keys() - _fields(load(row.config))
        if unknown and method not in config.methods:
            raise ValueError(f"section {section(method)!r}: unknown key {min(unknown)!r}")
    classes = {method: load(METHODS[method].config) for method in config.methods}
    for key in config.common:
        if not any(key in _fields(cls) for cls in classes.values()):
            raise ValueError(f"common: unknown key {key!r}; none of the methods {config.methods} has it")
    out = Path(config.output_dir)
    start = config.model if config.sft is None else str(out / "sft")
    pairs_file, eval_pairs = str(out / "pairs.jsonl.gz"), str(out / "pairs_eval.jsonl.gz")

    def stage(cls: type, name: str, given: dict[str, Any], **defaults: Any) -> Any:
        defaults |= {"output_dir": str(out / name), "seed": config.seed, "resume": config.resume}
        defaults |= {"trust_remote_code": config.trust_remote_code}
        values = {k: v for k, v in defaults.items() if k in _fields(cls) and v is not None} | given
        return from_dict(cls, values, f"section {section(name)!r}")

    plan: dict[str, Any] = {}
    if config.sft is not None:
        plan["sft"] = stage(configs.SFTConfig, "sft", config.sft, model=config.model)
    preferences: dict[str, str] = {}
    held_out: dict[str, str | None] = {}
    if config.pairs:
        eval_file = {"eval_output": eval_pairs} if config.pairs.get("eval_rows") else {}
        plan["pairs"] = stage(configs.PairsConfig, "pairs", config.pairs, model=start, output=pairs_file, **eval_file)
        preferences = {"train_data": plan["pairs"].output}
        held_out = {"eval_data": plan["pairs"].eval_output}
    learned: dict[str, str] = {}  # the reward of methods that name none
    if config.reward is not None:
        plan["reward"] = stage(configs.RewardConfig, "reward", config.reward, model=start, **preferences, **held_out)
        preferences = {"train_data": plan["reward"].train_data}
        learned = {"reward": str(out / "reward")}
    for method, cls in classes.items():
        own = getattr(config, section(method))
        given = {k: v for k, v in config.common.items() if k in _fields(cls)} | own
        if not METHODS[method].online:  # `common` names prompts; these methods learn from the reward model's rows
            given = {k: v for k, v in given.items() if k != "train_data"} | preferences | own
            if "eval_data" in given and learned:
                given = {"eval_reward": learned["reward"]} | given
        plan[method] = stage(cls, method, given, model=start, **learned)
    if not plan:
        raise ValueError("methods: expected at least one where sft and reward are null, got none")
    return plan


def look_up(plan: Mapping[str, Any], out: Path) -> None:
    """Raises ValueError or FileNotFoundError where a stage names data, a model or a reward that is not there.

    The last stage's are thus found missing before the first stage runs. What an earlier stage makes is in `out`.
    """
    seen = set()
    for name, config in plan.items():
        for key in (*_DATA, *_MODELS):
            given = getattr(config, key, None)
            for value in given if isinstance(given, list) else [given]:
                if (
                    not isinstance(value, str)
                    or Path(value).resolve().is_relative_to(out.resolve())
                    or (key, value) in seen
                ):
                    continue
                seen.add((key, value))
                try:
                    with trusting(config.trust_remote_code):
                        _look_up(key, value)
                except (ValueError, FileNotFoundError) as error:
                    raise type(error)(f"section {section(name)!r}: {error}") from error


def _look_up(key: str, value: str) -> None:
    if key in _DATA:
        if not value.startswith("hub:"):
            data_files(value)
    elif is_function(value):
        FunctionReward(value)
    else:
        existing(base_path(value), key)


def write_report(
    config: PipelineConfig, *, variance: dict[str, Any] | None = None, notes: tuple[str, ...] = ()
) -> None:
    """report.html, report.json and plots/*.png from what the stages left on disk, and the tables on the console.

    variance: what `gradient_variance` measured, by the policy that it was measured on.
    notes: further paragraphs for the top of the report.

    Needs evaluations: without eval_data in the methods' configs there is nothing to compare, and no report.
    """
    from rlhf_fast.report import report

    plan, out = make_plan(config), Path(config.output_dir)
    methods = [m for m in config.methods if plan[m].eval_data]
    if not methods:
        return
    runs = [report.load_run(METHODS[m].title, out / m) for m in methods]
    before = read_json(out / methods[0] / "samples_before.json", list)
    reward_name = reward_name_of(plan[methods[0]].eval_reward or getattr(plan[methods[0]], "reward", None))
    start = "start" if config.sft is None else "SFT"
    labels = {"reward_name": reward_name, "gradient_variance": variance, "start": start}
    notes = (*_notes(config, out), *notes)
    report.write_report(out / "report.html", runs, title=config.title, samples=before, notes=notes, **labels)
    report.write_plots(out / "plots", runs, variance, reward_name=reward_name)
    print_table("What each method bought", report.quality_table(runs, before, reward_name, start))
    print_table("What it cost", report.cost_table(runs))
    print(f"report: {out / 'report.html'}")


def reward_name_of(reward: str | list[str] | None) -> str:
    """The name of the evaluations' reward in tables: the function's name, or "score of the reward model"."""
    if isinstance(reward, list):
        return "sum of the rewards"
    return reward.rpartition(":")[2].replace("_", " ") if reward and ":" in reward else "score of the reward model"


def _notes(config: PipelineConfig, out: Path) -> list[str]:
    """What a reader of the report must know: the stages before the methods, and the machine."""
    made = []
    if config.sft is not None:
        sft = _record(out / "sft")
        made.append(
            f"SFT from {config.model} on {sft['rows']} rows in {sft['train_seconds']:.0f} s "
            f"({sft['parameters']['policy']:,} weights)."
        )
    if config.reward is not None:
        reward = _record(out / "reward")
        held_out = ""
        if "eval/accuracy" in reward:
            held_out = f", held-out pair accuracy {reward['eval/accuracy']:.3f} ± {reward['eval/accuracy_se']:.3f}"
        made.append(f"Reward model on {reward['rows']} preferences in {reward['train_seconds']:.0f} s{held_out}.")
    method = _record(out / config.methods[0])
    start = "the SFT model" if config.sft is not None else config.model
    return [
        *([" ".join(made)] if made else []),
        f"Every method starts from {start}, on the same prompts. One seed each.",
        machine(method),
    ]


def machine(record: Mapping[str, Any]) -> str:
    """The machine and the versions of a run.json, as a sentence."""
    found = record["environment"]
    return (
        f"{found['device']}, {found['threads']} threads, torch {found['torch']}, "
        f"transformers {found['transformers']}, Python {found['python']}."
    )


def _record(directory: Path) -> dict[str, Any]:
    return read_json(directory / "run.json")


def _fields(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}
