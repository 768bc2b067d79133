"""Reward functions that fail: one line that speaks of the reward, what was saved stays, and --resume makes it whole.

A function misbehaves from its third call on while a file `fault` lies beside it. Without the file the same function is
good, so that the resumed run must end with the results of an undisturbed run.
"""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from bench.trust import child
from bench.trust.child import Child
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.world import World
from rlhf_fast.methods import METHODS

ONLINE = tuple(name for name, row in METHODS.items() if row.online)
HANGS = 20.0  # seconds that a hanging reward may go on for, its limit being one
_SOURCE = """import os, sys, time
import torch

calls = 0
here = os.path.dirname(os.path.abspath(__file__))


def good(completions):
    return [0.1 * len(c.split()) + ("good" in c.split()) for c in completions]


def score(prompts, completions):
    global calls
    calls += 1
    if calls < 3 or not os.path.exists(os.path.join(here, "fault")):
        return good(completions)
    {fault}
"""


def cases(world: World, target: str) -> Iterator[Case]:
    """Every fault."""
    for name, fault in {**ERRORS, **ENDS, **HARMLESS}.items():

        def attempt(directory: Path, rng: Random, name: str = name, fault: str = fault) -> None:
            misbehaving(world, target, directory, name, fault)

        yield Case(f"{target}/{name}", attempt)


def misbehaving(world: World, target: str, directory: Path, name: str, fault: str) -> None:
    """Runs with the fault, then resumes without it."""
    out, source = directory / "out", directory / "reward.py"
    source.write_text(_SOURCE.replace("{fault}", fault))
    (directory / "fault").touch()
    timed = ["--reward-timeout", "1"] if name in HANGING else []
    command = world.stage(target, reward=f"{source}:score", eval_reward=f"{world.root}/reward.py:score")
    running = Child(world.action(target, command, out, *timed), directory / "log0")
    if name in HANGING:
        expect(_ends(running), f"expected the reward's time limit to end the run within {HANGS:.0f} s")
    ended = running.wait()
    if name in HARMLESS and not (name in STATEFUL and ended.last.startswith("rlhf-fast: ")):
        expect(ended.code == 0, f"expected the run to finish, got exit code {ended.code}: {ended.last}")
    elif name in ERRORS:
        expect(ended.code > 0, f"expected an error, got exit code {ended.code}: {ended.last}")
        clear = "Traceback" not in ended.output and ended.last.startswith("rlhf-fast: ")
        expect(clear, f"expected one line, got exit code {ended.code}: {ended.output[-300:]!r}")
        lines = [line for line in ended.output.splitlines() if "reward" in line]
        expect(bool(lines), f"expected a line that speaks of the reward, got {ended.last}")
    (directory / "fault").unlink()
    ended = child.run(world.action(target, command, out, *timed, resume=True), directory / "log1")
    expect(ended.code == 0, f"expected the resumed run to finish, got exit code {ended.code}: {ended.last}")
    world.must_equal(out, world.baseline(target).directory, ignoring=_ABOUT_REWARDS)


def _ends(running: Child) -> bool:
    if running.ended(HANGS):
        return True
    running.signal(signal.SIGKILL, group=True)
    with suppress(Lost):
        running.wait()
    return False


HANGING = {"hangs", "busy"}
ERRORS = {
    "raises": 'raise ValueError("boom")',
    "raises OSError": 'raise OSError(5, "boom")',
    "raises KeyError": 'raise KeyError("boom")',
    "raises nothing": "raise Exception",
    "exits 0": "sys.exit(0)",
    "exits": 'sys.exit("boom")',
    "generator exit": "raise GeneratorExit",
    "stop iteration": "raise StopIteration",
    "recursion": "return score.__globals__['score'](prompts, completions)",
    "memory": "raise MemoryError",
    "none": "return None",
    "a number": "return 1.0",
    "text": 'return "x" * len(completions)',
    "bytes": 'return b"x" * len(completions)',
    "bytes in a list": 'return [b"1.5"] * len(completions)',
    "texts": 'return ["1.0"] * len(completions)',
    "a dict": "return dict.fromkeys(range(len(completions)), 0.5)",
    "a set": "return set(range(len(completions)))",
    "too few": "return good(completions)[1:]",
    "too many": "return good(completions) + [1.0]",
    "generator too short": "return (x for x in good(completions)[1:])",
    "generator raises": "return (1 / 0 for x in completions)",
    "NaN": 'return [float("nan")] * len(completions)',
    "infinity": 'return [float("inf")] * len(completions)',
    "beyond fp32": "return [1e308] * len(completions)",
    "huge integer": "return [10**400] * len(completions)",
    "complex": "return [1j] * len(completions)",
    "nested": "return [[x] for x in good(completions)]",
    "0-dim tensor": "return torch.tensor(1.0)",
    "2-dim tensor": "return torch.ones(len(completions), 2)",
    "meta tensor": 'return torch.ones(len(completions), device="meta")',
    "objects": "return [object()] * len(completions)",
    "hangs": "time.sleep(3600)",
    "busy": "while True: pass",
}
ENDS = {
    "leaves": "os._exit(3)",
    "kills itself": "os.kill(os.getpid(), 9)",
    "aborts": "os.abort()",
    "terminates itself": "os.kill(os.getpid(), 15); return good(completions)",
    "forked child raises": "os.fork() or sys.exit(0); os.wait(); return good(completions)",
}
HARMLESS = {
    "generator": "return (x for x in good(completions))",
    "tensor": "return torch.tensor(good(completions))",
    "tuple": "return tuple(good(completions))",
    "pops": "scores = good(completions)\n    while completions: completions.pop()\n    return scores",
    "forks": "os.fork() or os._exit(0); os.wait(); return good(completions)",
    "random numbers": "torch.rand(3); return good(completions)",
    "seeds": "torch.manual_seed(0); return good(completions)",
    "prints": 'print("\\x1b]0;x\\x07"); return good(completions)',
    "changes directory": 'os.chdir("/"); return good(completions)',
    "gradients off": "torch.set_grad_enabled(False); return good(completions)",
    "default dtype": "torch.set_default_dtype(torch.float64); return good(completions)",
}
STATEFUL = {"changes directory", "gradients off", "default dtype"}  # these may be refused, in one line
_ABOUT_REWARDS = frozenset({"config", "made_of", "reward", "eval_reward", "reward_timeout"})  # in run.json
KIND = Kind("reward functions that raise, exit, hang, fork or return wrong things", ONLINE, ("remax", "ppo"), cases)
