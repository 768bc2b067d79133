"""Rounds in turn beside rounds one ahead: seconds a round of ReMax with a vLLM server, and what the formula expects.

In turn a round takes s + t + p seconds: sampling, training (all else) and the push of the weights with its proof. One
round ahead it takes max(s, t) + p, where server and trainer have cores or GPUs of their own. Both runs begin with the
same model and take turns on the same server, which has to be free of other clients.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.measure import quantiles
from bench.record import about_run, opening, versions
from rlhf_fast.config import ReMaxConfig
from rlhf_fast.data.encoding import load_rows
from rlhf_fast.data.files import write_text
from rlhf_fast.rollout.vllm.server import Server
from rlhf_fast.stages import remax
from rlhf_fast.training.metrics import markdown_table, print_table, read_metrics

FIRST = 2  # rounds that are not counted: the trials of fast paths, and the round that nothing is trained beside


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward without a model, so that a round is sampling and training."""
    return [sum(c.count(v) for v in "aeiou") / max(1, len(c)) for c in completions]


def trained(args: argparse.Namespace, ahead: int, directory: Path) -> dict[str, list[float]]:
    """Seconds of every counted round of one run: whole, the wait for rows, and the push."""
    rows = load_rows(args.data / "prompts.jsonl.gz", "prompt")[: 4 if args.quick else 256]
    batch = 4 if args.quick else 16
    config = ReMaxConfig(
        model=str(args.model),
        output_dir=str(directory),
        train_data=[{"prompt": row["prompt"]} for row in rows],
        reward=vowels,
        sampler="vllm",
        vllm_url=args.vllm,
        rollouts_ahead=ahead,
        steps=FIRST + args.rounds,
        batch_size=batch,
        micro_batch_size=min(8, batch),
        max_prompt_length=128,
        max_response_length=4 if args.quick else 40,
        max_mismatch=1.0,
        learning_rate=1e-6,
        save_steps=0,
    )
    pushes: list[float] = []
    refresh = Server.refresh

    def timed(server: Server, model: Any) -> None:
        began = time.perf_counter()
        refresh(server, model)
        pushes.append(time.perf_counter() - began)

    Server.refresh = timed
    try:
        remax.train(config)
    finally:
        Server.refresh = refresh
    counted = read_metrics(directory / "metrics.jsonl")[FIRST:]
    if ahead:
        counted = counted[:-1]  # nothing is sampled beside the last round
    return {
        "round": [row["time/step"] for row in counted],
        "rollout": [row["time/rollout"] for row in counted],
        "push": pushes[FIRST : FIRST + len(counted)],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of both runs, and the formula's expectation."""
    with tempfile.TemporaryDirectory() as place:
        turn, ahead = (trained(args, n, Path(place, str(n))) for n in (0, 1))
    seconds = {name: {key: quantiles(x) for key, x in run.items()} for name, run in (("turn", turn), ("ahead", ahead))}
    whole, rollout, push = (seconds["turn"][key]["median"] for key in ("round", "rollout", "push"))
    sampling, training = rollout - push, whole - rollout
    return {
        "seconds": seconds,
        "sampling": sampling,
        "training": training,
        "push": push,
        "expected_speed_up": whole / (max(sampling, training) + push),
        "speed_up": whole / seconds["ahead"]["round"]["median"],
    }


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each way."""
    found = record["results"]
    return [
        {"rounds": name, **{f"{key}, s": times["median"] for key, times in found["seconds"][name].items()}}
        for name in ("turn", "ahead")
    ]


def run(args: argparse.Namespace) -> int:
    """`python -m bench ahead`; the exit code."""
    record = about_run()
    record["machine"] |= versions("transformers")
    record["results"] = measure(args)
    found = record["results"]
    said = (
        f"speed-up {found['speed_up']:.2f}, {found['expected_speed_up']:.2f} with a core or GPU each: sampling "
        f"{found['sampling']:.2f} s, training {found['training']:.2f} s, push {found['push']:.2f} s"
    )
    print_table("A round of ReMax", rows(record))
    print(said)
    if args.out:
        parts = [*opening("One round ahead", record), markdown_table(rows(record)), f"{said[0].upper()}{said[1:]}."]
        write_text(args.out.with_suffix(".md"), "\n\n".join(parts) + "\n")
        write_text(args.out, json.dumps(record, indent=2) + "\n")
        print(f"written: {args.out} and beside it .md", file=sys.stderr)
    return 0
