"""`python -m bench ops`: measures the operations, prints tables, writes JSON, Markdown and a chart.

    python -m bench ops                          every case at full size; results under bench/results/
    python -m bench ops --only gae --check       the cases whose name holds "gae"; exit code 1 where a bar is missed
    python -m bench ops --quick                  toy shapes: shows in seconds that everything runs

Threads are torch's (OMP_NUM_THREADS). Every kernel is checked against float64 before it is timed.
"""

import argparse
import datetime
import io
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import rlhf_fast
from bench import report
from bench.cases import all_cases
from bench.measure import measure
from rlhf_fast.metrics import print_table
from rlhf_fast.ops import dispatch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("--quick", action="store_true", help="toy shapes and few rounds; no bars")
    parser.add_argument("--only", metavar="NAME", default="", help="the cases whose name contains NAME")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    parser.add_argument(
        "--rounds", type=int, default=11, help="at least so many rounds of each case (default 11; linear_*: 3)"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and chart go beside it")
    args = parser.parse_args()
    if args.quick and args.check:
        parser.error("--check: the bars hold at full size, not with --quick")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out: expected a file name ending in .json, got {args.out}")
    if args.out is None and not args.quick:
        args.out = Path("bench/results/cpu_ops.json")
    return args


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": dispatch._cpu.isa() if dispatch.COMPILED else "reference",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlhf_fast": rlhf_fast.__version__,
        "load before": round(os.getloadavg()[0], 1),
    }


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)


def main() -> int:
    args = arguments()
    cases = [case for case in all_cases(args.quick) if args.only in case.name]
    if not cases:
        names = ", ".join(case.name for case in all_cases(args.quick))
        sys.exit(f"--only: no case contains {args.only!r}; there are {names}")
    results, about = [], machine()
    for case in cases:
        print(f"{case.name} {case.shape} ...", file=sys.stderr, flush=True)
        rounds = min(args.rounds, 3) if case.products else args.rounds  # of ten seconds each
        results.append(measure(case, *((2, 0.0) if args.quick else (rounds, 3.0))))
    bars = [] if args.quick else report.bar_rows(results)
    run = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": about,
        "cases": results,
        "bars": bars,
    }
    print_table(run["command"], report.rows(results))
    if bars:
        print_table("Bars", bars)
    if args.out:
        chart = io.BytesIO()
        report.figure(results).savefig(chart, format="png", dpi=150)
        write(args.out.with_suffix(".png"), chart.getvalue())
        write(args.out.with_suffix(".md"), report.markdown(run, args.out.with_suffix(".png").name).encode())
        write(args.out, (json.dumps(run, indent=2) + "\n").encode())
        print(f"written: {args.out} and beside it .md and .png")
    return int(args.check and any(bar["met"] == "NO" for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
