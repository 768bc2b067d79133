"""A disk that fills up at rising sizes: one line with a path, then room and --resume give the whole results.

The disk is a small tmpfs where one may be mounted. Elsewhere the audit of `mutations` raises ENOSPC once the directory
holds more bytes than the size.
"""

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from bench.trust import child
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.mutations import Watch
from bench.trust.world import STAGE_TARGETS, World, copy

SIZES = 24  # by target
_LEAST = 8 << 10  # bytes
ROOM = 256 << 20


def cases(world: World, target: str) -> Iterator[Case]:
    """Sizes from 8 KiB to what the whole run takes."""
    whole = _bytes(world.baseline(target).directory) * 3  # a checkpoint stands beside the final model
    for number in range(SIZES):
        size = int(_LEAST * (whole / _LEAST) ** (number / (SIZES - 1))) // 4096 * 4096

        def run(directory: Path, rng: Random, size: int = size) -> None:
            full(world, target, directory, size)

        yield Case(f"{target}/{size >> 10} KiB", run)


def full(world: World, target: str, directory: Path, size: int, mount: bool | None = None) -> None:
    """Runs on a disk of `size` bytes, then with room. mount: whether a tmpfs is used; default: where it is possible."""
    disk = directory / "disk"
    disk.mkdir()
    mounted = can_mount() if mount is None else mount
    out = disk / "out"
    run, resumed = world.start(target, out), world.start(target, out, resume=True)
    if mounted:
        _mount(disk, size)
    try:
        limited = run if mounted else _limited(run, disk, size, directory / "ledger")
        ended = child.run(limited, directory / "log0")
        if ended.code:
            expect(ended.code > 0, f"expected an error, got death by signal {-ended.code}: {ended.last}")
            clear = "Traceback" not in ended.output and ended.last.startswith("rlhf-fast: ")
            expect(clear, f"expected one line about the full disk, got {ended.output[-300:]!r}")
            said = f"expected the line to say that the disk is full, and where, got {ended.last}"
            expect("No space left" in ended.last and str(disk) in ended.last, said)
        if mounted:
            _mount(disk, ROOM, "remount")
        ended = child.run(resumed, directory / "log1")
        expect(ended.code == 0, f"expected the run to finish with room, got exit code {ended.code}: {ended.last}")
        world.must_equal(out, world.baseline(target).directory)
    except Lost:
        if mounted:
            copy(disk, directory / "left")  # for whoever looks at what was lost
        raise
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


_possible: dict[str, bool] = {}


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    if "mount" not in _possible:
        with tempfile.TemporaryDirectory() as directory:
            made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], capture_output=True)
            _possible["mount"] = made.returncode == 0
            if _possible["mount"]:
                subprocess.run(["umount", directory], check=True)
    return _possible["mount"]


def _mount(disk: Path, size: int, *options: str) -> None:
    wanted = ",".join((*options, f"size={size}", "nr_inodes=100000"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", str(disk)], check=True)


def _limited(run: Callable[[], int], disk: Path, size: int, ledger: Path) -> Callable[[], int]:
    """The action where writing fails as on a full disk once `disk` holds `size` bytes."""

    def act(number: int, what: str, path: str, finish: Callable[[], None] | None) -> None:
        if what in ("write", "append", "mkdir", "save") and _bytes(disk) > size:
            if finish is not None:
                finish()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def action() -> int:
        Watch(disk, ledger, act)
        return run()

    return action


def _bytes(directory: Path) -> int:
    """What the files and folders of a directory take, in pages."""
    return sum(4096 + (path.stat().st_size + 4095) // 4096 * 4096 for path in directory.rglob("*") if path.exists())


KIND = Kind(
    "a full disk at rising sizes, then room and --resume",
    ("pairs", *STAGE_TARGETS, "pipeline"),
    ("sft", "ppo", "dpo"),
    cases,
)
