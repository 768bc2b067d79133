"""A profile as trees of events, and what part of a window each group of operations took.

A window is an annotation of the profiled code (`WINDOW`). Every event belongs to one group, with its self time: its
time less the time of the events inside it. The self times of a tree add up to the window, so the groups do too. What no
operation covers, such as Python between two calls, is the window's own self time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW = "bench: window"
MATMUL, ATTENTION, LAYERS = "matmul", "attention", "norms, activations"
HEAD_MATMUL, HEAD = "head: matmul", "head: the rest"
OPTIMIZER, SAMPLING, COPIES, OTHER, PYTHON = "optimizer", "sampling", "copies, casts", "other ops", "Python"
GROUPS = (MATMUL, ATTENTION, LAYERS, HEAD_MATMUL, HEAD, OPTIMIZER, SAMPLING, COPIES, OTHER, PYTHON)
LABELS = {f"bench: {group}": group for group in (ATTENTION, LAYERS, OPTIMIZER, SAMPLING)}

# An operator of one of these names has all that runs inside it.
_OWNERS = {
    "rlhf_fast::packed_attention": ATTENTION,
    "aten::scaled_dot_product_attention": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
    "rlhf_fast::add_rms_norm": LAYERS,
    "rlhf_fast::swiglu": LAYERS,
    "rlhf_fast::linear_": HEAD,
    "rlhf_fast_linear_": HEAD,
    "rlhf_fast::sample_tokens": SAMPLING,
    "Optimizer.step": OPTIMIZER,
}
MATMULS = {  # operator -> where its operands stand among its arguments
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::baddbmm_": (1, 2),
}
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat", "aten::fill_",
           "aten::zero_", "aten::index_select", "aten::repeat", "aten::embedding")  # fmt: skip
_ENGINE = ("autograd::engine::", "ProfilerStep", "bench: ")


@dataclass
class Event:
    """An operator or an annotation. begin, seconds: in seconds. args: as the profiler writes them."""

    name: str
    begin: float
    seconds: float
    args: dict[str, Any] = field(default_factory=dict)
    inside: list["Event"] = field(default_factory=list)


def windows(path: Path) -> list[Event]:
    """The windows of a trace that `torch.profiler.profile` has exported, each with its tree of events."""
    rows = [row for row in json.loads(path.read_text())["traceEvents"] if row.get("ph") == "X"]
    rows = [row for row in rows if row.get("cat") in ("cpu_op", "user_annotation")]
    threads = {row["tid"] for row in rows if row["name"] == WINDOW}
    events = [
        Event(row["name"], row["ts"] / 1e6, row["dur"] / 1e6, row.get("args", {}))
        for row in rows
        if row["tid"] in threads
    ]
    return [event for event in trees(events) if event.name == WINDOW]


def trees(events: list[Event]) -> list[Event]:
    """The outermost of these events, which then hold the others."""
    outermost: list[Event] = []
    stack: list[Event] = []
    for event in sorted(events, key=lambda event: (event.begin, -event.seconds)):
        while stack and event.begin >= stack[-1].begin + stack[-1].seconds:
            stack.pop()
        (stack[-1].inside if stack else outermost).append(event)
        stack.append(event)
    return outermost


def walk(event: Event, owner: str | None = None) -> Iterator[tuple[Event, str]]:
    """Every event of a tree, with its group."""
    group, owner = _group(event, owner)
    yield event, group
    for inner in event.inside:
        yield from walk(inner, owner)


def seconds(window: Event) -> dict[str, float]:
    """Group -> seconds of a window. They add up to the window's seconds."""
    found = dict.fromkeys(GROUPS, 0.0)
    for event, group in walk(window):
        found[group] += event.seconds - sum(inner.seconds for inner in event.inside)
    return found


def named(window: Event, beginning: str) -> float:
    """The seconds of the outermost events of a window whose names begin so."""
    if window.name.startswith(beginning):
        return window.seconds
    return sum(named(inner, beginning) for inner in window.inside)


def _group(event: Event, owner: str | None) -> tuple[str, str | None]:
    """The group of an event, and who owns what is inside it."""
    name = event.name
    if owner in (HEAD, HEAD_MATMUL):
        return (HEAD_MATMUL if is_matmul(event) else owner,) * 2
    if owner is not None:
        return owner, owner
    own = LABELS.get(name) or next((group for start, group in _OWNERS.items() if name.startswith(start)), None)
    if own is None and is_matmul(event):
        own = MATMUL
    if own is not None:
        return own, own
    if name in _COPIES:
        return COPIES, None
    if name.startswith(_ENGINE) or name.endswith(("Backward", "Backward0")):
        return PYTHON, None
    return OTHER, None


def is_matmul(event: Event) -> bool:
    """Whether this is the operator that multiplies: under autocast another operator of its name stands around it."""
    return event.name in MATMULS and not any(is_matmul(inner) for inner in event.inside)
