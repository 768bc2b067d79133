"""Atomic checkpoint directories in the Hugging Face layout, and the state needed to continue a run.

A checkpoint is written to a hidden sibling directory and renamed into place when it is complete. An old checkpoint in
this place is renamed away first and deleted last. A crash at any moment leaves either the old checkpoint or the new.
`data.files` says what becomes of the hidden names.
A directory that has to stay (an output directory with its metrics, an empty directory, a mounted volume) keeps its
place and its other files. The checkpoint is then written to a hidden directory inside, so that both are on the same
file system, and its entries are renamed into place one by one. A crash between two of these renames leaves a checkpoint
that is marked as incomplete, which no reader takes. run.json, which says that a run has finished, is renamed last.

    <directory>/model.safetensors, config.json, tokenizer files   the model saved under ""; other models have
                                     sub-directories; a model with an adapter has adapter_model.safetensors and
                                     adapter_config.json
    <directory>/state.pt             optimizer, scheduler, step ...: tensors and plain values only
    <directory>/state/               the tensors of the optimizer that are in shards (`state_files`); in state.pt stand
                                     tensors without data for them
    <directory>/checkpoint.json      the entries of the checkpoint, and whether it is complete

Where models are in shards, all processes write into the hidden directory. The first process renames it, when all of
them have written.

Left out: fsync (a power failure can lose the newest checkpoint).
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.data.damage import sentence, writing
from rlhf_fast.data.files import DELETING, OURS, REPLACED, WRITING, beside, remove
from rlhf_fast.lm import manifest, state_files
from rlhf_fast.lm.finite import not_finite
from rlhf_fast.lm.loading import PROCESSOR_FILES
from rlhf_fast.lm.manifest import Manifest
from rlhf_fast.lm.private import has_adapter
from rlhf_fast.lm.quiet import without_bars
from rlhf_fast.lm.saving import save_model
from rlhf_fast.lm.sharding import is_saved_from_parts
from rlhf_fast.ranks import Ranks, current
from rlhf_fast.training.lock import held
from rlhf_fast.training.stopped import Diverged

FINISHED = "run.json"  # in the directory of a run that has finished
_PARTS = "state"  # the directory of the optimizer's tensors in shards
_SAID = 240  # characters of transformers' reason that a message repeats
_INSIDE = f"{WRITING}inside"  # where a checkpoint is put together in a directory that stays
_UNSAVED = f"{OURS}unsaved"  # what could not be saved without overwriting somebody's files
MODEL_FILES = frozenset(  # the files that `save` writes for most models and tokenizers
    {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *PROCESSOR_FILES,
    }
)


def save(
    directory: str | os.PathLike,
    *,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None = None,
    state: dict[str, Any] | None = None,
    extra_files: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint to `directory`, in place of an older checkpoint there, and returns its path.

    models: sub-directory -> model, "" for the directory itself; saved as safetensors with their config.
    state: nested dicts and lists of tensors and plain values; `load_state` reads it back.
    extra_files: file name -> anything that JSON can hold.
    Where a model or a tensor of `state` is in shards, all processes call it, and an error in one is raised in all.
    Raises Diverged where a weight is NaN or infinite, before anything is written. Raises OSError, naming `directory`,
    on a full disk; what was there before stays. Raises ValueError where a file that no `save` wrote would be
    overwritten. The new files are then kept elsewhere in `directory`, and the error says where.
    """
    plain, parts = state_files.split(state)
    together = bool(parts) or any(map(is_saved_from_parts, models.values()))
    ranks = current() if together else Ranks()
    for subdirectory, model in models.items():
        if name := next(filter(None, ranks.gather(not_finite(model, trained=has_adapter(model)))), None):
            whose = f" of the {subdirectory} model" if subdirectory else ""
            raise Diverged(f"{name}{whose} is not finite, so that it was not written to {directory}")
    directory, new = ranks.first_does(lambda: _room_for(Path(directory)))

    def write_rest() -> set[str]:
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if state is not None:
            torch.save(plain, new / "state.pt")
        for name, content in (extra_files or {}).items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
        entries = set(os.listdir(new))
        manifest.write(new, manifest.of_files(new))
        return entries

    try:
        with writing(directory), without_bars():
            ranks.first_does(lambda: new.mkdir(parents=True))
            for subdirectory, model in models.items():
                if ranks.first or is_saved_from_parts(model):
                    save_model(model, new / subdirectory)
            if parts:
                _check_seen(ranks, new)
                state_files.write(parts, new / _PARTS)
            entries = ranks.first_does(write_rest)
    except OSError:
        if ranks.first:
            with suppress(OSError):
                remove(new)  # what was written of it would keep the disk full
        raise
    ranks.first_does(lambda: _put_in_place(new, directory, entries))
    return directory


def _room_for(directory: Path) -> tuple[Path, Path]:
    """The checkpoint's directory as it is really called, and the hidden directory to write to."""
    if _step_of(directory) is not None and os.path.islink(directory):
        os.unlink(directory)  # a checkpoint that somebody keeps elsewhere stays as it is
    directory = directory.resolve()
    outside, old = beside(directory, WRITING), beside(directory, REPLACED)
    if old.exists() and not directory.exists():  # an earlier save died between its two renames
        os.replace(old, directory)
    for leftover in (outside, directory / _INSIDE, old):
        remove(leftover)
    return directory, directory / _INSIDE if _stays(directory) else outside


def _check_seen(ranks: Ranks, new: Path) -> None:
    """OSError unless every process sees the directory that the first process has made."""
    os.listdir(new.parent)  # so that a network file system looks again
    if blind := [rank for rank, seen in enumerate(ranks.gather(new.is_dir())) if not seen]:
        raise OSError(
            f"output_dir: expected a file system that all processes share, as each writes its part of the optimizer's "
            f"state, but process {blind[0] + 1} does not see {new}"
        )


def _put_in_place(new: Path, directory: Path, entries: set[str]) -> None:
    if clash := sorted(entries & foreign(directory)):
        found, kept = f"{directory} holds files that no checkpoint put there: {', '.join(clash)}", directory / _UNSAVED
        remove(kept)
        os.replace(new, kept)
        raise ValueError(f"directory: {found}; what was to be saved is in {kept}")
    if new.parent == directory:
        _merge(new, directory, entries)
        return
    old = beside(directory, REPLACED)
    if directory.exists():
        os.replace(directory, old)
    os.replace(new, directory)
    remove(old)


def check_savable(models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError unless configs, generation configs and tokenizer can be saved, so that no training is lost at its end.

    transformers loads some that it refuses to save, such as a generation config with a temperature and without
    sampling. Only the configs and the tokenizer are written, to a temporary directory.
    """
    parts: list[tuple[str, str, Any]] = [("tokenizer", "its files", tokenizer)]
    for model in models:
        if not has_adapter(model):  # an adapter is saved without the config of its base
            parts.append(("config", "config.json", model.config))
            if model.can_generate() and model.generation_config is not None:
                parts.append(("generation config", "generation_config.json", model.generation_config))
    for name, file, part in parts:
        with tempfile.TemporaryDirectory() as directory:
            try:
                with writing(directory):
                    part.save_pretrained(directory)
            except Exception as error:
                if isinstance(error, OSError) and error.errno:  # a full disk says nothing of the model
                    raise
                said = " ".join(str(error).split())
                said = said if len(said) <= _SAID else f"{said[:_SAID]}..."
                raise ValueError(f"model: expected a {name} that can be saved, mend {file}: {said}") from error


def foreign(directory: str | os.PathLike) -> set[str]:
    """The names in `directory` that no `save` put there and none may overwrite."""
    directory = Path(directory)
    ours = {*_entries(directory), manifest.NAME}
    return {name for name in os.listdir(directory) if not name.startswith(OURS)} - ours if directory.is_dir() else set()


def _stays(directory: Path) -> bool:
    """Whether `directory` is there, and cannot be renamed away as a whole or must not be."""
    if not directory.is_dir():
        return False
    replaceable = _entries(directory) and not foreign(directory) and not directory.is_mount()
    return not (replaceable and os.access(directory.parent, os.W_OK))


def _merge(new: Path, directory: Path, entries: set[str]) -> None:
    """Moves a complete checkpoint into a directory with other files, and deletes the old checkpoint's entries."""
    previous = _entries(directory)
    if FINISHED in previous:
        (directory / FINISHED).unlink(missing_ok=True)
    manifest.write(directory, Manifest(sorted(entries | previous), complete=False))
    for name in sorted((previous | entries) - {FINISHED}):
        target = directory / name
        if target.is_dir() or name not in entries:
            remove(target)
        if name in entries:
            os.replace(new / name, target)
    remove(directory / _UNSAVED)
    os.replace(new / manifest.NAME, directory / manifest.NAME)
    if FINISHED in entries:
        os.replace(new / FINISHED, directory / FINISHED)
    new.rmdir()


def _entries(directory: Path) -> set[str]:
    try:
        found = manifest.read(directory)
    except ValueError:
        if _step_of(directory) is None:
            raise
        return set(os.listdir(directory))  # a checkpoint-<step> whose checkpoint.json is damaged
    return set(found.entries) if found is not None else set()


def finished(output_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The run.json of the run that has finished in `output_dir`, or None; {} where it is damaged.

    A crash in the final save leaves none.
    """
    path = Path(output_dir, FINISHED)
    found = manifest.read(output_dir)
    if not path.is_file() or (found is not None and not found.complete):
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def load_state(directory: str | os.PathLike) -> dict[str, Any]:
    """The `state` that `save` wrote, on the CPU. Never unpickles code (weights_only).

    Tensors that were in shards have no data, as in `state_files`.

    Raises ValueError where `directory` holds no state.
    """
    path = Path(directory) / "state.pt"
    if not path.is_file():
        raise ValueError(f"directory: expected a checkpoint with a training state, found no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: RuntimeError, EOFError, UnpicklingError, KeyError
        raise ValueError(f"{path}: expected a training state, but the file is damaged: {sentence(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a training state, got {type(state).__name__}")
    state_files.place(state, Path(directory) / _PARTS)
    return state


def latest(output_dir: str | os.PathLike) -> Path | None:
    """The complete output_dir/checkpoint-<step> with the largest step, or None. Its files are not looked at."""
    checkpoints = _checkpoints(Path(output_dir))
    return checkpoints[-1] if checkpoints else None


def newest_whole(output_dir: str | os.PathLike) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were saved, or None; and what is wrong with each newer checkpoint.

    Raises ValueError where there are checkpoints, and all of them are damaged.
    """
    passed: list[str] = []
    for path in reversed(_checkpoints(Path(output_dir))):
        if (wrong := manifest.damage(path)) is None:
            return path, passed
        passed.append(f"{path}: {wrong}")
    if passed:
        raise ValueError(f"resume: expected a checkpoint that is not damaged, got {'; '.join(passed)}")
    return None, passed


def prune(
    output_dir: str | os.PathLike, keep: int, *, every: int = 1, last: int | None = None, after: int | None = None
) -> None:
    """Deletes every output_dir/checkpoint-<step> but the `keep` newest. Raises ValueError for keep < 1.

    every: steps between the checkpoints of a run that nothing disturbs, 0 for none; last: the run's last step, of which
        it has none. A checkpoint of another step, which a signal or an error has left, is kept only while it is the
        newest, and does not count.
    after: the last step of the run so far. Checkpoints of later steps are deleted: they were damaged, so that the run
        went on from an earlier checkpoint.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    steps = [step for step in _steps(output_dir) if after is None or step <= after]
    _keep_only(output_dir, {*_regular(steps, every, last)[-keep:], *steps[-1:]})


def tidy(output_dir: str | os.PathLike) -> None:
    """Deletes the checkpoints of a finished run that the run does not leave when nothing disturbs it: that of its last
    step, and those that a signal, an error or a crash has left."""
    record = finished(output_dir) or {}
    if not {"config", "steps"} <= record.keys() or not {"save_steps", "save_total_limit"} <= record["config"].keys():
        return  # not a stage's
    config = record["config"]
    regular = _regular(_steps(output_dir), config["save_steps"], record["steps"])
    _keep_only(output_dir, {*regular[-config["save_total_limit"] :]})


def clean_up(directory: Path) -> None:
    """Deletes what a crash left in a directory that a run has finished in, where there is one."""
    if directory.is_dir():
        with held(directory):
            tidy(directory)


def _steps(output_dir: str | os.PathLike) -> list[int]:
    return [_step_of(path) or 0 for path in _checkpoints(Path(output_dir))]


def _regular(steps: list[int], every: int, last: int | None) -> list[int]:
    return [step for step in steps if every and step % every == 0 and (last is None or step < last)]


def _keep_only(output_dir: str | os.PathLike, steps: set[int]) -> None:
    for path in _checkpoints(Path(output_dir)):
        if _step_of(path) not in steps:
            delete(path)


def check_no_unfinished(output_dir: str | os.PathLike) -> None:
    """ValueError where `output_dir` has the checkpoint of a run that has not finished."""
    left = latest(output_dir)
    if left is not None and not Path(output_dir, FINISHED).exists():
        raise ValueError(
            f"output_dir: expected no unfinished run, found {left}; continue it with resume or name another one"
        )


def clear(output_dir: str | os.PathLike) -> None:
    """Deletes every output_dir/checkpoint-<step>."""
    for path in _checkpoints(Path(output_dir)):
        delete(path)


def delete(path: Path) -> None:
    """Deletes one output_dir/checkpoint-<step>, if it is there. Of a link only the link is deleted."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        doomed = beside(path, DELETING)
        remove(doomed)
        os.replace(path, doomed)  # renamed first, so that nothing half-deleted is taken for a checkpoint
        remove(doomed)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Those that are complete, or whose checkpoint.json is damaged, by their steps."""
    steps = {}
    for path in output_dir.glob("checkpoint-*"):
        if (step := _step_of(path)) is not None:
            try:
                found = manifest.read(path)
            except ValueError:
                steps[step] = path
            else:
                if found is not None and found.complete:
                    steps[step] = path
    return [steps[step] for step in sorted(steps)]


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None
