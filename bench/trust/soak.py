"""A long small run: resident memory, open files, threads and the time of a step do not grow."""

import statistics
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from bench.trust.child import Child
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.world import World
from rlhf_fast.training.metrics import read_metrics

STEPS = {"remax": 150, "remax long": 2000, "ppo long": 2000, "sft long": 2000}
_EVERY = 0.05  # seconds between two looks
RSS, TIME = 6.0, 1.6  # MiB, and the factor between the medians of the last and the second third


def cases(world: World, target: str) -> Iterator[Case]:
    """One run."""

    def run(directory: Path, rng: Random) -> None:
        soaked(world, target.partition(" ")[0], directory, STEPS[target])

    yield Case(f"{target}/{STEPS[target]} steps", run)


def soaked(world: World, stage: str, directory: Path, steps: int) -> None:
    """Runs `steps` steps with an evaluation and a checkpoint now and then, and looks at the process meanwhile."""
    often = max(2, steps // 40)
    options: dict[str, object] = {"save_steps": often, "learning_rate": 1e-5}
    options |= {"epochs": steps // 4} if stage == "sft" else {"steps": steps, "eval_steps": often}
    out = directory / "out"
    running = Child(world.action(stage, world.stage(stage, **options), out), directory / "log")
    seen: list[tuple[float, int, int]] = []
    threads: set[str] = set()
    while not running.ended(_EVERY):
        if (out / "metrics.jsonl").exists() and (found := look(running.pid)):
            seen.append(found)
            threads |= names_of_threads(running.pid)
    ended = running.wait()
    expect(ended.code == 0, f"expected the run to finish, got exit code {ended.code}: {ended.last}")
    rows = [row["time/step"] for row in read_metrics(out / "metrics.jsonl") if "time/step" in row]
    try:
        judge(seen, rows)
    except Lost as lost:
        raise Lost(f"{lost}; threads: {', '.join(sorted(threads))}") from lost


def judge(seen: list[tuple[float, int, int]], steps: list[float]) -> None:
    """Raises Lost where what was seen grows from the second third of the run to its last third."""
    third = len(seen) // 3
    expect(third >= 2, f"expected a longer run, looked {len(seen)} times only")
    early, late = seen[third : 2 * third], seen[2 * third :]
    # Files and threads by the fewest, because a thread that has been joined is still counted for a moment.
    looks = (("MiB of resident memory", 0, max, RSS), ("open files", 1, min, 0), ("threads", 2, min, 0))
    for name, place, of, allowed in looks:
        before, after = of(one[place] for one in early), of(one[place] for one in late)
        expect(after - before <= allowed, f"{name} grew from {before:.1f} to {after:.1f}")
    third = len(steps) // 3
    before, after = statistics.median(steps[third : 2 * third]), statistics.median(steps[2 * third :])
    expect(after <= TIME * before + 1e-3, f"seconds of a step grew from {before:.4f} to {after:.4f}")


def look(pid: int) -> tuple[float, int, int] | None:
    """MiB of resident memory, open files and threads of a process, or None where it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])
    except (OSError, KeyError):
        return None


def names_of_threads(pid: int) -> set[str]:
    """What the threads of a process call themselves."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            found.add(path.read_text().strip())
    return found


KIND = Kind("a long run: memory, files, threads and step time do not grow", tuple(STEPS), ("remax",), cases)
