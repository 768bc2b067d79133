"""Where a model is found: a checkpoint directory, or a name on the hub."""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers import __version__ as VERSION
from transformers.utils import cached_file  # pyright: ignore[reportPrivateImportUsage]

from rlhf_fast.lm.manifest import check
from rlhf_fast.lm.trust import OPTION, trusted

_MAY_LACK = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def existing(path: str | Path, argument: str = "model") -> str:
    """`path` as text. Raises ValueError where it is neither a directory nor a name on the hub, and where a directory
    of ours is incomplete or damaged, its weights aside.

    argument: the name that the message gives `path`. A path that is plainly local is not looked for on the hub, because
    the hub takes minutes to fail.
    """
    text = str(path)
    local = isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or os.sep in text[-1:]
    if not Path(text).is_dir():
        expected = f"{argument}: expected a checkpoint directory or a hub name, found no directory {text}"
        if local:
            raise ValueError(expected)
        try:
            config = _on_hub(text)
        except OSError as error:
            raise ValueError(f"{expected} and none of that name on the hub: {error}") from error
    else:
        check(text, argument)
        config = Path(text, "config.json")
    _check_family(config, text, argument)
    return text


def _check_family(config: Path, path: str, argument: str) -> None:
    """ValueError for a family that transformers does not know, unless its own code is there and trusted."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, as beside an adapter, or a broken one, of which transformers tells
        return
    family = values.get("model_type") if isinstance(values, dict) else None
    if family is not None and family not in CONFIG_MAPPING:
        code = "AutoConfig" in (values.get("auto_map") or {})
        if code and trusted():
            return
        own = f", whose code stands beside its weights; {OPTION} runs it" if code else ""
        raise ValueError(f"{argument}: expected a family of transformers {VERSION}, got {family} at {path}{own}")


@functools.cache
def _on_hub(name: str) -> Path:
    return Path(str(cached_file(name, "config.json")))


def commit_of(name: str) -> str | None:
    """The commit of the hub's model `name` in the cache of this machine, or None. Looks for nothing on the hub."""
    try:
        found = cached_file(name, "config.json", local_files_only=True, **_MAY_LACK)
    except (OSError, ValueError):  # no name that the hub could have
        return None
    return Path(found).parent.name if found is not None else None


def beside(path: str, names: Iterable[str]) -> dict[str, bytes]:
    """Those files of a checkpoint that are there, by their names."""
    found = {}
    for name in names:
        file = Path(path, name)
        if not Path(path).is_dir():
            cached = cached_file(path, name, **_MAY_LACK)
            file = Path(cached) if cached is not None else file
        if file.is_file():
            found[name] = file.read_bytes()
    return found
