"""`python -m bench integrations`: TRL's trainers and transformers' own, as they are and with this package inside.

Both sides are the same trainer on the same weights, rows and seeds, each in a process of its own, and the two take
turns. The first step's numbers and gradients have to agree within 1e-4. Left out: Liger, whose kernels are Triton's and
need a GPU; Triton's interpreter would run them a thousand times slower on a CPU, which says nothing of Liger.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import quantiles
from bench.record import about_run, opening
from bench.trainers import starts
from bench.trainers.cases import CASES, TRL, Case, write_specs
from bench.trainers.compare import CLOCKS, TOLERANCE, Contender, gradient_equalities, take_turns, why_absent
from rlhf_fast.data.files import write_text
from rlhf_fast.training.metrics import markdown_table, print_table

PLAIN, OURS = "plain", "ours"
LIGER = "not run: its Triton kernels need a GPU"


def cases() -> list[Case]:
    """TRL's trainers, and SFT by transformers' Trainer."""
    theirs = [case for case in CASES if case.rival == TRL]
    return [*theirs, replace(theirs[0], trainer="Trainer")]


def run(args: argparse.Namespace) -> int:
    """`python -m bench integrations`; the exit code."""
    chosen = [case for case in cases() if args.only in case.trainer]
    if not chosen:
        sys.exit(f"--only: no trainer contains {args.only!r}; there are {', '.join(c.trainer for c in cases())}")
    python = args.trl_python or sys.executable
    if absent := why_absent(python, TRL):
        sys.exit(f"--trl-python: {absent}")
    record, results = about_run(), []
    with tempfile.TemporaryDirectory() as scratch:
        if args.model:
            chosen = [case.at_real_size() for case in chosen]
            start = starts.checkpoint(Path(scratch) / "models", args.model, args.data)
        else:
            start = starts.demo(Path(scratch) / "models", rows=64 if args.quick else 3000)
        for case in chosen:
            case, rounds = (case.quick(), 2) if args.quick else (case, args.rounds)
            for dtype in args.dtypes:
                print(f"{case.trainer}, {dtype} ...", file=sys.stderr, flush=True)
                directory = Path(scratch) / f"{case.trainer}_{dtype}"
                results.append(measure(case, python, start, rounds, directory, bf16=dtype == "bf16"))
    record |= {"start": start.name, "liger": LIGER, "cases": results, "rows": rows(results)}
    print_table(record["command"], record["rows"])
    print(f"Liger: {LIGER}")
    if args.out:
        write_text(args.out.with_suffix(".md"), markdown(record))
        write_text(args.out, json.dumps(record, indent=2, allow_nan=False) + "\n")
        print(f"written: {args.out} and beside it .md")
    return int(any(row["first step"] == "NO" for row in record["rows"]))


def measure(
    case: Case, python: str, start: starts.Start, rounds: int, directory: Path, *, bf16: bool = False
) -> dict[str, Any]:
    """One trainer, plain and changed, ready for JSON."""
    written = write_specs(case, start, rounds, directory, bf16=bf16)["theirs"]
    spec = json.loads(written.read_text()) | {"trainer": case.trainer, "completions": None}
    contenders: dict[str, Contender] = {}
    usual = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), usual]))
    try:
        first, peaks = {}, {}
        for change in (PLAIN, OURS):
            own = {
                "change": change,
                "output_dir": str(directory / change),
                "gradients": str(directory / f"{change}.pt"),
            }
            path = directory / f"{change}.json"
            path.write_text(json.dumps(spec | own))
            contenders[change] = Contender(python, "run_changed.py", path)
            first[change] = contenders[change].hear()
        samples = take_turns(contenders, rounds, case.steps_per_turn)
        for name, contender in contenders.items():
            contender.go()
            peaks[name] = contender.hear()["peak_bytes"]
            contender.end()
    finally:
        for contender in contenders.values():
            contender.kill()
        os.environ.pop("PYTHONPATH")
        if usual is not None:
            os.environ["PYTHONPATH"] = usual
    facts = {name: said["facts"] for name, said in first.items()}
    gradients = (torch.load(directory / f"{change}.pt") for change in (OURS, PLAIN))
    return {
        "trainer": case.trainer,
        "dtype": "bf16 autocast" if bf16 else "fp32",
        "shape": f"batch {case.batch_size}, {case.steps_per_turn} steps a turn, {rounds} turns",
        "environments": {name: said["environment"] for name, said in first.items()},
        **{f"{clock}_per_step": {name: quantiles(x) for name, x in samples[clock].items()} for clock in CLOCKS},
        "speedup": quantiles([b / a for a, b in zip(*(samples["seconds"][n] for n in (OURS, PLAIN)), strict=True)]),
        "peak_bytes": peaks,
        "first_step": facts,
        "worst difference": worst(facts[OURS], facts[PLAIN], gradient_equalities(*gradients, 1)),
    }


def worst(ours: dict[str, float], plain: dict[str, float], gradients: Sequence[dict[str, Any]]) -> float:
    """The largest difference of the first step: of numbers, relative where they are larger than 1, and of gradients."""
    same = {name for name in plain if not name.endswith(("time", "runtime", "per_second"))}
    numbers = [abs(ours[name] - plain[name]) / max(1.0, abs(plain[name])) for name in same]
    return max([*numbers, *(row["relative difference"] for row in gradients)])


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per trainer and side."""
    table = []
    for result in results:
        equal = result["worst difference"] <= TOLERANCE
        for name, seconds in result["seconds_per_step"].items():
            row = {"trainer": result["trainer"], "dtype": result["dtype"], "by": name}
            row |= {"steps/s": 1 / seconds["median"], "CPU time seconds": 0.0, "peak bytes": result["peak_bytes"][name]}
            row["CPU time seconds"] = result["cpu_seconds_per_step"][name]["median"]
            if name == OURS:
                spread = result["speedup"]
                row["times as fast"] = f"{spread['median']:.3g} ({spread['p20']:.3g} to {spread['p80']:.3g})"
                row["worst difference"] = f"{result['worst difference']:.1e}"
                row["first step"] = ("yes" if equal else "NO") if result["dtype"] == "fp32" else "no bar"
            table.append(row | {key: row.get(key, "") for key in ("times as fast", "worst difference", "first step")})
    return table


def markdown(record: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    parts = [
        *opening("Inside other trainers", record),
        f"The same trainer on {record['start']}, plain and with this package inside, with the same weights, rows and "
        "seeds. Each side has a process of its own, and the two take turns. Speeds are medians of the rounds' ratios, "
        "with their 20 and 80 % quantiles. Peak memory is that of the process, imports included. The worst difference "
        "is that of the first step's numbers and gradients.",
        markdown_table(record["rows"]),
        f"Liger: {record['liger']}.",
    ]
    return "\n\n".join(parts) + "\n"
