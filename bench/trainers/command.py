"""`python -m bench trainers`: every case, its tables, its files of results."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from bench.record import about_run
from bench.trainers import cases, compare, report
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
        models = cases.prepare(Path(scratch) / "models")
        results = []
        for case in chosen:
            print(f"{case.method} ...", file=sys.stderr, flush=True)
            case, rounds = (case.quick(), 2) if args.quick else (case, args.rounds)
            results.append(compare.run(case, pythons[case.rival], models, rounds, Path(scratch) / case.method))
    bars, equalities = report.bar_rows(results), report.equality_rows(results)
    record |= {"cases": results, "bars": bars, "equalities": equalities}
    for title, table in {record["command"]: report.rows(results), "First step": equalities, "Bars": bars}.items():
        print_table(title, table)
    if args.out:
        write_text(args.out.with_suffix(".md"), report.markdown(record))
        write_text(args.out, json.dumps(record, indent=2, allow_nan=False) + "\n")
        print(f"written: {args.out} and beside it .md")
    return int(args.check and any(bar["met"] == "NO" for bar in bars))
