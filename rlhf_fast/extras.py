"""What the stages need beside torch and numpy: the extra `[train]`, named where it is missing.

The operations need torch alone. A loop of another library, whose own pins exclude our transformers, may therefore use
the losses. Every package that needs the extra calls `need_train` in its `__init__`, before a module of it imports
anything, so that the user reads what to install and no ModuleNotFoundError of a package they never named.
"""

from functools import cache
from importlib.util import find_spec

TRAIN = {
    "jinja2": "",
    "jsonargparse": "",
    "matplotlib": "",
    "plotext": "5.3",
    "pyyaml": "",
    "rich": "",
    "safetensors": "",
    "tokenizers": "",
    "torch": "2.11",
    "transformers": "5.17",
}
"""The extra's packages and their lowest versions, as pyproject.toml has them."""

_MODULES = {"pyyaml": "yaml"}  # where the module has another name than its package


class NotInstalled(ImportError):
    """A package of an extra is missing or too old. One sentence says which, and the command that installs it."""


def need_train(user: str) -> None:
    """Raises NotInstalled, an ImportError, unless the extra `[train]` is installed. user: the module that needs it."""
    if lacking := _lacking():
        raise NotInstalled(f"{user} needs {_listed(lacking)}: pip install 'rlhf-fast[train]'")


@cache
def _lacking() -> list[str]:
    """The extra's packages that are missing or too old."""
    missing = [name for name in TRAIN if not _is_there(_MODULES.get(name, name))]
    old = [
        f"{name} >= {lowest} (found {found})"
        for name, lowest in TRAIN.items()
        if lowest and name not in missing and _numbers(found := _version(name)) < _numbers(lowest)
    ]
    return missing + old


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: it is in sys.modules without a spec
        return False


def _version(name: str) -> str:
    """The installed version; of a package without metadata one that is never too old."""
    from importlib.metadata import PackageNotFoundError, version  # loads the modules of e-mail

    try:
        return version(name)
    except PackageNotFoundError:
        return "99999"


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers: (5, 17) of "5.17.0rc1+cpu", because a release of a version starts with its numbers."""
    numbers = []
    for part in text.partition("+")[0].split(".")[:2]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
