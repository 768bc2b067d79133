"""Settings, data, models and rewards change between two runs in one directory: the second is made anew or refused.

`finished` changes one thing after a finished run; `cut` starts the changed run, kills it, and resumes it. Exit code 0
must leave what the changed run leaves in an empty directory.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import yaml

from bench.trust import child, mutations
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.world import STAGE_TARGETS, World

Change = Callable[[World, str], list[str]]  # changes a world's files for a target, or returns further flags


def cases(world: World, target: str) -> Iterator[Case]:
    """Every change that the target knows, after a finished run, within one, and after a killed one."""
    for change in CHANGES:
        if change in _only_for and target not in _only_for[change]:
            continue
        for way in ("finished", "interrupted", "cut"):
            yield Case(
                f"{target}/{change}, {way}",
                lambda directory, rng, change=change, way=way: changed(world, target, directory, rng, change, way),
            )


def changed(world: World, target: str, directory: Path, rng: Random, change: str, way: str) -> None:
    """Runs, changes, runs again; compares with the changed run in an empty directory."""
    place = directory / "world"
    own = _copy_of(world, place)
    out, fresh = directory / "out", directory / "fresh"
    first = own.start(target, out)
    if way == "interrupted":
        begin = mutations.crash(out, directory / "ledger", rng.randint(20, world.baseline(target).mutations - 2))
        child.run(lambda: (begin(), first())[1], directory / "log0")
    else:
        ended = child.run(first, directory / "log0")
        expect(ended.code == 0, f"the first run ended with exit code {ended.code}: {ended.last}")
    flags = CHANGES[change](own, target)
    if way == "cut":
        begin = mutations.crash(out, directory / "ledger1", rng.randint(1, world.baseline(target).mutations))
        run = own.start(target, out, *flags)
        child.run(lambda: (begin(), run())[1], directory / "log1")
    ended = child.run(own.start(target, out, *flags, resume=True), directory / "log2")
    expect(ended.code >= 0, f"expected results or a refusal, got death by signal {-ended.code}: {ended.last}")
    if ended.code:
        clear = "Traceback" not in ended.output and ended.last.startswith("rlhf-fast: ")
        expect(clear, f"expected one line, got exit code {ended.code}: {ended.output[-300:]!r}")
        return
    ended = child.run(own.start(target, fresh, *flags), directory / "log3")
    expect(ended.code == 0, f"the changed run ended with exit code {ended.code} in an empty directory: {ended.last}")
    for cell in set(path.name for path in out.glob("*-seed*")) - set(os.listdir(fresh)):
        shutil.rmtree(out / cell)  # a finished run of a comparison of other seeds, which stays
    try:
        own.must_equal(out, fresh)
    except Lost as lost:
        raise Lost(f"{change}: exit code 0, but not the results of an empty directory: {lost}") from lost


def _copy_of(world: World, place: Path) -> World:
    """The same world in other files, which may be changed."""
    place.mkdir()
    for path in world.root.iterdir():
        if path.name != "baselines":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, place / path.name)
    own = World.__new__(World)
    own.root, own._baselines = place, {}
    (place / "pipeline.yaml").write_text(yaml.safe_dump(own.pipeline()))
    return own


def _file(name: str) -> Change:
    """The content of a file or of a model's directory becomes another one's."""

    def change(own: World, target: str) -> list[str]:
        source, place = own.root / f"other_{name}", own.root / name
        if source.is_dir():
            shutil.rmtree(place)
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)
        return []

    return change


def _reward(own: World, target: str) -> list[str]:
    file = own.root / "reward.py"
    file.write_text(file.read_text().replace("0.1 *", "0.2 *"))
    return []


def _pipeline(section: str, key: str, value: object) -> Change:
    def change(own: World, target: str) -> list[str]:
        file = own.root / "pipeline.yaml"
        config = yaml.safe_load(file.read_text())
        config[section][key] = value
        file.write_text(yaml.safe_dump(config))
        return []

    return change


CHANGES: dict[str, Change] = {
    "seed": lambda own, target: ["--seeds" if target == "compare" else "--seed", "1"],
    "learning rate": lambda own, target: ["--learning-rate", "0.001"],
    "batch": lambda own, target: ["--batch-size", "8"],
    "steps": lambda own, target: ["--steps", "4" if target == "compare" else "2"],
    "epochs": lambda own, target: ["--epochs", "2"],
    "model path": lambda own, target: ["--model", str(own.root / "other_model")],
    "model": _file("model"),
    "sft rows": _file("sft.jsonl"),
    "pairs": _file("pairs.jsonl"),
    "unpaired rows": _file("unpaired.jsonl"),
    "prompts": _file("prompts.jsonl"),
    "eval rows": _file("eval.jsonl"),
    "reward function": _reward,
    "sft section": _pipeline("sft", "learning_rate", 0.02),
    "pairs section": _pipeline("pairs", "seed", 5),
    "reward section": _pipeline("reward", "epochs", 2),
    "common section": _pipeline("common", "steps", 3),
}
_online = ("ppo", "remax", "reinforce", "rloo", "grpo", "online-dpo")
_many = ("pipeline", "compare")
_only_for: dict[str, tuple[str, ...]] = {
    "learning rate": STAGE_TARGETS,
    "batch": (*STAGE_TARGETS, "compare"),
    "steps": (*_online, "compare"),
    "epochs": ("sft", "reward", "dpo", "kto", "ppo", "grpo"),
    "model path": (*STAGE_TARGETS, *_many),
    "model": (*STAGE_TARGETS, *_many),
    "sft rows": ("sft", "pipeline"),
    "pairs": ("reward", "dpo", "compare"),
    "unpaired rows": ("kto",),
    "prompts": (*_online, *_many),
    "eval rows": (*_online, "pipeline"),
    "reward function": (*_online, *_many),
    **{f"{name} section": ("pipeline",) for name in ("sft", "pairs", "reward", "common")},
}
KIND = Kind(
    "other settings, data, models or rewards in the same directory, with --resume",
    (*STAGE_TARGETS, "pipeline", "compare", "demo"),
    ("sft", "remax", "dpo", "pipeline"),
    cases,
)
