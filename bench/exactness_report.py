"""What `bench.exactness` measured, for people: tables in the terminal and in Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.exactness import AT_TARGET, ENTROPY, GRADIENT, LOGPROB, LOGPROB_GRADIENT, NO_SUCH, QUANTITIES, Cell
from bench.record import opening
from rlhf_fast.training.metrics import markdown_table

NOTES = (
    "Errors are against float64 on the same inputs. They are relative where the true value is above 1, and absolute "
    "below. Where the target is 25 nats ahead, all errors are relative (1 means that nothing is right), and the "
    "gradient by logits is the gradient at the target.",
    "`-` means that the library does not offer it. The extra `rivals` installs the libraries that are not installed. "
    "A class name is the error that the library raised.",
)
INTERPRETED = (
    "Triton kernels ran in Triton's interpreter, which was made to round to bf16 as a GPU does. Our CUDA C++ kernels "
    "were compiled for the CPU. Their arithmetic and order are those of a GPU; their `exp2` is not (relative error "
    "2e-7). The interpreter has no libdevice, so an `InterpreterError` is not the kernel's fault."
)


def brief(error: Cell, digits: int = 1) -> str:
    """3e-7, 0.04, NaN, or the word."""
    if isinstance(error, str):
        return error
    if error == 0 or error >= 1e-2:
        return f"{error:.{digits}g}".replace("e+0", "e+")
    mantissa, exponent = f"{error:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def worst(cells: Sequence[Cell]) -> Cell:
    """The larger error; a word is worse than any number."""
    words = [cell for cell in cells if isinstance(cell, str)]
    return words[0] if words else max(cells)


def pair(errors: dict[str, Cell], first: Sequence[str], second: Sequence[str]) -> str:
    """ "worst of the first quantities / worst of the second", in one word where both are the same word."""
    one, two = (brief(worst([errors[quantity] for quantity in each])) for each in (first, second))
    return one if one == two and not one[0].isdigit() and one != "NaN" else f"{one} / {two}"


def short_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per case: the worse of log-prob and its gradient / the worse of entropy and the gradient of both.

    Gradients in half precision have a row of their own, because their rounding hides every other error.
    """
    rows = []
    for result in results:
        parts = {"": ((LOGPROB, LOGPROB_GRADIENT), (ENTROPY, GRADIENT))}
        if result["dtype"] != "float32":
            parts = {", values": ((LOGPROB,), (ENTROPY,)), ", gradients": ((LOGPROB_GRADIENT,), (GRADIENT,))}
        for suffix, quantities in parts.items():
            cells = {name: pair(errors, *quantities) for name, errors in result["errors"].items()}
            rows.append({"case": result["case"] + suffix} | cells)
    return rows


def full_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per case and quantity."""
    rows = []
    for result in results:
        for quantity in (*QUANTITIES, AT_TARGET):
            if any(quantity in errors for errors in result["errors"].values()):
                cells = {name: brief(errors.get(quantity, NO_SUCH), 2) for name, errors in result["errors"].items()}
                rows.append({"case": result["case"], "shape": result["shape"], "error of": quantity} | cells)
    return rows


def failed(cell: str) -> bool:
    """Not finite, or raised by the implementation itself."""
    return cell != "InterpreterError" and any(word in cell for word in ("NaN", "inf", "Error", "Exception"))


def emphasised(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with every cell that `failed` in bold; the name of the case stays as it is."""
    return [{key: f"**{x}**" if i and failed(x) else x for i, (key, x) in enumerate(row.items())} for row in rows]


def print_short(title: str, rows: Sequence[dict[str, str]], console: Console | None = None) -> None:
    """Print a table, with every cell that `failed` in bold red."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 200  # a file has no width
    table = Table(title=Text(title), title_justify="left", padding=(0, 0), pad_edge=False)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        name, *cells = row.values()
        table.add_row(Text(name), *(Text(cell, style="bold red" if failed(cell) else "") for cell in cells))
    console.print(table)


def notes(run: dict[str, Any]) -> list[str]:
    """The paragraphs that the tables need."""
    return [*NOTES, *([INTERPRETED] if run["machine"]["triton kernels"] == "interpreted" else [])]


def markdown(run: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    parts = [*opening("Exactness", run), *notes(run)]
    parts += ["Log-prob and its gradient / entropy and the gradient of both:"]
    for inputs, results in run["tables"].items():
        parts += [f"## From {inputs}", markdown_table(emphasised(short_rows(results)))]
    for inputs, results in run["tables"].items():
        parts += [f"## From {inputs}, all", markdown_table(emphasised(full_rows(results)))]
    return "\n\n".join(parts) + "\n"
