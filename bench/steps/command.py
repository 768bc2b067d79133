"""`python -m bench steps`: every step, its tables, its files of results."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.record import about_run, versions
from bench.steps import cases, report, training
from bench.steps.decoding import Decoding
from bench.steps.floor import floor, triad
from bench.steps.products import Counts
from rlhf_fast.data.files import write_text
from rlhf_fast.lab.compare.start import SHAPES
from rlhf_fast.training.metrics import print_table

TRIAD_NUMBERS = 32 << 20


def run(args: argparse.Namespace) -> int:
    """`python -m bench steps`; the exit code."""
    chosen = [step for step in cases.STEPS if args.only in step]
    if not chosen:
        sys.exit(f"--only: no step contains {args.only!r}; there are {', '.join(cases.STEPS)}")
    record = about_run()
    record["machine"] |= versions("transformers")
    record |= {"checkpoint": args.model is not None, "results": [], "bars": []}
    rounds, least = (1, 0.0) if args.quick else (min(args.rounds, 3), 0.2)
    with tempfile.TemporaryDirectory(prefix="rlhf_fast-steps-") as scratch:
        models = _models(args, chosen, Path(scratch) / "models")
        for step in chosen:
            for dtype in args.dtypes:
                print(f"{step}, {dtype} ...", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=scratch) as directory:
                    for name, result, counts in measure(step, models, rounds, Path(directory), bf16=dtype == "bf16"):
                        about = {"model": models.name, "step": name, "dtype": dtype}
                        beside = {"floor": floor(counts, least), "triad": triad(*_triad_of(args))}
                        record["results"].append(about | result | beside)
                record["bars"] = [] if args.quick else report.bar_rows(record["results"])
                if args.out:  # after every step, because a checkpoint's steps take long
                    write_text(args.out.with_suffix(".md"), report.markdown(record))
                    write_text(args.out, json.dumps(record, indent=2, allow_nan=False) + "\n")
    for title, table in report.tables(record).items():
        if table:
            print_table(title, table)
    if args.out:
        print(f"written: {args.out} and beside it .md")
    return int(args.check and any(bar["met"] == "NO" for bar in record["bars"]))


def measure(
    step: str, models: cases.Models, rounds: int, directory: Path, *, bf16: bool
) -> Iterator[tuple[str, dict[str, Any], Counts]]:
    """The name, the clocks and the matmuls of a step; of decoding, those of prefill and decode step."""
    if step == "decoding":
        sizes = models.sizes
        rows = models.rows("prompt", sizes.prompts)
        decoding = Decoding(models.policy, rows, sizes.prompts, sizes.prompt_length, sizes.new_tokens, bf16=bf16)
        found = decoding.measure(rounds, directory)
        del decoding
        for part, (result, counts) in found.items():
            yield part, result, counts
        return
    options = models.options(step, len(training.kinds(rounds)), bf16=bf16)
    yield step, *training.measure(step, options, rounds, directory)


def _models(args: argparse.Namespace, chosen: list[str], directory: Path) -> cases.Models:
    if args.model:
        online = bool({"ppo", "remax"} & {*chosen})
        return cases.checkpoint(args.model, args.data, cases.AT_A_CHECKPOINT, directory, online=online)
    if args.quick:
        return cases.untrained("toy", cases.TOY, cases.AT_TOY, directory)
    return cases.untrained("60M", SHAPES["60M"], cases.AT_60M, directory)


def _triad_of(args: argparse.Namespace) -> tuple[int, int]:
    return (1 << 16, 2) if args.quick else (TRIAD_NUMBERS, 5)
