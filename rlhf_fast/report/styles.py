"""The colour and the marker of every method, the same in all figures.

A method's own stand in its row of the table `rlhf_fast.methods`. The colours are Okabe and Ito's, which colour-blind
readers can tell apart; markers differ too. A name without a style is drawn all the same, because a figure stands at the
end of hours of runs, and they must not be lost for want of a colour.
"""

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import NamedTuple

from rlhf_fast.methods import METHODS


class Style(NamedTuple):
    color: str
    marker: str


STYLES = {method.title: Style(method.color, method.marker) for method in METHODS.values()}
_COLORS = ("#56B4E9", "#117733", "#999933", "#AA4499", "#661100", "#6699CC", "#888888", "#DDCC77")
_MARKERS = ("P", "*", "p", "h", "<", ">", "d", "H")


def styles_of(names: Iterable[str], known: Mapping[str, Style] = STYLES) -> dict[str, Style]:
    """Name -> style, for all names of one figure.

    Names that are not `known` take further colours and markers in turn, in the order of `names`, and leave out those
    that another name of the figure has; behind the last one the first follows.
    """
    names = list(dict.fromkeys(names))
    taken = [known[name] for name in names if name in known]
    colors = [color for color in _COLORS if color not in {style.color for style in taken}]
    markers = [marker for marker in _MARKERS if marker not in {style.marker for style in taken}]
    further = zip(cycle(colors or _COLORS), cycle(markers or _MARKERS), strict=True)
    return {name: known[name] if name in known else Style(*next(further)) for name in names}
