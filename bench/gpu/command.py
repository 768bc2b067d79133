"""`python -m bench gpu`: everything that has to be known from the first hour on a GPU, in nine minutes.

python -m bench gpu --dry-run       every part on the CPU with toy shapes, and what each is predicted to take on an H200
python -m bench gpu                 the parts in order of worth; results after each
python -m bench gpu --resume        the parts that are missing in the results
python -m bench gpu --parts ops,heads --minutes 4
                                    these parts alone
python -m bench gpu --wheels DIR --python 3.12 --have FREEZE
                                    downloads the wheels that an image lacks, whose `pip freeze` is in the file FREEZE
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.gpu import wheels
from bench.gpu.hour import conduct
from bench.gpu.part import Setting
from bench.gpu.parts import PARTS
from bench.gpu.record import DONE, Record
from bench.record import about_run, versions
from rlhf_fast.training.metrics import print_table

MINUTES = 9.0
RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu.json"


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__, formatter_class=form)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with toy shapes")
    parser.add_argument("--parts", metavar="A,B", help=f"some of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--resume", action="store_true", help="the parts that the results do not have yet")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default {MINUTES:g})")
    parser.add_argument("--out", type=Path, metavar="JSON", help=f"default {RESULTS.name} among the bench's results")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="download the wheels that an image lacks, no more")
    parser.add_argument("--have", type=Path, metavar="FILE", help="wheels: the image's `pip freeze`")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="wheels: the image's Python (default 3.12)")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {args.minutes}")
    if (args.wheels is None) != (args.have is None):
        parser.error("--wheels, --have: expected both or none of them")
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out: expected a file name ending in .json, got {args.out}")
    if args.dry_run and args.out is None:
        parser.error("--out: expected a file with --dry-run, whose results are none")
    names = [part.name for part in PARTS]
    args.parts = args.parts.split(",") if args.parts else names
    if unknown := [name for name in args.parts if name not in names]:
        parser.error(f"--parts: expected some of {', '.join(names)}, got {unknown[0]!r}")
    args.out = args.out or RESULTS
    return args


def main(argv: list[str]) -> int:
    """Runs `python -m bench gpu` with these arguments; its exit code."""
    args = arguments(argv)
    if args.wheels:
        try:
            fetched = wheels.fetch(args.wheels, wheels.installed(args.have.read_text()), args.python)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        print("\n".join([*fetched, f"{len(fetched)} wheels in {args.wheels}"]))
        return 0
    print_table("Predicted for an H200, computed from bytes and flops", predictions(args.parts))
    setting = Setting(args.dry_run, results=args.out.parent)
    names = [part.name for part in PARTS]
    try:
        if args.resume:
            record = Record.resume(args.out, names, args.dry_run)
        else:
            record = Record.begin(args.out, names, about(), args.dry_run)
    except ValueError as error:
        sys.exit(str(error))
    wanted = [name for name in (record.missing() if args.resume else names) if name in args.parts]
    by_name = {part.name: part for part in PARTS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    conduct([by_name[name] for name in wanted], record, setting, 60 * args.minutes)
    print(record.markdown())
    print(f"written: {args.out} and beside it .md")
    return int(any(record.state(name) != DONE for name in args.parts))


def predictions(names: list[str]) -> list[dict[str, Any]]:
    """A row per part, and their sum."""
    real = Setting(dry=False)
    parts = [part for part in PARTS if part.name in names]
    rows = [
        {"part": part.name, "what": part.help, "predicted": f"{part.predicted(real):.0f} s", "limit": f"{part.limit} s"}
        for part in parts
    ]
    total = sum(part.predicted(real) for part in parts)
    return [*rows, {"part": "all", "what": "", "predicted": f"{total:.0f} s", "limit": ""}]


def about() -> dict[str, Any]:
    """The run and its machine, for the record. The GPU is named by its processes, because this one must not hold it."""
    run = about_run()
    return {"command": run["command"], "date": run["date"], **run["machine"], **versions("triton", "transformers")}
