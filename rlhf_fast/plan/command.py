"""`rlhf-fast plan` and the `--dry-run` of every stage: the plan as JSON, as a table and, explained, as arithmetic."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_fast.config import StageConfig
from rlhf_fast.data.files import write_text
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.methods import METHODS, STAGES
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.gpus import CONTEXT, FRAGMENTATION, GIB, MEMORY, needed, parse_memory
from rlhf_fast.plan.phases import Planner
from rlhf_fast.plan.roles import bytes_per_trained
from rlhf_fast.training.evaluation import EVAL_ROWS
from rlhf_fast.training.metrics import print_table

KINDS = "weights", "optimizer", "gradients", "kept", "pass"  # the last words of the parts of a phase


@trusts_as_asked
def run(plan: PlanConfig) -> None:
    """Make the plan, print it and, with `out`, write it."""
    planner = Planner(plan)
    report = make_report(planner)
    show(planner, report)
    if plan.measure:
        from rlhf_fast.plan.measure import compare

        report["measured"] = compare(planner)
    if plan.out:
        write_text(plan.out, json.dumps(report, indent=2) + "\n")


def dry_run(method: str, config: StageConfig) -> None:
    """Print the plan of a stage's config. Raises ValueError for models in shards, because their number is not known."""
    if config.shard != "none":
        raise ValueError(
            f"shard: expected none with --dry-run, got {config.shard}; `rlhf-fast plan --gpus N --zero 3` plans shards"
        )
    run(plan_of(method, config))


def plan_of(method: str, config: StageConfig) -> PlanConfig:
    """The plan's config for a stage's config."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # KTO's eval_rows is a file of rows whose loss is taken; the plan's is a number of prompts.
    same = ({field.name for field in dataclasses.fields(PlanConfig)} & given.keys()) - {"eval_rows"}
    values = {name: given[name] for name in same}
    prompt = given["max_prompt_length"]
    if "max_length" in given:  # offline stages bound prompt and answer together
        prompt = min(prompt, given["max_length"] - 1)
        response = given["max_length"] - prompt
    else:
        response = given["max_response_length"]
    if "value" in STAGES[method].roles:
        values["critic"] = "shared" if given.get("critic") == "shared" else given["value_model"] or "same"
    if getattr(config, "reference_free", False) and given["eval_data"] is None:
        values["reference_free"] = True
    if "reward" in given:
        rewards = given["reward"] if isinstance(given["reward"], list | tuple) else [given["reward"]]
        models = [one for one in rewards if not callable(one) and (":" not in str(one) or Path(one).is_dir())]
        values["reward"] = "none" if not models else None if given.get("share_base") else models[0]
    if method in METHODS and given["eval_data"] is not None:
        values["eval_rows"] = EVAL_ROWS  # at least as many prompts as are there
    return PlanConfig(**values | {"method": method, "prompt_length": prompt, "response_length": response})


def make_report(planner: Planner) -> dict[str, Any]:
    """The plan as its JSON file holds it: parameters and static bytes by role, peaks by phase, which GPUs it fits."""
    plan, roles = planner.plan, planner.roles
    device = default_device().type if plan.device == "auto" else plan.device
    phases = planner.phases(device)
    on_gpu = planner.phases("cuda")
    peak, gpu_peak = (max(phase.peak_bytes for phase in x.values()) for x in (phases, on_gpu))
    memory = gpu_memory(plan)
    static = {name: planner.static[name]._asdict() for name in roles}
    return {
        "method": plan.method,
        "parameters": {name: role.counts.all for name, role in roles.items()},
        "trained_parameters": {name: role.trained for name, role in roles.items()},
        "static_bytes": static,
        "bytes_per_parameter": {name: sum(static[name].values()) / role.counts.all for name, role in roles.items()},
        "device": device,
        "phases": {
            name: {"peak_bytes": phase.peak_bytes, "parts": phase.parts, "how": phase.how}
            for name, phase in phases.items()
        },
        "peak_bytes": peak,
        "gpu_peak_bytes": gpu_peak,
        "fits": {name: needed(gpu_peak) <= size for name, size in memory.items()},
        "largest_batch": {name: largest_batch(planner, size) for name, size in memory.items()},
        "config": dataclasses.asdict(plan),
    }


def gpu_memory(plan: PlanConfig) -> dict[str, int]:
    """GPU -> bytes of memory; a GPU that `plan.memory` describes comes first."""
    return ({f"your {plan.memory}": parse_memory(plan.memory)} if plan.memory else {}) | MEMORY


def largest_batch(planner: Planner, memory: int) -> int:
    """The largest batch_size that fits `memory` bytes, with micro_batch_size as given; 0 where none fits."""
    plan = planner.plan
    unit = plan.minibatches * plan.stage.samples_of(plan.group_size)

    def fits(units: int) -> bool:
        phases = planner.phases("cuda", batch=units * unit).values()
        return needed(max(phase.peak_bytes for phase in phases)) <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > 1 << 20:
            return low * unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def show(planner: Planner, report: dict[str, Any]) -> None:
    """Print the report as three tables, and the arithmetic behind it where the plan is to be explained."""
    plan = planner.plan
    rows = f"{plan.batch_size} rows of {plan.prompt_length} + {plan.response_length} tokens"
    split = f", ZeRO {plan.zero} over {plan.gpus} GPUs (per GPU)" if plan.gpus > 1 else ""
    print_table(
        f"{plan.method} of {plan.model}: static memory{split}",
        [
            {"role": name, "parameters": report["parameters"][name], "trained": report["trained_parameters"][name]}
            | {f"{part} GiB": _gib(size) for part, size in static.items()}
            | {"bytes a parameter": round(report["bytes_per_parameter"][name], 2)}
            for name, static in report["static_bytes"].items()
        ],
    )
    print_table(
        f"Peak of each phase, {rows} ({report['device']}); a pass adds activations, KV cache, new gradients, buffers",
        [
            {"phase": name, "peak GiB": _gib(phase["peak_bytes"])}
            | {f"{kind} GiB": _gib(_sum(phase["parts"], kind)) for kind in KINDS if kind != "kept" or planner.truncated}
            for name, phase in report["phases"].items()
        ],
    )
    print_table(
        f"Peak {_gib(report['peak_bytes'])} GiB; on a GPU {_gib(report['gpu_peak_bytes'])} GiB and, with "
        f"{FRAGMENTATION:.0%} for fragmentation and {CONTEXT // GIB} GiB for CUDA, "
        f"{_gib(needed(report['gpu_peak_bytes']))} GiB",
        [
            {"GPU": name, "memory GiB": _gib(size), "fits": "yes" if report["fits"][name] else "no"}
            | {"largest batch": report["largest_batch"][name]}
            for name, size in gpu_memory(plan).items()
        ],
    )
    if plan.explain:
        Console(width=200, highlight=False).print("\n".join(explanation(planner, report)), markup=False)


def explanation(planner: Planner, report: dict[str, Any]) -> list[str]:
    """The arithmetic, a line per figure; bytes unless said otherwise."""
    plan, lines = planner.plan, ["Static memory"]
    each = bytes_per_trained(plan)
    for name, role in planner.roles.items():
        size = role.shape.dtype.itemsize
        lines.append(f"  {name}: weights {role.own:,} x {size}" + ("" if role.own else " (another role's)"))
        if extra := role.weight_bytes - role.own * size:
            lines[-1] += f" + {extra:,} as adapters are fp32"
        if role.trained:
            lines[-1] += f", gradients {role.trained:,} x {each.gradient:g}"
            lines[-1] += f", optimizer {role.trained:,} x {each.optimizer:g}"
            lines[-1] += f" (fp32 copies {each.master:g}, moments {each.moments:g})" if each.master else ""
        if plan.gpus > 1:
            lines[-1] += (
                f"; {plan.gpus} GPUs: {', '.join(f'{k} {v:,}' for k, v in planner.static[name]._asdict().items())}"
            )
    lines.append("Phases: the sum of what is there; a pass counts the tensors of the stage's own code")
    for name, phase in report["phases"].items():
        lines.append(f"  {name}: " + " + ".join(f"{size:,} ({part})" for part, size in phase["parts"].items()))
        lines[-1] += f" = {phase['peak_bytes']:,}"
        if phase["how"]:
            lines.append(f"    pass: {phase['how']}")
    return lines


def _sum(parts: dict[str, int], kind: str) -> int:
    return sum(size for name, size in parts.items() if name.endswith(kind))


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size < 100 * GIB else f"{size / GIB:.1f}"
