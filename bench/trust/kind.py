"""What a campaign is made of: kinds of tries, cases, and what a lost try says."""

from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bench.trust.world import World


class Lost(Exception):
    """A promise that does not hold. The text says what was expected and what came."""


class Case(NamedTuple):
    """A try that can be repeated: the same name and the same seed do the same.

    run: called with an empty directory and random numbers of its own; it raises Lost, or the try has survived.
    """

    name: str  # target/what, such as sft/17
    run: Callable[[Path, Random], None]


class Kind(NamedTuple):
    """One way to harm a run.

    targets: what is harmed, such as a stage; the cheapest first.
    cases: all cases of a target, in any order. A baseline may be run for them.
    quick: the targets that a quick campaign takes.
    """

    help: str
    targets: tuple[str, ...]
    quick: tuple[str, ...]
    cases: "Callable[[World, str], Iterable[Case]]"


def expect(holds: bool, said: str) -> None:
    """Raises Lost with the text unless it holds."""
    if not holds:
        raise Lost(said)
