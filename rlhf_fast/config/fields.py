"""Fields of the config dataclasses: how they are declared, what their type hints demand, how JSON describes them."""

import dataclasses
import os
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {bool: "true or false", int: "an integer", float: "a number"}


def arg(default: Any, help: str) -> Any:
    """A field with a default; `help` is what its flag says."""
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A field that has to be given."""
    return dataclasses.field(metadata={"help": help})


def check(config: Any, name: str, holds: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError naming the field unless it is absent, None, or `holds`."""
    value = getattr(config, name, None)
    if value is not None and not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_types(config: Any) -> None:
    """Raises ValueError for a choice that there is not, and where a number, or true or false, is something else.

    Text is not looked at: in Python a path may be a `Path`, data may be rows, and a reward a function.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in options:
            continue
        if get_origin(options[0]) is Literal:
            choices = get_args(options[0])
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        elif options[0] in _PLAIN and not _is_a(options[0], value):
            raise ValueError(f"{name}: expected {_PLAIN[options[0]]}, got {value!r}")


def _is_a(kind: type, value: Any) -> bool:
    """An integer is a number too, but true is neither."""
    return isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def describe(config: Any) -> dict[str, Any]:
    """The fields as JSON holds them: a path as text, a function by its name, data in memory by its number of rows."""
    return {field.name: _described(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _described(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}:{named.__qualname__}"
    return f"<{len(value)} rows>" if hasattr(value, "__len__") else f"<{type(value).__name__}>"
