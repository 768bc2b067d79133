"""Whether the code that stands beside a model's weights may run.

A model of a family that transformers does not know brings Python files of its own. They run where the config says
`trust_remote_code`, and nowhere else. Nothing asks at the terminal, because every call of transformers is told yes or
no: `trust_remote_code=trusted()`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

OPTION = "--trust-remote-code"
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)  # of a thread
Function = TypeVar("Function", bound=Callable[..., Any])


def trusted() -> bool:
    """Whether the code beside a model may run."""
    return _trusted.get()


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Inside, in this thread, the code beside a model may run where `trust`."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def trusts_as_asked(function: Function) -> Function:
    """Decorates a function of a config: inside, the code beside a model may run where config.trust_remote_code."""

    @functools.wraps(function)
    def trusting_function(config: Any, *arguments: Any, **options: Any) -> Any:
        with trusting(config.trust_remote_code):
            return function(config, *arguments, **options)

    return cast(Function, trusting_function)


def own_class(config: PreTrainedConfig, kind: str) -> type[PreTrainedModel] | None:
    """The class that the code beside a model has for `kind`, such as AutoModelForCausalLM; None without trust or code.

    The class is saved with its code.
    """
    reference = (getattr(config, "auto_map", None) or {}).get(kind)
    if reference is None or not trusted():
        return None
    found: Any = get_class_from_dynamic_module(reference, config.name_or_path)
    found.register_for_auto_class(kind)
    return found
