"""`python -m bench ranks`: every case, its tables, its files of results."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measure import quantiles
from bench.ranks import cases, formula, report
from bench.ranks.groups import Contender, Group
from bench.ranks.process import DECODING
from bench.record import about_run, versions
from bench.trainers.compare import CLOCKS, take_turns
from rlhf_fast.data.files import write_text
from rlhf_fast.training.metrics import print_table

WARMUP = 2
COUNTED = 2  # the step whose collectives are counted


def contenders(device: str) -> list[Contender]:
    """One process beside several that have as many threads in all, or on CUDA a GPU each."""
    size = torch.cuda.device_count() if device == "cuda" else 2
    threads = 1 if device == "cpu" else max(1, (os.cpu_count() or 1) // size)
    one = Contender(report.ONE, 1, size if device == "cpu" else threads)
    return [one, Contender(f"{size} replicas", size, threads), Contender(f"{size} shards", size, threads, "full")]


def run(args: argparse.Namespace) -> int:
    """`python -m bench ranks`; the exit code."""
    if args.computed:
        print(report.computed_markdown(), end="")
        return 0
    record = about_run()
    record["machine"] |= versions("transformers")
    if args.device == "cuda":
        record["machine"]["GPUs"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    record["results"] = results = []
    rounds = 2 if args.quick else min(args.rounds, 5)
    with tempfile.TemporaryDirectory(prefix="rlhf_fast-ranks-") as scratch:
        for case in cases.cases(args.device, args.quick):
            stages = [stage for stage in cases.MAIN if args.only in f"{stage} {case.name}"]
            for result in measure(case, stages, rounds, Path(scratch) / case.name, args.device) if stages else ():
                results.append(result)
                record["bars"] = report.bar_rows(results)
                if args.out:  # after every stage, because a large case takes long
                    write_text(args.out.with_suffix(".md"), report.markdown(record))
                    write_text(args.out, json.dumps(record, indent=2, allow_nan=False) + "\n")
    if not results:
        sys.exit(f"--only: no case contains {args.only!r}; there are {', '.join(cases.MAIN)}, each with its shape")
    for title, table in report.tables(record).items():
        print_table(title, table)
    if args.out:
        print(f"written: {args.out} and beside it .md")
    sent = [row for row in record["bars"] if row["what"].startswith("collectives")]
    return int(any(row["met"] == "NO" for row in (record["bars"] if args.check else sent)))


def measure(case: cases.Case, stages: list[str], rounds: int, directory: Path, device: str) -> Iterator[dict[str, Any]]:
    """Everything about each stage on one shape, ready for JSON. The processes stay from stage to stage."""
    steps, everyone = WARMUP + rounds * case.turn, {contender.name: contender for contender in contenders(device)}
    files = cases.prepare(case, directory, steps)
    groups: dict[str, Group] = {}
    try:
        for name, contender in everyone.items():
            own, specs = directory / name.replace(" ", "_"), []
            for stage in stages:
                if contender.size > 1:
                    counted = cases.spec(case, stage, files, COUNTED, shard=contender.shard)
                    specs.append(cases.write_spec(own / f"{stage}_count.json", counted, count=COUNTED))
                wanted = cases.spec(case, stage, files, steps, shard=contender.shard)
                turns = {"warmup": WARMUP, "turn": case.turn, "rounds": rounds}
                specs.append(cases.write_spec(own / f"{stage}.json", wanted, **turns))
            groups[name] = Group(contender, specs, own / "log", device)
        for stage in stages:
            print(f"{stage}, {case.name} ...", file=sys.stderr, flush=True)
            options = cases.spec(case, stage, files, COUNTED)["options"]
            traffic = {
                name: traffic_of(stage, options, groups[name], contender)
                for name, contender in everyone.items()
                if contender.size > 1
            }
            for group in groups.values():
                group.hear()
            samples = take_turns(groups, rounds, case.turn)
            for group in groups.values():
                group.go()
                group.hear()
            yield result_of(case, stage, rounds, everyone, samples, traffic, device)
    finally:
        for group in groups.values():
            group.kill()


def result_of(
    case: cases.Case,
    stage: str,
    rounds: int,
    everyone: dict[str, Contender],
    samples: dict[str, dict[str, list[float]]],
    traffic: dict[str, Any],
    device: str,
) -> dict[str, Any]:
    """What JSON keeps of a stage."""
    one = samples["seconds"][report.ONE]
    several = [name for name in everyone if name != report.ONE]
    return {
        "stage": stage,
        "case": case.name,
        "shape": f"{case.rows} rows of 2 x {case.tokens} tokens, {case.turn} steps a turn, {rounds} turns",
        **{f"{clock}_per_step": {name: quantiles(x) for name, x in samples[clock].items()} for clock in CLOCKS},
        "ratios": {
            name: quantiles([a / b for a, b in zip(one, samples["seconds"][name], strict=True)]) for name in several
        },
        "faster": {name: everyone[name].size if device == "cuda" else 1 for name in several},
        "traffic": traffic,
    }


def traffic_of(stage: str, options: dict[str, Any], group: Group, contender: Contender) -> dict[str, Any]:
    """The collectives of a step by phase, and where they differ from the formula."""
    said = group.hear()
    group.hear()  # the stage is done
    return compared(stage, options, said, contender.size, shards=contender.shard != "none")


def compared(stage: str, options: dict[str, Any], said: dict[str, Any], size: int, *, shards: bool) -> dict[str, Any]:
    """What a process said of its collectives beside the formula. options: of the stage."""
    share = -(-options["batch_size"] // size)
    work = formula.Work(stage, _updates(options), -(-share // (options.get("micro_batch_size") or share)))
    promised = formula.collectives(work, formula.as_sizes(said["sizes"]), shards=shards)
    found = formula.summed(said["counts"])
    differences = formula.differences(found, promised, size)
    if said["counts"].get(DECODING):
        differences.append(f"{DECODING}: {said['counts'][DECODING]}, expected no collective")
    return {"found": found, "promised": promised, "differences": differences, "phases": said["counts"]}


def _updates(options: dict[str, Any]) -> int:
    """Optimizer steps of a step or round."""
    return options.get("minibatches", 1) * (options["epochs"] if options.get("minibatches") else 1)
