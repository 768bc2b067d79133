"""`rlhf-fast plan` and the `--dry-run` of every stage: the plan as JSON, as a table and, explained, as arithmetic."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_fast.config import StageConfig
from rlhf_fast.data.files import write_text
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.room import INSTEAD, ROLLOUTS, refusal
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.methods import METHODS, STAGES
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.gpus import CONTEXT, FRAGMENTATION, GIB, MEMORY, needed, parse_memory
from rlhf_fast.plan.phases import Phase, Planner
from rlhf_fast.plan.roles import bytes_per_trained
from rlhf_fast.ranks import announced
from rlhf_fast.training.evaluation import EVAL_ROWS
from rlhf_fast.training.metrics import print_table

KINDS = "weights", "optimizer", "gradients", "kept", "pass"  # the last words of the parts of a phase


@trusts_as_asked
def run(plan: PlanConfig) -> None:
    """Make the plan, print it and, with `out`, write it.

    Of several processes, which `measure` takes, the first one does so; the others are measured.
    """
    planner, (rank, processes) = Planner(plan), announced()
    if processes > 1 and not plan.measure:
        raise ValueError(f"measure: expected true in {processes} processes, as a plan alone takes one, got false")
    if rank:
        from rlhf_fast.plan.measure import measure

        measure(planner)
        return
    report = make_report(planner)
    show(planner, report)
    if plan.measure:
        from rlhf_fast.plan.measure import compare

        measured = compare(planner)
        report["measured"] = measured if processes > 1 else measured[0]
    if plan.out:
        write_text(plan.out, json.dumps(report, indent=2) + "\n")


def dry_run(method: str, config: StageConfig) -> None:
    """Print the plan of a stage's config, for as many GPUs as a launcher has started processes.

    Raises ValueError for models in shards without a launcher, because the number of their parts is not known.
    """
    rank, processes = announced()
    if config.shard != "none" and processes == 1:
        raise ValueError(
            f"shard: expected none with --dry-run in one process, got {config.shard}; start it with torchrun, or use "
            f"`rlhf-fast plan --gpus N --shard {config.shard}`"
        )
    if not config.shard_base:
        raise ValueError(
            "shard_base: expected True with --dry-run, because a plan puts every base into shards, got False"
        )
    if rank:  # the first process says it
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    plan = plan_of(method, config, gpus=processes, machines=processes // local if config.shard == "hybrid" else 1)
    planner = Planner(plan)
    show(planner, make_report(planner))


def plan_of(method: str, config: StageConfig, **processes: int) -> PlanConfig:
    """The plan's config for a stage's config. processes: its `gpus` and `machines`."""
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
    lengths = {"prompt_length": prompt, "response_length": response}
    fields: dict[str, Any] = values | {"method": method} | lengths | processes
    return PlanConfig(**fields)


def make_report(planner: Planner) -> dict[str, Any]:
    """The plan as its JSON file holds it: parameters and static bytes by role, peaks by phase, which GPUs it fits.

    static_bytes are those of the first process, as in run.json. phases are those of the process with the largest peak.
    With several GPUs `processes` has both of every process.
    """
    plan, roles = planner.plan, planner.roles
    device = default_device().type if plan.device == "auto" else plan.device
    processes, on_gpu = planner.processes(device), planner.processes("cuda")
    fullest, gpu_peak = max(processes, key=peak), max(map(peak, on_gpu))
    memory = gpu_memory(plan)
    static = _static(planner)
    several = {
        "processes": [
            {
                "static_bytes": _static(planner.at(rank)),
                "phases": {name: {"peak_bytes": phase.peak_bytes} for name, phase in phases.items()},
            }
            for rank, phases in enumerate(processes)
        ]
    }
    refused = {name: refused_copy(planner, size, name) for name, size in memory.items()}
    return {
        "method": plan.method,
        "parameters": {name: role.counts.all for name, role in roles.items()},
        "trained_parameters": {name: role.trained for name, role in roles.items()},
        "static_bytes": static,
        "bytes_per_parameter": {name: sum(static[name].values()) / role.counts.all for name, role in roles.items()},
        "device": device,
        "phases": {
            name: {"peak_bytes": phase.peak_bytes, "parts": phase.parts, "how": phase.how}
            for name, phase in fullest.items()
        },
        **(several if plan.gpus > 1 else {}),
        "peak_bytes": peak(fullest),
        "gpu_peak_bytes": gpu_peak,
        "fits": {name: needed(gpu_peak) <= size for name, size in memory.items()},
        "largest_batch": {name: largest_batch(planner, size) for name, size in memory.items()},
        **({"refused": {name: line for name, line in refused.items() if line}} if planner.sharded else {}),
        "config": dataclasses.asdict(plan),
    }


def peak(phases: dict[str, Phase]) -> int:
    """The largest peak of a process's phases, in bytes."""
    return max(phase.peak_bytes for phase in phases.values())


def _static(planner: Planner) -> dict[str, dict[str, int]]:
    return {name: static._asdict() for name, static in planner.static.items()}


def gpu_memory(plan: PlanConfig) -> dict[str, int]:
    """GPU -> bytes of memory; a GPU that `plan.memory` describes comes first."""
    return ({f"your {plan.memory}": parse_memory(plan.memory)} if plan.memory else {}) | MEMORY


def refused_copy(planner: Planner, memory: int, gpu: str) -> str | None:
    """What a run in shards says at its start on a GPU that has no room for the whole policy of rollouts, or None."""
    if not (planner.sharded and planner.stage.online):
        return None
    copies = planner.roles["policy"].whole_bytes(planner.spread.parts)
    held = max(planner.at(rank).held() for rank in range(planner.plan.gpus))
    if needed(held + copies) <= memory:
        return None
    return refusal("policy", ROLLOUTS, copies, 0, max(0, memory - needed(held)), f"on {gpu}", INSTEAD)


def largest_batch(planner: Planner, memory: int) -> int:
    """The largest batch_size that fits GPUs of `memory` bytes, with micro_batch_size as given; 0 where none fits."""
    plan = planner.plan
    unit = plan.minibatches * plan.stage.samples_of(plan.group_size) * plan.gpus

    def fits(units: int) -> bool:
        return needed(max(map(peak, planner.processes("cuda", units * unit)))) <= memory

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
    """Print the report as tables, and the arithmetic behind it where the plan is to be explained."""
    plan = planner.plan
    rows = f"{plan.batch_size} rows of {plan.prompt_length} + {plan.response_length} tokens"
    print_table(
        f"{plan.method} of {plan.model}: static memory{_split(plan)}",
        [
            {"role": name, "parameters": report["parameters"][name], "trained": report["trained_parameters"][name]}
            | {f"{part} GiB": _gib(size) for part, size in static.items()}
            | {"bytes a parameter": round(report["bytes_per_parameter"][name], 2)}
            for name, static in report["static_bytes"].items()
        ],
    )
    print_table(
        f"Peak of each phase, {rows} ({report['device']}); a pass adds activations, KV cache, new gradients, buffers"
        f"{', whole weights' if planner.sharded else ''}",
        [
            {"phase": name, "peak GiB": _gib(phase["peak_bytes"])}
            | {f"{kind} GiB": _gib(_sum(phase["parts"], kind)) for kind in KINDS if kind != "kept" or planner.truncated}
            for name, phase in report["phases"].items()
        ],
    )
    if plan.gpus > 1:
        print_table("Processes, one for each GPU", process_rows(report["processes"]))
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
    console = Console(width=200, highlight=False)
    if line := report.get("refused", {}).get(f"your {plan.memory}"):
        console.print(line, markup=False, soft_wrap=True)
    if plan.explain:
        console.print("\n".join(explanation(planner, report)), markup=False)


def process_rows(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each run of processes with the same bytes: what they hold, their peak, and the phase of the peak."""
    rows: list[dict[str, Any]] = []
    for rank, process in enumerate(processes):
        peaks = {name: phase["peak_bytes"] for name, phase in process["phases"].items()}
        static = sum(sum(parts.values()) for parts in process["static_bytes"].values())
        found = {"static GiB": _gib(static), "peak GiB": _gib(max(peaks.values()))}
        found["phase of the peak"] = max(peaks, key=lambda name: peaks[name])
        if rows and found.items() <= rows[-1].items():
            rows[-1]["process"] = f"{rows[-1]['process'].partition('-')[0]}-{rank}"
        else:
            rows.append({"process": str(rank), **found})
    return rows


def _split(plan: PlanConfig) -> str:
    """How the run is spread, for the title of a table."""
    if plan.gpus == 1:
        return ""
    if plan.shard != "none":
        machines = f" in {plan.machines} machines" if plan.machines > 1 else ""
        return f" of the first of {plan.gpus} GPUs{machines}, in shards ({plan.shard})"
    return f", ZeRO {plan.zero} over {plan.gpus} GPUs (per GPU)" if plan.zero else f" of each of {plan.gpus} GPUs"


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
