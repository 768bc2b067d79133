"""A stage of a pipeline is run, continued, or left as it is where it was made with just what it would be made with now.

`training.made` says what that is. A stage that was made with something else is made anew, and a line says why. The
stages that start from it are then made anew too, because they would start from another model.
"""

import dataclasses
from pathlib import Path

from rlhf_fast.config import PairsConfig, StageConfig
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_json
from rlhf_fast.lm import manifest
from rlhf_fast.methods import STAGES, load
from rlhf_fast.ranks import current
from rlhf_fast.training import checkpoint
from rlhf_fast.training.fingerprint import fingerprint
from rlhf_fast.training.lock import held
from rlhf_fast.training.made import difference, made_with
from rlhf_fast.training.resume import resume_directory


def make_stage(name: str, config: StageConfig) -> None:
    """Runs a stage. With `config.resume` a finished stage is left as it is, unless it was made with something else."""
    with held(config.output_dir):  # from the first look on
        if config.resume:
            finished, changed = current().gather(_found(config))[0]  # the first process alone changes what is there
            if finished and changed is None:
                if current().first:
                    checkpoint.tidy(config.output_dir)  # a crash may have left more
                return
            if changed is not None:
                if current().first:
                    print(f"{name}: made anew, because {changed}", flush=True)
                    checkpoint.clear(config.output_dir)
                config = dataclasses.replace(config, resume=False)
        load(STAGES[name].train)(config)


def _found(config: StageConfig) -> tuple[bool, str | None]:
    """Whether a stage has finished, and why what is there cannot be used."""
    if (record := checkpoint.finished(config.output_dir)) is None:
        return False, not_resumable(config)
    return True, manifest.damage(config.output_dir) or difference(record, made_with(config))


def make_pairs(config: PairsConfig, note: Path, *, resume: bool) -> None:
    """Samples pairs. note: the file that says what they were made with; it is written when the pairs are whole.

    With `resume` pairs that are there are left as they are, unless they were made with something else.
    """
    if resume:
        finished, changed = current().gather((note.is_file(), _other_pairs(config, note)))[0]
        if finished and changed is None:
            return
        if finished and current().first:
            print(f"pairs: made anew, because {changed}", flush=True)
    if current().first:
        note.unlink(missing_ok=True)
    load("stages.pairs:sample")(config)
    if current().first:
        write_json(note, {**made_with(config), "pairs": _pairs_of(config)})


def _other_pairs(config: PairsConfig, note: Path) -> str | None:
    if not note.is_file():
        return None
    record = read_json(note)
    changed = difference(record, made_with(config))
    return changed or (None if record["pairs"] == _pairs_of(config) else "other files are in the place of the pairs")


def _pairs_of(config: PairsConfig) -> dict[str, str | None]:
    return {name: fingerprint(file) for name in ("output", "eval_output") if (file := getattr(config, name))}


def not_resumable(config: StageConfig) -> str | None:
    """Why an interrupted stage cannot go on with this config, or None; also where nothing was interrupted."""
    try:
        resume_directory(config)
    except ValueError as error:
        return str(error)
    return None
