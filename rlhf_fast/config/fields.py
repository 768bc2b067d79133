"""Fields of the config dataclasses: how they are declared and bounded, how they are checked, how JSON describes them.

A field says everything about itself in one place: type, default, help and bounds.

    batch_size: int = arg(16, "Rows per optimizer step.", at_least=1)
    top_p: float = arg(1.0, "Draw from the likeliest tokens that hold this probability.", above=0, at_most=1)

`check_fields` then refuses 0 with "batch_size: expected an integer >= 1, got 0", and `--help` shows the bound.
"""

import copy
import dataclasses
import math
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {bool: "true or false", int: "an integer", float: "a number"}
_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}
_OUR_OPTIONS = {"conversation", "messages", "chat_template", "tokenize", "return_dict", "return_tensors"}
_OUR_OPTIONS |= {"add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"}
_LARGEST_SEED = 2**63 - 1  # torch's generators take 64 bits with a sign


def arg(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> Any:
    """A field with a default. help: the text of its flag in --help. Only numbers have bounds; None is always allowed.

    infinite: whether infinity is a value of its own, such as a clip that never clips.
    A default that is a list or a dict is copied for every config, so that no two configs share it.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help} | {name: bound for name, bound in bounds.items() if bound is not None}
    metadata |= {"infinite": True} if infinite else {}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A field that has to be given."""
    return dataclasses.field(metadata={"help": help})


def random_seed(help: str) -> Any:
    """A field for the seed of a random generator, 0 by default."""
    return arg(0, help, at_least=0, at_most=_LARGEST_SEED)


def temperature(help: str) -> Any:
    """A field for a temperature, 1 by default, which float32 can multiply by and divide by."""
    return arg(1.0, help, at_least=1e-30, at_most=1e30)


def check(config: Any, name: str, holds: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError naming the field unless its value is None or `holds`: for what no bound can express."""
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def expand_home(config: Any) -> None:
    """Writes the home directory in place of a `~` that a text, a path or a text of a list begins with."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # A list of anything else is rows in memory.
        names = value if isinstance(value, list) and all(isinstance(item, str | Path) for item in value) else None
        expanded = _expanded(value) if names is None else [_expanded(name) for name in names]
        if expanded is not value and expanded != value:
            object.__setattr__(config, field.name, expanded)


def _expanded(value: Any) -> Any:
    begins = isinstance(value, str | Path) and re.match(r"~[\w.-]*(/|$)", str(value))
    return type(value)(os.path.expanduser(value)) if begins else value


def check_fields(config: Any) -> None:
    """Raises ValueError, naming the field, for an unknown choice, for a wrong type and for a number out of its bounds.

    Expands `~` first.
    Text is not looked at: in Python a path may be a `Path`, data may be rows, and a reward a function.
    """
    expand_home(config)
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, hint, value = field.name, hints[field.name], getattr(config, field.name)
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in options:
            continue
        if get_origin(options[0]) is Literal:
            choices = get_args(options[0])
            several = value if list[options[0]] in options and isinstance(value, list) else None
            for one in [value] if several is None else several:
                if one not in choices:
                    raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {one!r}")
            if several is not None and (not several or len({*several}) != len(several)):
                raise ValueError(f"{name}: expected one name, or several different names, got {value}")
        elif options[0] in _PLAIN and not _is_a(options[0], value):
            raise ValueError(f"{name}: expected {_PLAIN[options[0]]}, got {value!r}")
        elif not all(holds(value, field.metadata[bound]) for bound, holds in _HOLDS.items() if bound in field.metadata):
            raise ValueError(f"{name}: expected {_PLAIN[options[0]]} {bounds_of(field, options[0])}, got {value!r}")
        elif isinstance(value, float) and math.isnan(value):  # no bound has refused it, as the field has none
            raise ValueError(f"{name}: expected a number, got nan")
        elif options[0] is float and value is not None and not (_is_finite(value) or field.metadata.get("infinite")):
            raise ValueError(f"{name}: expected a finite number, got {value if isinstance(value, float) else 'more'}")


def check_row_options(config: Any) -> None:
    """Raises ValueError unless `columns` and `chat_template_kwargs` of a config that reads rows can be used."""
    check(
        config,
        "columns",
        lambda v: isinstance(v, dict) and all(isinstance(name, str) for pair in v.items() for name in pair),
        "names of our columns with names in the data",
    )
    check(config, "chat_template_kwargs", lambda v: isinstance(v, dict), "named options")
    if ours := sorted(_OUR_OPTIONS & config.chat_template_kwargs.keys()):
        raise ValueError(f"chat_template_kwargs: expected options of the template, got {ours[0]}, which the stage sets")


def check_reward_weights(config: Any) -> None:
    """Raises ValueError unless there is a reward, and `reward_weights` has one finite number for each reward."""
    rewards, weights = config.reward, config.reward_weights
    rewards = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    check(config, "reward", lambda _: bool(rewards), "at least one")
    if weights is None:
        return
    if len(weights) != len(rewards) or not all(_is_a(float, w) and math.isfinite(w) for w in weights):
        raise ValueError(f"reward_weights: expected a finite number for each of {len(rewards)} rewards, got {weights}")


def bounds_of(field: dataclasses.Field, kind: type) -> str:
    """The field's bounds as messages and `--help` say them: ">= 1", "> 0", "in (0, 1]", "from 0 to 2^63 - 1", or ""."""
    at_least, above, at_most, below = (field.metadata.get(bound) for bound in _HOLDS)
    low, high = (at_least, at_most) if kind is int else (None, None)
    if low is not None and high is not None:
        return f"from {low} to {'2^63 - 1' if high == _LARGEST_SEED else high}"
    one_side = {">=": at_least, ">": above, "<=": at_most, "<": below}
    given = [f"{sign} {bound:g}" for sign, bound in one_side.items() if bound is not None]
    if len(given) < 2:
        return "".join(given)
    left = f"({above:g}" if at_least is None else f"[{at_least:g}"
    right = f"{below:g})" if at_most is None else f"{at_most:g}]"
    return f"in {left}, {right}"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of 400 digits
        return False


def _is_a(kind: type, value: Any) -> bool:
    """An integer is a number too, but true is neither."""
    return isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def describe(config: Any) -> dict[str, Any]:
    """The fields as JSON holds them: a path as text, a function by its name, data in memory by its number of rows."""
    return {field.name: _described(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _described(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | dict):
        return value
    if isinstance(value, list | tuple) and not any(isinstance(item, dict) for item in value):  # names or numbers
        return [_described(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}:{named.__qualname__}"
    return f"<{len(value)} rows>" if hasattr(value, "__len__") else f"<{type(value).__name__}>"
