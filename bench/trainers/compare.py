"""Runs a case: one process per contender. They take turns, so that whatever else the machine does hits all alike.

Ours goes first, because the others train on its first completions. Peak memory is the high-water mark of a process,
imports included. Left out: pinning of threads and clocks.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.measure import quantiles
from bench.trainers.cases import TRL, TRL_PPO, Case, write_specs
from bench.trainers.starts import Start

HERE = Path(__file__).resolve().parent
OURS = "rlhf_fast"
SCRIPTS = {OURS: "run_ours.py", TRL: "run_trl.py", TRL_PPO: "run_trl_ppo.py"}
TOLERANCE = 1e-4
CLOCKS = ("seconds", "cpu_seconds")  # CPU seconds say more on a machine that others use too


class Contender:
    """A process of one of the scripts beside this file."""

    def __init__(self, python: str, script: str, spec: Path) -> None:
        self.name, self._log = script, spec.with_suffix(".log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(HERE / script), str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def hear(self) -> dict[str, Any]:
        """The next message of the process. Raises RuntimeError with the end of its log if the process has ended."""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            end = "\n".join(self._log.read_text().splitlines()[-30:])
            raise RuntimeError(f"{self.name} ended early (exit code {self._process.returncode}):\n{end}")
        return json.loads(line)

    def go(self) -> None:
        """Let it make its next turn."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Close its input and wait until it is done."""
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        """Stop it, whatever it does."""
        self._process.kill()
        self._process.wait()


def why_absent(python: str | None, rival: str) -> str:
    """Why this interpreter cannot run the rival; empty where it can."""
    wanted = rival.removeprefix("TRL ")
    if python is None:
        return f"no environment with trl=={wanted} was named"
    code = "import importlib.metadata as m; print(m.version('trl'))"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True)
    found = run.stdout.strip() or "none"
    return "" if found == wanted else f"expected trl=={wanted} in the environment of {python}, found {found}"


def run(
    case: Case, rival_python: str | None, start: Start, rounds: int, directory: Path, *, bf16: bool = False
) -> dict[str, Any]:
    """Everything about one case, ready for JSON. If the rival is absent: our numbers alone, and the reason."""
    specs = write_specs(case, start, rounds, directory, bf16=bf16)
    absent = why_absent(rival_python, case.rival)
    result = {
        "method": case.method,
        "dtype": "bf16 autocast" if bf16 else "fp32",
        "trainer": case.trainer,
        "rival": case.rival,
        "bar": case.bar,
        "shape": f"batch {case.batch_size}, {case.steps_per_turn} steps a turn, {rounds} turns",
        "absent": absent,
    }
    contenders: dict[str, Contender] = {}
    try:
        contenders[OURS] = Contender(sys.executable, SCRIPTS[OURS], specs["ours"])
        first = {OURS: contenders[OURS].hear()}
        if not absent:
            contenders[case.rival] = Contender(rival_python, SCRIPTS[case.rival], specs["theirs"])
            first[case.rival] = contenders[case.rival].hear()
        samples = take_turns(contenders, rounds, case.steps_per_turn)
        peaks = {}
        for name, contender in contenders.items():
            contender.go()
            peaks[name] = contender.hear()["peak_bytes"]
            contender.end()
    finally:
        for contender in contenders.values():
            contender.kill()
    result |= {
        "environments": {name: said["environment"] for name, said in first.items()},
        **{f"{clock}_per_step": {name: quantiles(x) for name, x in samples[clock].items()} for clock in CLOCKS},
        "peak_bytes": peaks,
    }
    if not absent:
        result |= {
            **{
                f"speedup_{clock}": quantiles(
                    [b / a for a, b in zip(samples[clock][OURS], samples[clock][case.rival], strict=True)]
                )
                for clock in CLOCKS
            },
            "equalities": equalities(case, start, *(first[name]["facts"] for name in (OURS, case.rival)))
            + gradient_equalities(
                *(torch.load(specs[s].with_suffix(".pt")) for s in specs),
                start.response_length if case.gradient_per_token else 1,
            ),
        }
    return result


def take_turns(contenders: dict[str, Contender], rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """By clock and contender, seconds per step, one sample per round; who begins changes from round to round."""
    samples: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in contenders} for clock in CLOCKS}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            contenders[name].go()
            said = contenders[name].hear()
            for clock in CLOCKS:
                samples[clock][name].append(said[clock] / steps)
        order.reverse()
    return samples


def equalities(case: Case, start: Start, ours: dict[str, float], theirs: dict[str, float]) -> list[dict[str, Any]]:
    """The first step's numbers side by side. Raises KeyError for a number that is missing."""
    rows = []
    for e in case.equalities:
        mine = ours[e.ours] / (start.response_length if e.per_token else 1)
        other = theirs[e.theirs.format(reward=start.reward.__name__)]
        rows.append(_compared(e.quantity, mine, other, max(abs(other), e.scale)))
    return rows


def gradient_equalities(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], factor: float
) -> list[dict[str, Any]]:
    """Norms, and the norm of the difference, of every trained model's first gradient; all its weights as one vector."""
    if ours.keys() != theirs.keys():
        differing = ", ".join(sorted(ours.keys() ^ theirs.keys())[:5])
        raise ValueError(f"gradients: expected the same weights on both sides, got on one only: {differing}")
    rows = []
    for role in dict.fromkeys(name.partition(".")[0] for name in ours):
        names = [name for name in ours if name.startswith(f"{role}.")]
        mine, other = (torch.cat([g[name].double().flatten() for name in names]) for g in (ours, theirs))
        mine, size = mine * factor, other.norm().item()
        rows.append(_compared(f"gradient norm, {role}", mine.norm().item(), size, size))
        distance = (mine - other).norm().item()
        rows.append(_compared(f"gradient, {role}: distance", distance, 0.0, size))
    return rows


def _compared(quantity: str, ours: float, theirs: float, scale: float) -> dict[str, Any]:
    error = abs(ours - theirs) / scale if scale else abs(ours - theirs)
    return {
        "quantity": quantity,
        "ours": ours,
        "theirs": theirs,
        "relative difference": error,
        "met": "yes" if error <= TOLERANCE else "NO",
    }
