"""`python -m bench trainers`: every case, its tables, its files of results."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.record import about_run
from bench.trainers import cases, compare, report, starts
from rlhf_fast.data.files import write_text
from rlhf_fast.training.metrics import print_table


def run(args: argparse.Namespace) -> int:
    """`python -m bench trainers`; the exit code."""
    chosen = [case for case in cases.CASES if args.only in case.method]
    if not chosen:
        sys.exit(f"--only: no trainer contains {args.only!r}; there are sft, reward, dpo, rloo, ppo")
    pythons = {cases.TRL: args.trl_python, cases.TRL_PPO: args.ppo_python}
    record = about_run()
    with tempfile.TemporaryDirectory() as scratch:
        if args.model:
            chosen = [case.at_real_size() for case in chosen]
            start = starts.checkpoint(Path(scratch) / "models", args.model, args.data)
        else:
            start = starts.demo(Path(scratch) / "models")
        record["start"] = start.name
        results = []
        for case in chosen:
            case, rounds = (case.quick(), 2) if args.quick else (case, args.rounds)
            for dtype in args.dtypes:
                print(f"{case.method}, {dtype} ...", file=sys.stderr, flush=True)
                directory = Path(scratch) / f"{case.method}_{dtype}"
                results.append(compare.run(case, pythons[case.rival], start, rounds, directory, bf16=dtype == "bf16"))
                shutil.rmtree(directory)  # a checkpoint's gradients take gigabytes
                record |= _tables(results)
                if args.out:  # after every case, because a checkpoint's cases take an hour
                    write_text(args.out.with_suffix(".md"), report.markdown(record))
                    write_text(args.out, json.dumps(record, indent=2, allow_nan=False) + "\n")
    tables = {record["command"]: report.rows(results), "First step": record["equalities"], "Bars": record["bars"]}
    for title, table in tables.items():
        print_table(title, table)
    if args.out:
        print(f"written: {args.out} and beside it .md")
    return int(args.check and any(bar["met"] == "NO" for bar in record["bars"]))


def _tables(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"cases": results, "bars": report.bar_rows(results), "equalities": report.equality_rows(results)}
