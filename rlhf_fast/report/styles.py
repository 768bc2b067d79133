"""The colour and the marker of every method, the same in all figures.

The colour and the marker of a method stand in its row of the table `rlhf_fast.methods`. The colours are Okabe and
Ito's, which colour-blind readers can tell apart; markers differ too. A name without a style is drawn all the same,
because a figure comes after hours of runs, which a missing colour must not lose.
"""

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import NamedTuple

from rlhf_fast.methods import METHODS


class Style(NamedTuple):
    """How a method is drawn, as matplotlib takes it."""

    color: str
    marker: str


STYLES = {method.title: Style(method.color, method.marker) for method in METHODS.values()}
_COLORS = ("#117733", "#AA4499", "#661100", "#6699CC", "#888888", "#DDCC77", "#88CCEE", "#332288")
_MARKERS = ("*", "p", "h", ">", "d", "H", "8", "1")


def styles_of(names: Iterable[str], known: Mapping[str, Style] = STYLES) -> dict[str, Style]:
    """Name -> style, for all names of one figure.

    Names that are not `known` take further colours and markers in turn, in the order of `names`, and leave out those
    of the known names; behind the last one the first follows.
    """
    taken = {part for style in known.values() for part in style}
    colors, markers = ([x for x in further if x not in taken] or further for further in (_COLORS, _MARKERS))
    further = zip(cycle(colors), cycle(markers), strict=True)
    return {name: known[name] if name in known else Style(*next(further)) for name in dict.fromkeys(names)}
