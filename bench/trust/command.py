"""`python -m bench trust`: runs the campaign, prints its table, exits 1 on any loss.

python -m bench trust --quick                  each kind, three minutes in all
python -m bench trust --minutes 30             the time is divided among the kinds, and cases are drawn at random
python -m bench trust                          every case of every kind, which takes hours
python -m bench trust --only crashes           one kind, by its name
python -m bench trust --only ranks --tries 60  so many tries of it, drawn at random
python -m bench trust --only crashes --case sft/17
                                               one try again, as a loss names it
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from bench.record import about_run
from bench.trust import campaign
from bench.trust.registry import KINDS
from bench.trust.world import warm
from rlhf_fast.data.files import write_text
from rlhf_fast.training.metrics import print_table

QUICK = 150.0  # seconds of tries; imports and the last try come on top


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench trust", description=__doc__, formatter_class=form)
    parser.add_argument("--quick", action="store_true", help="three minutes in all, on few targets")
    parser.add_argument("--minutes", type=float, metavar="N", help="so long in all, cases drawn at random")
    parser.add_argument("--tries", type=int, metavar="N", help="so many of each kind, cases drawn at random")
    parser.add_argument("--only", metavar="KIND", action="append", help="this kind; may be repeated")
    parser.add_argument("--case", metavar="NAME", help="this case of the kind that --only names")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the files of lost tries go")
    parser.add_argument("--out", type=Path, metavar="JSON", help="a file for the table and the losses")
    args = parser.parse_args(argv)
    if args.minutes is not None and (args.quick or not args.minutes > 0):
        parser.error(f"--minutes: expected a number above 0 and no --quick, got {args.minutes}")
    if args.tries is not None and (args.case is not None or args.tries < 1):
        parser.error(f"--tries: expected a number of at least 1 and no --case, got {args.tries}")
    if args.case is not None and (args.only is None or len(args.only) != 1):
        parser.error("--case: expected one kind by --only beside it")
    return args


def main(argv: list[str]) -> int:
    """Runs `python -m bench trust` with these arguments; its exit code."""
    args = arguments(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # for processes that a run starts
    torch.set_num_threads(1)  # before any work, because a process that has started threads must not fork
    if unknown := set(args.only or ()) - set(KINDS):
        sys.exit(f"--only: expected some of {', '.join(KINDS)}, got {min(unknown)!r}")
    kinds = {name: kind for name, kind in KINDS.items() if args.only is None or name in args.only}
    seconds = QUICK if args.quick else args.minutes and args.minutes * 60
    warm()
    with tempfile.TemporaryDirectory(prefix="rlhf_fast-trust-") as root:
        tallies = campaign.conduct(
            kinds,
            Path(root),
            seed=args.seed,
            seconds=None if args.case else seconds,
            quick=args.quick,
            case=args.case,
            tries=args.tries,
            keep=args.keep,
        )
    table = campaign.rows(kinds, tallies)
    print_table("Trust campaign", table)
    losses = [(name, loss) for name, tally in tallies.items() for loss in tally.losses]
    for name, loss in losses:
        print(f"LOST {name} {loss['case']}: {loss['said']}\n    {loss['command']}")
    if args.out:
        written = about_run() | {"seed": args.seed, "table": table, "kinds": campaign.record(tallies)}
        write_text(args.out, json.dumps(written, indent=2) + "\n")
    if not table[-1]["tries"]:
        sys.exit(f"--case: {args.only[0]} has no case {args.case!r}")
    return int(bool(losses))
