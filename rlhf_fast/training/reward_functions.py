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

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_fast.training.stopped import Stopped

RewardFunction = Callable[..., Any]  # of list[float | None], or of an awaitable of it
RESERVED = ("prompts", "completions", "completion_ids")
"""Arguments of every reward function. No column of the rows may have one of these names."""


class FunctionReward:
    """One reward function. spec: the function, or its name as in `load_function`.

    Raises ValueError where the function has an argument that cannot be given by name.
    """

    def __init__(self, spec: str | RewardFunction) -> None:
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

        Raises Stopped for an exception of the function and ValueError for scores of another kind or number.
        """
        given = {name: make() for name, make in arguments.items() if self.takes(name)}
        try:
            scores = self.function(**given)
            if inspect.isawaitable(scores):
                scores = _wait_for(scores)
        except Exception as error:
            raise Stopped(f"reward {self.name}: {_sentence(error, self.function)}") from error
        if isinstance(scores, str) or not hasattr(scores, "__iter__"):
            raise ValueError(f"reward {self.name}: expected {rows} scores, got {scores!r}")
        scores = list(scores)
        if len(scores) != rows:
            raise ValueError(f"reward {self.name}: expected {rows} scores, got {len(scores)}")
        return [None if score is None else finite(score, self.name, row) for row, score in enumerate(scores)]


def finite(score: Any, name: str, row: int) -> float:
    """The score as a number. Raises ValueError where fp32 does not hold it, such as NaN, 1e39 or a string."""
    try:
        number = math.nan if isinstance(score, str | bytes) else float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch: RuntimeError for several elements
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"reward {name}: expected finite scores, got {score!r} for row {row}")
    with np.errstate(over="ignore"):
        fits = math.isfinite(np.float32(number))
    if not fits:
        raise ValueError(f"reward {name}: expected scores that float32 holds, got {score!r} for row {row}")
    return number


def load_function(spec: str) -> RewardFunction:
    """The function that `package.module:name` or `path/to/file.py:name` names.

    Raises ValueError where there is no such file, module or function, and where the file raises an exception.
    """
    module_name, _, name = spec.rpartition(":")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise ValueError(f"reward: expected `file.py:name` with an existing file, got {spec!r}")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward: expected a directory, `package.module:name` or `file.py:name`, got {spec!r}: {error}"
        ) from error
    except Exception as error:
        raise ValueError(f"reward: expected {module_name} to load, got {_sentence(error, None)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(f"reward: expected a function {name!r} in {module_name}, which defines {names}")
    return function


def _wait_for(awaitable: Awaitable[Sequence]) -> Sequence:
    """The result of an `async` function. All calls share one event loop, because clients of servers keep to theirs."""

    async def result() -> Sequence:
        return await awaitable

    future = asyncio.run_coroutine_threadsafe(result(), _event_loop())
    try:
        return future.result()
    except BaseException:  # such as an interruption
        future.cancel()
        raise


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, so that it also runs in a notebook, whose thread has a running loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _sentence(error: Exception, function: RewardFunction | None) -> str:
    """The exception with the line of the user's file that raised it: "KeyError: 'a' (my.py, line 3)"."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    said = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}{': ' * bool(said)}{said} ({Path(frame.filename).name}, line {frame.lineno})"


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"rlhf_fast_reward {path}".replace(".", "_")  # a name that no import statement can hold
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.parent)
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        _make_importable(Path.cwd())  # a console script does not look there
    return importlib.import_module(name)


def _make_importable(folder: Path) -> None:
    """Adds the folder to the end of the path, so that no file beside a reward function hides an installed package."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
