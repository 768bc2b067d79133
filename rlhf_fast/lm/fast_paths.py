"""Says once that a fast path is not taken for a model, and why. Nothing else than the speed would show it."""

import warnings

from torch import nn

_said: set[tuple[str, str, str]] = set()


def not_taken(path: str, model: nn.Module, reason: str, instead: str) -> None:
    """A warning, once per path, class of model and reason: users of the library and of the command line both see it.

    path: with its verb, "packed passes are".
    """
    name = type(model).__name__
    if (path, name, reason) not in _said:
        _said.add((path, name, reason))
        warnings.warn(f"rlhf_fast: {path} not used for {name}: {reason} ({instead})", stacklevel=3)
