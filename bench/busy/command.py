"""`python -m bench busy`: every setting's time and CPU time, with no, one and two busy processes beside it.

A busy process computes in one thread without an end. OpenMP's threads mostly spin where they wait for each other, so
that a thread that waits takes a core from the thread that it waits for, once there are more threads than free cores.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench import rollout
from bench.measure import quantiles
from bench.record import ROOT, about_run, page, versions
from rlhf_fast.data.files import write_text
from rlhf_fast.threads import SPINS
from rlhf_fast.training.metrics import print_table

SETTINGS = {
    # What GNU's OpenMP does unless told, because the import of `bench` tells it something.
    "torch's own": {"GOMP_SPINCOUNT": "300000"},
    "beside busy processes": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS[True]},
    "on free cores": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS[False]},
    "one thread": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"},
}
"""What each setting adds to the environment."""
OWN = "torch's own"
CHOSEN = {0: "on free cores", 1: "beside busy processes"}  # by busy processes, as `threads.wait_quietly` chooses
WORKS = ("rollout", "pass")
BUSY = (0, 1, 2)
BARS = ((0, 1.05), (1, 2.2))
"""With so many busy processes, the chosen setting's time is at most so many times torch's own on a quiet machine."""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Process:
    """A process of one setting."""

    def __init__(self, spec: dict[str, Any], setting: dict[str, str]) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in _WAITING}
        command = [sys.executable, "-m", "bench.busy.process", json.dumps(spec)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=clean | setting, **pipes)
        self.threads = self._hear()["threads"]

    def run(self, work: str) -> dict[str, float]:
        """{"seconds", "cpu_seconds"} of one work."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        return self._hear()

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process has ended with exit code {self._process.wait()}; its output is above")
        return json.loads(line)


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Inside, so many other processes compute without an end."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(spec: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """A result for each work and number of busy processes: quantiles of seconds and CPU seconds by setting."""
    processes: dict[str, Process] = {}
    results = []
    try:
        for name, setting in SETTINGS.items():
            processes[name] = Process(spec, setting)
        for number in BUSY:
            with busy(number):
                for work in WORKS:
                    print(f"{work}, {number} busy ...", file=sys.stderr, flush=True)
                    samples = _take_turns(processes, work, rounds)
                    clocks = {
                        clock: {name: quantiles([said[clock] for said in heard]) for name, heard in samples.items()}
                        for clock in ("seconds", "cpu_seconds")
                    }
                    results.append({"work": work, "busy": number, "rounds": rounds, **clocks})
    finally:
        for process in processes.values():
            process.end()
    return results


def _take_turns(processes: dict[str, Process], work: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    order = list(processes)
    for _ in range(rounds):
        for name in order:
            samples[name].append(processes[name].run(work))
        order.reverse()
    return samples


def rows(results: list[dict[str, Any]], work: str) -> list[dict[str, Any]]:
    """One row for each setting: seconds and CPU seconds by number of busy processes."""
    by_number = {result["busy"]: result for result in results if result["work"] == work}
    return [
        {
            "setting": ", ".join([name, *(f"{key}={value}" for key, value in setting.items())]),
            **{f"{n} busy, time": result["seconds"][name]["median"] for n, result in by_number.items()},
            **{f"{n} busy, CPU time": result["cpu_seconds"][name]["median"] for n, result in by_number.items()},
        }
        for name, setting in SETTINGS.items()
    ]


def bar_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each work and bar: the chosen setting beside torch's own on a quiet machine."""
    found = {(result["work"], result["busy"]): result["seconds"] for result in results}
    table = []
    for work in WORKS:
        for number, most in BARS:
            ratio = found[work, number][CHOSEN[number]]["median"] / found[work, 0][OWN]["median"]
            met = "yes" if ratio <= most else "NO"
            row = {"work": work, "busy": number, "bar": f"<= {most:.3g}", "measured": ratio, "met": met}
            table.append(row)
    return table


def tables(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows."""
    shown = {f"{work}: {record['shape']}": rows(record["results"], work) for work in WORKS}
    bars = "Bars: what `wait_quietly` chooses beside torch's own setting on a quiet machine"
    return shown | ({bars: record["bars"]} if record["bars"] else {})


def markdown(record: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    return page("Busy machines", record, tables(record))


def run(args: argparse.Namespace) -> int:
    """`python -m bench busy`; the exit code."""
    record = about_run()
    record["machine"] |= versions("transformers")
    shape = rollout.shapes("cpu", args.quick)[0 if args.quick else 2]
    rows_of = (shape.prompts, shape.prompt_length, shape.new_tokens)
    spec = {"model": None, "config": shape.config, "rows": rows_of, "quick": args.quick}
    record["shape"] = shape.name
    if args.model:
        spec |= {"model": str(args.model.resolve()), "data": str(args.data.resolve())}
        record["shape"] = args.model.name
    record["results"] = measure(spec, 1 if args.quick else min(args.rounds, 5))
    record["bars"] = [] if args.quick else bar_rows(record["results"])
    for title, table in tables(record).items():
        print_table(title, table)
    if args.out:
        write_text(args.out.with_suffix(".md"), markdown(record))
        write_text(args.out, json.dumps(record, indent=2) + "\n")
        print(f"written: {args.out} and beside it .md")
    return int(args.check and any(bar["met"] == "NO" for bar in record["bars"]))
