"""Which back end wins, by operator and size: a patch of the dispatch table, rlhf_fast/ops/fastest.py.

A launch of every operator is timed on Triton and on CUDA C++ by turns. Triton is the back end that runs without the
table, so CUDA C++ has to win by `MARGIN` to be in it.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.backends import BACKENDS, TITLES
from bench.device import CPU, CUDA, Contender
from bench.gpu.hour import ROOT
from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work, compiled
from bench.launches import Launch, on_pairs, on_rows, on_tokens
from bench.measure import quantiles, take_turns
from rlhf_fast.data.files import write_text
from rlhf_fast.ops import dispatch

TABLE = "rlhf_fast/ops/fastest.py"
PATCH = "gpu_dispatch.patch"
MARGIN = 1.05
ROUNDS = 15


class Sizes(NamedTuple):
    """Ascending: [N, V] of logits, [B, T] of tokens, B of pairs."""

    rows: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, int], ...]
    pairs: tuple[int, ...]


REAL = Sizes(((32, 151_936), (1024, 151_936), (8192, 151_936)), ((16, 256), (128, 1024), (512, 4096)), (64, 4096))
TOY = Sizes(((2, 301), (3, 601)), ((2, 9), (3, 40)), (2, 4))
OPERATORS = 21  # of `launches`, seven of them on logits


def work(setting: Setting) -> Iterator[Work]:
    """Three times the logits' bytes a launch, in bf16; the host prepares and synchronises each launch."""
    sizes, rounds = setting.pick(REAL, TOY), 2 * (setting.pick(ROUNDS, 1) + 3)
    yield compiled(kernels=setting.pick(OPERATORS + 9, 0))
    for n, vocabulary in sizes.rows:
        yield Work(bytes=7 * rounds * 3 * 2 * n * vocabulary, launches=7 * rounds * 60)
    yield Work(launches=14 * (len(sizes.tokens) + len(sizes.pairs)) * rounds * 60)


def groups(setting: Setting) -> list[Callable[[], list[Launch]]]:
    """What makes the launches of one size; the tensors of one size are gone before those of the next are made."""
    sizes = setting.pick(REAL, TOY)
    on_logits = [partial(on_rows, dispatch.KERNELS["triton"], *rows, torch.bfloat16) for rows in sizes.rows]
    others = [*(partial(on_tokens, *tokens) for tokens in sizes.tokens), *(partial(on_pairs, n) for n in sizes.pairs)]
    return [*on_logits, *others]


def run(setting: Setting, found: Found) -> None:
    """A row per operator, and the patch."""
    device, times = CPU() if setting.dry else CUDA(), {}
    for make in groups(setting):
        with BACKENDS["triton"](), torch.device(setting.device):
            made = make()
        for launch in made:
            with found.expecting(f"{launch.operator} {launch.shape}"):
                elements = launch.args[0].numel()
                times.setdefault(launch.operator, {})[elements] = _time(setting, launch, device)
        del made, launch
    for operator, of_sizes in times.items():
        cells = [
            f"{n:.3g} elements: " + ", ".join(f"{TITLES[name]} {1e6 * t:.1f} us" for name, t in by.items())
            for n, by in of_sizes.items()
        ]
        entry = winners(of_sizes)
        said = "; ".join(f"{TITLES[name]} from {least:,} elements" for least, name in entry) or TITLES["triton"]
        found.row(f"fastest for {operator}", said, "; ".join(cells))
    chosen = {operator: entry for operator, of_sizes in times.items() if (entry := winners(of_sizes))}
    found.details |= {"seconds": times, "FASTEST": chosen}
    patch = patch_of(chosen)
    write_text(setting.results / PATCH, patch)
    found.row("the dispatch table", f"{len(chosen)} operators", f"`git apply` {PATCH}" if patch else "stays as it is")


def _time(setting: Setting, launch: Launch, device: CPU | CUDA) -> dict[str, float]:
    """Seconds of the launch by back end; a back end that is not there is left out."""

    def call(name: str) -> Contender:
        def run() -> None:
            with BACKENDS[name]():
                launch.run(dispatch.KERNELS[name])

        return Contender(run)

    there = {name: call(name) for name in BACKENDS if setting.dry or dispatch.KERNELS[name]}
    samples = take_turns(there, setting.pick(ROUNDS, 1), 0.0, device)
    return {name: quantiles(values)["median"] for name, values in samples.items()}


def winners(of_sizes: Mapping[int, Mapping[str, float]]) -> tuple[tuple[int, str], ...]:
    """The operator's entry of the table: () where Triton wins at every size.

    of_sizes: elements -> back end -> seconds. Between two sizes with different winners the change is put at their
    geometric mean; the first entry holds from 0 on.
    """
    entry: list[tuple[int, str]] = []
    before = None
    for elements, by in sorted(of_sizes.items()):
        faster = "cuda" in by and ("triton" not in by or by["cuda"] * MARGIN < by["triton"])
        name = "cuda" if faster else "triton"
        if not entry or entry[-1][1] != name:
            entry.append((0 if before is None else round(math.sqrt(before * elements)), name))
        before = elements
    return () if [name for _, name in entry] == ["triton"] else tuple(entry)


def patch_of(chosen: Mapping[str, Sequence[tuple[int, str]]]) -> str:
    """A unified diff of the table's file, which `git apply` takes from the repository's root; "" for no change."""
    old = (ROOT / TABLE).read_text()
    begin = old.index("FASTEST: ")
    end = old.index('\n"""', begin)
    lines = [f'    "{operator}": {_literal(entry)},' for operator, entry in chosen.items()]
    table = "\n".join(["{", *lines, "}"]) if lines else "{}"
    new = old[:begin] + old[begin:end].partition(" = ")[0] + f" = {table}" + old[end:]
    if lines:
        new = new.replace(
            "Not measured yet: the table is empty, and Triton runs every operator where it is there.",
            "Triton runs what the table does not name.",
        )
    diff = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{TABLE}", f"b/{TABLE}"
    )
    return "".join(diff)


def _literal(entry: Sequence[tuple[int, str]]) -> str:
    """The tuple in the project's style, with double quotes."""
    pairs = [f'({least}, "{name}")' for least, name in entry]
    return f"({pairs[0]},)" if len(pairs) == 1 else f"({', '.join(pairs)})"
