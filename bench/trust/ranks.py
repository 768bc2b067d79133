"""Two processes of a run: one of them is killed or fails, the other one ends by itself and says who is gone.

Kills: SIGKILL to one process at a moment of the clock, to process 0 at a change of the file system, or to process 1
when process 0 comes to such a change. The other process must end in 30 seconds with one line that names the killed
process, and every checkpoint and the finished model must be whole. --resume must give an undisturbed run's results.
Failures: a reward function or a step raises in one process. Both must end, and the error is printed once.

A process that dies before it has met the other one is the launcher's to notice, so tries begin when they have met.
`torchrun` is such a launcher: with --max-restarts the run goes on by itself.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import torch
import yaml

from bench.record import ROOT
from bench.trust import mutations
from bench.trust.child import PATIENCE, Child, Ended
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.world import STAGE_TARGETS, Baseline, World
from rlhf_fast import ranks
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.training import checkpoint
from rlhf_fast.training.learner import Learner

TRIES = 40  # kills of a target
GRACE = 30.0  # seconds that the other process has
SHARDS, FAILS, TORCHRUN = " in shards", " fails", "torchrun "
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_whole: dict[tuple[Path, str], Baseline] = {}


def cases(world: World, target: str) -> Iterator[Case]:
    """Kills or failures of the target."""
    name = target.removesuffix(FAILS).removeprefix(TORCHRUN)
    uninterrupted(world, name)
    if target.startswith(TORCHRUN):
        yield from (_case(target, number, lambda d, r: relaunched(world, name, d, r)) for number in range(TRIES))
    elif target.endswith(FAILS):
        for what in ("memory", *(["reward"] if name.removesuffix(SHARDS) in ONLINE else ["row"])):
            for rank in (0,) if what == "row" else (0, 1):
                yield _case(target, f"{what} {rank}", lambda d, r, w=what, k=rank: failed(world, name, d, r, w, k))
    else:
        yield from (_case(target, number, lambda d, r: killed(world, name, d, r)) for number in range(TRIES))


def _case(target: str, name: int | str, run: Callable[[Path, Random], None]) -> Case:
    return Case(f"{target}/{name}", run)


def uninterrupted(world: World, target: str) -> Baseline:
    """The undisturbed run of a target in two processes; `seconds` are those since they have met."""
    key = (world.root, target)
    if key not in _whole:
        directory = world.root / "pairs_of_processes" / str(len(_whole))
        out = directory / "out"
        begins = mutations.count(out, directory / "ledger"), lambda: None
        pair = _start(world, target, out, directory, begins=begins)
        _met(pair, out)
        began = time.monotonic()
        ended = [one.wait() for one in pair]
        said = f"the undisturbed run of {target} ended with exit codes {[one.code for one in ended]}"
        expect(not any(one.code for one in ended), f"{said}: {ended[0].output[-600:]} {ended[1].output[-600:]}")
        expect(ended[1].output == "", f"expected process 0 alone to speak, but process 1 said {ended[1].last}")
        _whole[key] = Baseline(out, mutations.number_of(directory / "ledger"), time.monotonic() - began)
    return _whole[key]


def killed(world: World, target: str, directory: Path, rng: Random) -> None:
    """One kill, then a run of two processes that must make everything whole."""
    out, whole = directory / "out", uninterrupted(world, target)
    way, victim = rng.choice(("clock", "write", "beside")), rng.randint(0, 1)
    if way != "clock":
        victim = 0 if way == "write" else 1
    place, moment = rng.randint(1, whole.mutations), rng.uniform(0.0, 1.0) * whole.seconds
    second = _process(world, target, out, directory, 1, port := _free_port())
    first = _process(world, target, out, directory, 0, port, _kills(out, directory, place, way, second.pid))
    pair = (first, second)
    try:
        if way == "clock":
            _met(pair, out)
            pair[victim].ended(moment)
            pair[victim].signal(signal.SIGKILL)
        ended = _end(pair, victim)
    finally:
        _stop(pair)
    if ended[victim].code:
        expect(ended[victim].code == -signal.SIGKILL, f"expected SIGKILL, got {_said(ended[victim])}")
        _told(ended[1 - victim], victim)
        whole_files(out, target)
    goes_on(world, target, directory)


def failed(world: World, target: str, directory: Path, rng: Random, what: str, rank: int) -> None:
    """An error in one process, or a row that no process can read; then --resume without the error."""
    out, port = directory / "out", _free_port()
    at, more = rng.randint(2, 4), ()
    if what == "row":
        (directory / "rows.jsonl").write_text(f'{{"prompt": "{_ERROR}"}}\n')
        more = ("--train-data", str(directory / "rows.jsonl"))
    begins = [lambda: None, lambda: None]
    begins[rank] = lambda: _break(what, at)
    pair = [_process(world, target, out, directory, number, port, begins[number], *more) for number in (0, 1)]
    try:
        ended = _end(pair, rank)
    finally:
        _stop(pair)
    expect([one.code for one in ended] == [1, 1], f"expected exit codes 1 and 1, got {' and '.join(map(_said, ended))}")
    said = "rows.jsonl" if what == "row" else _ERROR
    if what == "row" and said not in ended[0].output:
        rank = 1  # both processes read the row, and either may be the first to say so
    expect(said in ended[rank].output, f"expected the error of process {rank}, got {_said(ended[rank])}")
    other = ended[1 - rank].output
    expect(said not in other and "rlhf-fast: " not in other, f"expected one line, but the other said {other[-300:]}")
    expect("Traceback" not in other, f"expected no traceback beside the error, got {other[-300:]}")
    goes_on(world, target, directory)


def relaunched(world: World, target: str, directory: Path, rng: Random) -> None:
    """torchrun starts both processes again after the death of one, and the run goes on."""
    out, whole = directory / "out", uninterrupted(world, target)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*launcher, "-m", "rlhf_fast", *_command(world, target), f"--output-dir={out}", "--resume"]
    with (directory / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        victim, end = rng.choice(("0", "1")), time.monotonic() + PATIENCE
        while not any(out.glob(".rlhf_fast*lock*")) and running.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.8) * whole.seconds)
        for pid in _children(running.pid):
            if f"RANK={victim}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                os.kill(pid, signal.SIGKILL)
        code = running.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise Lost(f"expected an end, but torchrun still runs: {(directory / 'log').read_text()[-300:]}") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    expect(code == 0, f"expected exit code 0 of torchrun, got {code}: {(directory / 'log').read_text()[-600:]}")
    world.must_equal(out, whole.directory)


def goes_on(world: World, target: str, directory: Path) -> None:
    """--resume in two processes gives the results of the undisturbed run."""
    out = directory / "out"
    resumed = _start(world, target, out, directory / "resumed", resume=True)
    try:
        ended = [one.wait() for one in resumed]
    finally:
        _stop(resumed)
    expect(
        not any(one.code for one in ended), f"expected the resumed run to finish, got {' and '.join(map(_said, ended))}"
    )
    world.must_equal(out, uninterrupted(world, target).directory)


def whole_files(out: Path, target: str) -> None:
    """Raises Lost where a checkpoint or a finished model that can be seen is not whole."""
    for place in {path.parent for path in out.rglob("checkpoint-*")} | {out}:
        _, damaged = checkpoint.newest_whole(place)
        expect(not damaged, f"expected whole checkpoints, got {'; '.join(damaged)}")
    for note in out.rglob("run.json"):
        load = load_scorer if "reward" in (target.removesuffix(SHARDS), note.parent.name) else load_policy
        if (note.parent / "config.json").exists():
            load(note.parent)


def _command(world: World, target: str) -> list[str]:
    name = target.removesuffix(SHARDS)
    if name == target:
        return world.command(name)
    if name != "pipeline":
        return world.stage(name, shard="full")
    config = world.pipeline()
    for section in ("sft", "reward", "common"):
        config[section] = {**config[section], "shard": "full"}  # pyright: ignore[reportGeneralTypeIssues]
    path = world.root / "pipeline_in_shards.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["pipeline", "--config", str(path)]


def _start(
    world: World,
    target: str,
    out: Path,
    directory: Path,
    *,
    resume: bool = False,
    begins: tuple[Callable[[], None], ...] = (lambda: None,) * 2,
) -> list[Child]:
    port = _free_port()
    return [
        _process(world, target, out, directory, rank, port, begin, resume=resume) for rank, begin in enumerate(begins)
    ]


def _process(
    world: World,
    target: str,
    out: Path,
    directory: Path,
    rank: int,
    port: int,
    begin: Callable[[], None] = lambda: None,
    *more: str,
    resume: bool = False,
) -> Child:
    """Process `rank` of two. begin: called in it before the run. more: further flags."""
    name = target.removesuffix(SHARDS)
    run = world.action(name, _command(world, target), out, *more, resume=resume)
    values = (rank, 2, rank, 2, "127.0.0.1", port)

    def action() -> int:
        os.environ |= {key: str(value) for key, value in zip(_LAUNCHED, values, strict=True)}
        ranks._current = None  # it was one process when it was forked
        begin()
        try:
            return run()
        except Exception:
            sys.excepthook(*sys.exc_info())
            return 1
        finally:
            ranks._leave()  # a forked process runs nothing at its exit

    return Child(action, directory / f"log{rank}")


def _kills(out: Path, directory: Path, place: int, way: str, other: int) -> Callable[[], None]:
    """What process 0 does before its run: it kills itself at a change of the file system, or the other process."""

    def act(number: int, what: str, path: str, finish: Callable[[], None] | None) -> None:
        if number == place:
            if way == "write" and finish is not None:
                finish()
            os.kill(os.getpid() if way == "write" else other, signal.SIGKILL)

    return lambda: None if way == "clock" else mutations.Watch(out, directory / "ledger", act) and None


def _met(pair, out: Path) -> None:
    """Waits until the processes have met, which is before process 0 locks a directory or a file."""
    end = time.monotonic() + PATIENCE
    while not any(out.rglob(".rlhf_fast*lock*")) and time.monotonic() < end and not pair[0].ended(0.002):
        pass


def _end(pair, victim: int) -> list[Ended]:
    """Waits for both; the other process has GRACE from the end of the victim."""
    ended = {victim: pair[victim].wait()}
    ended[1 - victim] = pair[1 - victim].wait(GRACE)
    return [ended[0], ended[1]]


def _stop(pair) -> None:
    for one in pair:
        one.signal(signal.SIGKILL, group=True)


def _told(other: Ended, victim: int) -> None:
    """Raises Lost unless the other process has finished, or has said who is gone and no more."""
    if other.code == 0:
        return
    said = f"expected exit code 1 and that process {victim} has ended, got {_said(other)}"
    expect(other.code == 1 and f"process {victim} of 2 has ended" in other.last, said)
    expect("Traceback" not in other.output, f"expected one line, got a traceback: {other.last}")


def _said(ended: Ended) -> str:
    return f"exit code {ended.code} ({ended.last})"


_ERROR = "no luck in this process"


def _break(what: str, at: int) -> None:
    """Makes the call number `at` raise: of a reward function, or of a learner's clipping."""
    from rlhf_fast.training.reward_functions import FunctionReward

    owner, name = (FunctionReward, "__call__") if what == "reward" else (Learner, "clip")
    if what == "row":
        return
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def broken(*arguments, **options):
        if next(calls) == at:
            raise torch.OutOfMemoryError(_ERROR) if what == "memory" else ValueError(_ERROR)
        return original(*arguments, **options)

    setattr(owner, name, broken)


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


ONLINE = tuple(stage for stage in STAGE_TARGETS if stage not in ("sft", "reward", "dpo", "kto"))
_RUNS = (*STAGE_TARGETS, "pairs", "pipeline")
KIND = Kind(
    "one of two processes is killed or fails; the other one ends; --resume or torchrun goes on",
    (
        *_RUNS,
        *(stage + SHARDS for stage in (*STAGE_TARGETS, "pipeline")),
        *(name + FAILS for name in ("sft", "ppo", "remax" + SHARDS)),
        TORCHRUN + "sft",
        TORCHRUN + "remax" + SHARDS,
    ),
    ("sft", "ppo" + SHARDS, "remax" + FAILS),
    cases,
)
