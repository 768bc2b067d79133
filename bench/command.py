"""`python -m bench`: measures the operations, prints tables, writes JSON, Markdown and a chart.

    python -m bench ops                          every case at full size; results under bench/results/, as
                                                 cpu_ops.* or on a machine with AVX-512 as cpu_ops_avx512.*
    python -m bench ops --only gae --check       the cases whose name holds "gae"; exit code 1 where a bar is missed
    python -m bench ops --device cuda --check    the same on a GPU, at a GPU's shapes; under 8 minutes
    python -m bench ops --quick                  toy shapes: shows in seconds that everything runs
    python -m bench exactness                    errors beside other libraries' (the extra `rivals`), -inf and all;
                                                 exit code 1 where ours is beyond its tolerance
    python -m bench rollout --check              decoding beside transformers' generate
    python -m bench rollout --model DIR --data DIR --check
                                                 the same with a checkpoint in fp32, under bf16 autocast, and in bf16
    python -m bench rollout --vllm URL --model DIR --data DIR
                                                 a vLLM server of that model beside our decoder and generate
    python -m bench busy --check                 rollouts and training passes beside other busy processes, by the way
                                                 that OpenMP's threads wait; takes --model and --data too
    python -m bench ahead --vllm URL --model DIR --data DIR
                                                 rounds in turn and one ahead, with a vLLM server of that model
    python -m bench trainers --trl-python P --ppo-python Q --check
                                                 whole training runs beside TRL's trainers; P and Q are the interpreters
                                                 of environments with trl==1.16.0 and trl==1.12.0
    python -m bench trainers --model DIR --data DIR --dtypes fp32 bf16 ...
                                                 the same on a checkpoint, with rows of real lengths
    python -m bench integrations                 TRL's trainers and transformers' Trainer, plain and with our passes
                                                 and losses inside; takes --model, --data, --dtypes, --trl-python too
    python -m bench steps --dtypes fp32 bf16     whole steps and decoding beside their bare matmuls, and where
                                                 their time goes; takes --model, --data too
    python -m bench ranks --check                several processes beside one: steps/s, collectives and their bytes
    python -m bench ranks --computed             step times on machines that nobody has measured
    python -m bench ranks --device cuda          one GPU beside all of them, by NCCL
    python -m bench trust --quick                kills, damages and crosses runs on purpose, and counts what is lost
    python -m bench static --check               registers, occupancy and bytes of every GPU kernel, without a GPU
    python -m bench gpu --dry-run                the first hour on a GPU, with toy shapes on the CPU
                                                 trust, static and gpu: their own --help has the options

Threads are torch's (OMP_NUM_THREADS). Every kernel is checked against float64 before it is timed.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import ahead, exactness, exactness_report, integrations, report, rollout, served
from bench.busy import command as busy
from bench.cases import all_cases
from bench.device import CPU, CUDA
from bench.libraries import with_libraries
from bench.measure import measure
from bench.ranks import command as ranks
from bench.record import about_run, machine, versions
from bench.rivals import FROM_HIDDEN, FROM_LOGITS
from bench.steps import command as steps
from bench.trainers import command as trainers
from bench.trials import hidden_trials, logits_trials
from rlhf_fast.data.files import write_bytes, write_text
from rlhf_fast.ops import dispatch
from rlhf_fast.training.metrics import print_table


def arguments() -> argparse.Namespace:
    """The command line, checked; where the results go by default."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "what", choices=["ops", "exactness", "rollout", "busy", "ahead", "trainers", "integrations", "steps", "ranks"]
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="ops, rollout, ranks: where (default cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="toy shapes and few rounds; no bars")
    parser.add_argument("--only", metavar="NAME", default="", help="the cases whose name contains NAME")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    parser.add_argument(
        "--rounds", type=int, default=11, help="at least so many rounds of each case (default 11; linear_*: 3)"
    )
    parser.add_argument("--vllm", metavar="URL", help="rollout, ahead: a vLLM server of --model")
    parser.add_argument("--trl-python", metavar="PATH", help="trainers: of an environment with trl==1.16.0")
    parser.add_argument("--ppo-python", metavar="PATH", help="trainers: of an environment with trl==1.12.0")
    parser.add_argument("--model", type=Path, metavar="DIR", help="rollout, trainers: a checkpoint")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the rows for --model: sft.jsonl.gz and others")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp32", "bf16"],
        default=["fp32"],
        help="trainers: fp32, bf16 (autocast) or both",
    )
    parser.add_argument("--computed", action="store_true", help="ranks: prints the computed table and runs nothing")
    parser.add_argument("--out", type=Path, help="the JSON file; Markdown and chart go beside it")
    args = parser.parse_args()
    if args.what == "exactness" and (args.quick or args.check):
        parser.error("--quick, --check: exactness takes seconds and always checks")
    if args.quick and args.check:
        parser.error("--check: the bars hold at full size, not with --quick")
    if args.what in ("busy", "trainers", "integrations", "steps") and args.device == "cuda":
        parser.error(f"--device: {args.what} runs on the CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.what == "ranks" and args.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"--device cuda: ranks takes two GPUs at least, torch sees {torch.cuda.device_count()}")
    if args.computed and args.what != "ranks":
        parser.error(f"--computed: expected ranks, got {args.what}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out: expected a file name ending in .json, got {args.out}")
    if (args.model is None) != (args.data is None):
        parser.error("--model, --data: expected both or none of them")
    if args.vllm and args.what not in ("rollout", "ahead"):
        parser.error(f"--vllm: expected rollout or ahead, got {args.what}")
    if (args.what == "ahead" or args.vllm) and not (args.vllm and args.model):
        parser.error("--vllm, --model, --data: expected all of them")
    if args.vllm and args.check:
        parser.error("--check: there are no bars of a server")
    if args.out is None and not args.quick:
        name = f"{args.what}_{args.model.name}" if args.model else args.what
        name += "_vllm" * bool(args.vllm)
        name += "_avx512" * (args.what == "ops" and args.device == "cpu" and machine()["kernels"] == "avx512")
        args.out = Path(f"bench/results/{'gpu' if args.device == 'cuda' else 'cpu'}_{name}.json")
    return args


def run_exactness(args: argparse.Namespace) -> int:
    """`python -m bench exactness`; the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not dispatch.INTERPRETED:  # Triton and our back ends read it when they are imported
        command = [sys.executable, "-m", "bench", *sys.argv[1:]]
        return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    groups = {"logits": (logits_trials(), FROM_LOGITS), "hidden states": (hidden_trials(), FROM_HIDDEN)}
    run = about_run()
    run["machine"] |= versions("trl", "liger-kernel", "triton")
    run["machine"]["triton kernels"] = "interpreted" if device == "cpu" else torch.cuda.get_device_name()
    run["tables"] = {}
    for inputs, (trials, implementations) in groups.items():
        print(f"from {inputs} ...", file=sys.stderr, flush=True)
        trials = [trial for trial in trials if args.only in trial.name]
        if not trials:
            sys.exit(
                f"--only: no case contains {args.only!r}; there are {', '.join(t.name for t in groups[inputs][0])}"
            )
        run["tables"][inputs] = exactness.measure(trials, implementations, device)
    run["failures"] = [miss for results in run["tables"].values() for miss in exactness.failures(results)]
    for inputs, results in run["tables"].items():
        exactness_report.print_short(f"From {inputs}", exactness_report.short_rows(results))
    print("Log-prob and its gradient / entropy and the gradient of both.", *exactness_report.notes(run), sep="\n")
    for miss in run["failures"]:
        print(f"FAILS: {miss}")
    write_text(args.out.with_suffix(".md"), exactness_report.markdown(run))
    write_text(args.out, json.dumps(run, indent=2, allow_nan=False) + "\n")
    print(f"written: {args.out} and beside it .md with every number")
    return int(bool(run["failures"]))


def main() -> int:
    """Run the command that was named; its exit code."""
    args = arguments()
    commands = {
        "ops": run_ops,
        "exactness": run_exactness,
        "rollout": served.run if args.vllm else rollout.run,
        "busy": busy.run,
        "ahead": ahead.run,
        "trainers": trainers.run,
        "integrations": integrations.run,
        "steps": steps.run,
        "ranks": ranks.run,
    }
    return commands[args.what](args)


def run_ops(args: argparse.Namespace) -> int:
    """`python -m bench ops`; the exit code."""
    cases = [case for case in all_cases(args.quick, args.device) if args.only in case.name]
    if args.device == "cuda":
        cases = with_libraries(cases)
    if not cases:
        names = ", ".join(case.name for case in all_cases(args.quick, args.device))
        sys.exit(f"--only: no case contains {args.only!r}; there are {names}")
    device = CUDA() if args.device == "cuda" else CPU()
    results, run = [], about_run()
    run["machine"] |= device.about()
    for case in cases:
        print(f"{case.name} {case.shape} ...", file=sys.stderr, flush=True)
        slow = case.products and args.device == "cpu"  # ten seconds a round
        rounds = 2 if args.quick else min(args.rounds, 3) if slow else args.rounds
        results.append(measure(case, rounds, 0.0 if args.quick else 3.0, device))
    promised = report.bars_of(args.device, run["machine"]["kernels"])
    bars = [] if args.quick else report.bar_rows(results, promised)
    run |= {"cases": results, "bars": bars}
    print_table(run["command"], report.rows(results))
    if bars:
        print_table("Bars", bars)
    if args.out:
        chart = io.BytesIO()
        report.figure(results).savefig(chart, format="png", dpi=150)
        write_bytes(args.out.with_suffix(".png"), chart.getvalue())
        write_text(args.out.with_suffix(".md"), report.markdown(run, args.out.with_suffix(".png").name))
        write_text(args.out, json.dumps(run, indent=2) + "\n")
        print(f"written: {args.out} and beside it .md and .png")
    return int(args.check and any(bar["met"] == "NO" for bar in bars))
