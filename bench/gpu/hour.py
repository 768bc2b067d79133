"""The parts by turns, each in a process with a time limit: what fits is begun, and what hangs is ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.part import Part, Setting
from bench.gpu.record import DONE, FAILED, KILLED, NOT_BEGUN, RUNNING, Record

ROOT = Path(__file__).resolve().parents[2]
DRY = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
"""The environment of a dry run: Triton interpreted; torch.compile off, because it takes seconds for each toy."""
SAID = 12  # last lines of a part's output that the record keeps of a part that is not done


class Ended(NamedTuple):
    """How a process ended. code: None where its time was up. said: its last lines."""

    code: int | None
    seconds: float
    said: list[str]


def run_child(command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> Ended:
    """Runs the command in a session of its own, and ends the session, children and all, when its time is up."""
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | environment,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # whoever it left behind too, or all of it after Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that waits in a driver for its device dies later
                process.wait(10)
    return Ended(code, time.monotonic() - began, log.read_text(errors="replace").splitlines()[-SAID:])


def conduct(
    parts: Sequence[Part],
    record: Record,
    setting: Setting,
    budget: float,
    child: Sequence[str] = (sys.executable, "-m", "bench.gpu.child"),
    say: Callable[[str], None] = print,
) -> None:
    """Runs the parts within `budget` seconds; a part that is predicted to take more than is left is not begun."""
    end = time.monotonic() + budget
    for part in parts:
        left, predicted = end - time.monotonic(), part.predicted(setting)
        about = {"predicted": round(predicted, 1), "limit": part.limit, "seconds": None, "rows": [], "failures": []}
        if predicted > left:
            why = f"predicted to take {predicted:.0f} s, and {max(0, left):.0f} s are left"
            record.put(part.name, **about, state=NOT_BEGUN, why=why)
            say(f"{part.name}: {NOT_BEGUN}: {why}")
            continue
        say(f"{part.name} ...")
        record.put(part.name, **about, state=RUNNING, why="")
        record.put(part.name, **_run(part, setting, min(part.limit, left), child))
        say(f"{part.name}: {record.state(part.name)}, {record.content['parts'][part.name]['seconds']:.1f} s")


def _run(part: Part, setting: Setting, limit: float, child: Sequence[str]) -> dict[str, Any]:
    """How the part went, for the record."""
    with tempfile.TemporaryDirectory(prefix="rlhf_fast-gpu-") as directory:
        scratch = Path(directory)
        found, given = scratch / "found.json", scratch / "setting.json"
        (scratch / "work").mkdir()
        results = str(setting.results.resolve())
        given.write_text(json.dumps({"dry": setting.dry, "scratch": str(scratch / "work"), "results": results}))
        command = [*child, part.name, str(given), str(found)]
        ended = run_child(command, limit, scratch / "log", DRY if setting.dry else {})
        content = json.loads(found.read_text()) if found.is_file() else {}
    state, why = DONE, ""
    if ended.code is None:
        state, why = KILLED, f"it had not ended after {limit:.0f} s"
    elif ended.code and content.get("failures"):
        state, why = FAILED, f"{len(content['failures'])} wrong"
    elif ended.code:
        how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        state, why = FAILED, f"{how}: {ended.said[-1][:200] if ended.said else 'no output'}"
    said = {} if state == DONE else {"said": ended.said}
    return content | said | {"state": state, "why": why, "seconds": round(ended.seconds, 1)}
