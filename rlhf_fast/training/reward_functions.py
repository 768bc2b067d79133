"""Reward functions: finding a function by its name, and calling it with the arguments that it names.

A reward function gets its arguments by keyword, so their order means nothing, and it gets those alone that it names:

    prompts         list[str]: the prompts' text, as the policy reads it
    completions     list[str]: the completions' text, without special tokens
    completion_ids  list[list[int]]: the completions' token ids, special tokens and EOS included
    messages        list: each prompt's messages where prompts are conversations
    any column      list: a further column of the prompts' rows, such as `answer`

With `**columns` it gets all of them. It returns one number for each completion, or None where it does not judge one.
It may be `async`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_fast.ranks import WAIT, current
from rlhf_fast.training.ending import Ended
from rlhf_fast.training.reward_calls import call, described
from rlhf_fast.training.reward_files import load_file, load_module
from rlhf_fast.training.stopped import by_reward

RewardFunction = Callable[..., Any]  # of list[float | None], or of an awaitable of it
RESERVED = ("prompts", "completions", "completion_ids")
"""Arguments of every reward function. No column of the rows may have one of these names."""
_SHOWN = 80  # characters of a wrong score that a message repeats


class FunctionReward:
    """One reward function. spec: the function, or its name as in `load_function`. timeout: seconds a call may take.

    Raises ValueError where the function has an argument that cannot be given by name.
    """

    def __init__(self, spec: str | RewardFunction, timeout: float | None = None) -> None:
        if timeout is not None and current().size > 1 and timeout >= WAIT.total_seconds():
            expected = f"less than the {WAIT.total_seconds():g} seconds that processes wait for each other"
            raise ValueError(f"reward_timeout: expected {expected}, got {timeout:g}")
        self.timeout = timeout
        if callable(spec):
            self.function, self.name = spec, getattr(spec, "__name__", "reward")
        else:
            self.function, self.name = load_function(spec), spec
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # a function of a C extension without a signature
            parameters = [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ValueError(
                    f"reward {self.name}: expected arguments that can be given by name, got {parameter.name!r} before /"
                )
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {p.name for p in named}
        self.required = [p.name for p in named if p.default is p.empty]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def takes(self, name: str) -> bool:
        """Whether the function gets the argument `name` where it is there."""
        return self.takes_all or name in self.names

    def check(self, columns: Iterable[str]) -> None:
        """ValueError unless rows with these columns have every argument of the function, and no reserved name."""
        columns = {*columns} - {"prompt"}
        if taken := sorted(columns & set(RESERVED)):
            raise ValueError(
                f"reward {self.name}: expected no column of the prompts' rows to have the name of an argument of every "
                f"reward function, got {', '.join(taken)}"
            )
        if missing := [name for name in self.required if name not in columns and name not in RESERVED]:
            there = ", ".join([*RESERVED, *sorted(columns)])
            raise ValueError(f"reward {self.name}: expected arguments out of {there}, got {', '.join(missing)}")

    def __call__(self, arguments: Mapping[str, Callable[[], list]], rows: int) -> list[float | None]:
        """The scores of `rows` completions. arguments: name -> a function that makes the list, called where needed.

        Raises Stopped for an exception of the function and for all else that `call` tells of it, and ValueError for
        scores of another kind or number.
        """
        given = {name: make() for name, make in arguments.items() if self.takes(name)}
        with by_reward():
            return self._scores(given, rows)

    def _scores(self, given: Mapping[str, list], rows: int) -> list[float | None]:
        scores = call(self.name, self.function, given, self.timeout, at_most=rows + 1)
        if not _is_list(scores):
            raise ValueError(f"reward {self.name}: expected {rows} scores, got {_shown(scores)}")
        scores = list(scores)
        if len(scores) != rows:
            more = "more" if len(scores) == rows + 1 else len(scores)  # a generator is not read further
            raise ValueError(f"reward {self.name}: expected {rows} scores, got {more}")
        return [None if score is None else finite(score, self.name, row) for row, score in enumerate(scores)]


def finite(score: Any, name: str, row: int) -> float:
    """The score as a number. Raises ValueError where fp32 does not hold it, such as NaN, 1e39 or a string."""
    text = isinstance(score, str | bytes | bytearray | memoryview)
    text = text or getattr(getattr(score, "dtype", None), "kind", "") in ("S", "U")  # numpy's texts
    try:
        number = math.nan if text else float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch: RuntimeError for several elements
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"reward {name}: expected finite scores, got {_shown(score)} for row {row}")
    with np.errstate(over="ignore"):
        fits = math.isfinite(np.float32(number))
    if not fits:
        raise ValueError(f"reward {name}: expected scores that float32 holds, got {_shown(score)} for row {row}")
    return number


def _is_list(scores: Any) -> bool:
    """Whether scores come in the order of the rows: no text, no bytes, no set, and no dict, whose keys would count."""
    if isinstance(scores, str | bytes | bytearray | memoryview | Mapping | Set) or not hasattr(scores, "__iter__"):
        return False
    return getattr(scores, "ndim", 1) > 0


def _shown(value: Any) -> str:
    """The value in a few characters: a number of 400 digits or a long list would fill the screen."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of 5,000 digits, or a class of the user's
        return f"a value of class {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def load_function(spec: str) -> RewardFunction:
    """The function that `package.module:name` or `path/to/file.py:name` names.

    Raises ValueError where there is no such file, module or function, and where the file raises an exception.
    """
    module_name, _, name = spec.rpartition(":")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise ValueError(f"reward: expected `file.py:name` with an existing file, got {spec!r}")
    try:
        module = load_file(Path(module_name)) if module_name.endswith(".py") else load_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward: expected a directory, `package.module:name` or `file.py:name`, got {spec!r}: {error}"
        ) from error
    except Ended:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward: expected {module_name} to load, got {described(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(f"reward: expected a function {name!r} in {module_name}, which defines {names}")
    return function
