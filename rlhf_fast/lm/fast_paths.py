"""Says once that a fast path is not taken for a model, and why, because otherwise only the speed would show it."""

import warnings

from torch import nn

_said: set[tuple[str, str, str]] = set()


def not_taken(path: str, model: nn.Module, reason: str, instead: str) -> None:
    """Warns once per path, class of model and reason. Users of the library and of the command line see the warning.

    path: the path with its verb, such as "packed passes are". instead: what happens, such as "rows are padded instead".
    """
    name = type(model).__name__
    if (path, name, reason) not in _said:
        _said.add((path, name, reason))
        warnings.warn(f"rlhf_fast: {path} not used for {name}: {reason} ({instead})", stacklevel=3)
