"""`rlhf-fast data FILE --model DIR`: any file as training will see it, in the terminal and as a page.

Trained tokens are green and their end is reversed; the prompt is dim; what the lengths take away is red. Without a
terminal marks stand for the colours.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.text import Text

from rlhf_fast.config import DataConfig
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.files import check_writable, write_text
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.report.inspection import (
    Inspected,
    Inspection,
    Kind,
    Piece,
    Shown,
    inspect,
    lengths_of,
    shared_prompt,
    show,
)
from rlhf_fast.training.console import shown
from rlhf_fast.training.metrics import print_table

_STYLES: dict[Kind, str] = {"prompt": "dim", "trained": "green", "end": "bold reverse green", "lost": "red strike"}
_MARKS: dict[Kind, tuple[str, str]] = {
    "prompt": ("", ""),
    "trained": ("⟦", "⟧"),
    "end": ("⟦", "⟧■"),
    "lost": ("⟨", "⟩"),
}
_LONGEST: dict[Kind, int] = {"prompt": 400, "trained": 800, "end": 800, "lost": 120}  # letters of a piece, if not whole
_GENERATOR = b'<meta name="generator" content="rlhf-fast data">'  # in every page
_IDS = 24  # of a text, if not whole
_REFUSED = 5  # malformed rows whose errors are shown


@trusts_as_asked
def run(config: DataConfig) -> None:
    """Shows the rows; with `html` also writes the page. Raises ValueError where a row would stop the stage."""
    if config.html:
        _check_page(Path(config.html))
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    limits, found = lengths_of(config), inspect(config.data, tokenizer, config)
    chosen = _chosen(found, config)
    rows = [(example, show(example, tokenizer)) for example in chosen]
    console = Console(highlight=False)
    _print(console, _title(found, config, limits), _counts(found), _lengths(found))
    for example, texts in rows:
        _print_row(console, example, texts, whole=bool(config.row))
    if config.html:
        values = {"title": Path(str(config.data)).name, "line": _title(found, config, limits)}
        write_text(config.html, _page(**values, counts=_counts(found), rows=rows, found=found))
        console.print(Text(shown(f"data: wrote {config.html}")), soft_wrap=True)
    if found.refused:
        raise ValueError(
            f"data: {len(found.refused)} of {found.rows} rows would stop the stage; the first: {found.refused[0]}"
        )


def _chosen(found: Inspection, config: DataConfig) -> list[Inspected]:
    if not config.row:
        return found.examples[: config.rows]
    missing = sorted({*config.row} - {example.number for example in found.examples})
    if missing:
        raise ValueError(f"row: expected numbers of rows of {config.data} that can be read, got {missing[0]}")
    return [example for example in found.examples if example.number in config.row]


def _check_page(path: Path) -> None:
    """ValueError where the page cannot be written, or would take the place of a file that is no such page."""
    check_writable("html", path)
    if path.exists():
        with open(path, "rb") as file:
            start = file.read(1000)
        if _GENERATOR not in start:
            raise ValueError(f"html: expected a new file or an earlier page, got {path}, which holds something else")


def _title(found: Inspection, config: DataConfig, limits: tuple[int | None, int]) -> str:
    longest = "" if limits[0] is None else f"max_length {limits[0]}, "
    return f"{config.data}: {config.stage} reads rows of kind {found.kind}, {longest}max_prompt_length {limits[1]}"


def _counts(found: Inspection) -> list[dict[str, Any]]:
    """What there is: a line for each count and for each oddity, with the first rows that it concerns."""
    examples, refused = found.examples, len(found.refused)
    lines: list[dict[str, Any]] = [{"what": "rows", "count": found.rows, "rows": ""}]
    if refused:
        lines.append({"what": "refused: the stage stops at the first", "count": refused, "rows": ""})
    if len(examples) != found.rows - refused:
        lines.append({"what": "examples made of them", "count": len(examples), "rows": ""})
    odd: dict[str, list[int]] = {}
    for example in examples:
        if example.cut.prompt:
            odd.setdefault("the start of the prompt is lost", []).append(example.number)
        for what in example.odd:
            odd.setdefault(what, []).append(example.number)
    for what, numbers in sorted(odd.items(), key=lambda item: -len(item[1])):
        first = ", ".join(map(str, dict.fromkeys(numbers[:4]))) + (", ..." if len(numbers) > 4 else "")
        lines.append({"what": what, "count": len(numbers), "rows": first})
    return lines


def _lengths(found: Inspection) -> list[dict[str, Any]]:
    """Quantiles of the lengths in tokens, before anything is cut."""
    parts = [part for example in found.examples for part in example.parts]
    columns = {
        "prompt": [len(part.prompt) for part in parts],
        "answer": [len(part.answer) for part in parts],
        "trained": [sum(part.trained) for part in parts],
        "both": [len(part.prompt) + len(part.answer) for part in parts],
    }
    if columns["trained"] == columns["answer"]:
        del columns["trained"]
    if not any(columns["answer"]):
        del columns["both"]
    return [{"tokens": name, **_quantiles(values)} for name, values in columns.items() if any(values)]


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    named = {"shortest": min(values), "median": cuts[49], "90 %": cuts[89], "99 %": cuts[98], "longest": max(values)}
    return {name: round(value) for name, value in named.items()}


# ------------------------------------------------------------------------------------------------ the terminal


def _print(console: Console, title: str, counts: list[dict[str, Any]], lengths: list[dict[str, Any]]) -> None:
    console.print(Text(shown(title), style="bold"), soft_wrap=True)
    marks: list[tuple[Kind, str]] = [("prompt", "prompt"), ("trained", "trained"), ("end", "end"), ("lost", "lost")]
    legend = Text("  ")
    for kind, name in marks:
        legend.append_text(_marked(console, kind, name)).append("  ")
    console.print(legend, soft_wrap=True)
    width = max(len(f"{line['count']:,}") for line in counts)
    for line in counts:
        text = Text(shown(f"  {line['count']:>{width},}  {line['what']}"))
        text.append(f"  (rows {line['rows']})" if line["rows"] else "", style="dim")
        console.print(text, soft_wrap=True)
    if lengths:
        print_table("Tokens before anything is cut", lengths, console=console)


def _print_row(console: Console, example: Inspected, texts: list[Shown], *, whole: bool) -> None:
    console.print()
    console.print(Text(shown(_headline(example, texts)), style="bold"), soft_wrap=True)
    for what in example.odd:
        console.print(Text(shown(f"! {what}"), style="yellow"), soft_wrap=True)
    prompt, answers = shared_prompt(texts)
    for name, pieces in [("", prompt)] * bool(prompt) + [(text.name, text.pieces) for text in answers]:
        line = Text().append(f"{name}: " if name else "", style="bold")
        for piece in pieces:
            text = _shortened(piece, None if whole else _LONGEST[piece.kind])
            line.append_text(_marked(console, piece.kind, text))
        console.print(line, soft_wrap=True)
        console.print(_ids(console, pieces, None if whole else _IDS), soft_wrap=True)


def _headline(example: Inspected, texts: list[Shown]) -> str:
    sizes = Counter(text.count("prompt", "trained", "end") for text in texts)
    trained = " + ".join(str(text.count("trained", "end")) for text in texts)
    lost = [f"prompt lost {example.cut.prompt}"] * bool(example.cut.prompt)
    lost += [f"answer lost {max(example.cut.answers, default=0)}"] * (max(example.cut.answers, default=0) > 0)
    kept = " and ".join(map(str, sizes))
    return ", ".join([f"{example.where}: {kept} tokens", *[f"{trained} trained"] * (trained != "0"), *lost])


def _marked(console: Console, kind: Kind, text: str) -> Text:
    text = shown(text)
    if console.is_terminal:
        return Text(text, style=_STYLES[kind])
    return Text(text.join(_MARKS[kind]))


def _shortened(piece: Piece, longest: int | None) -> str:
    text = piece.text
    if longest is None or len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} letters ...] {text[-half:]}"


def _ids(console: Console, pieces: list[Piece], longest: int | None) -> Text:
    """The ids, the middle ones left out where there are more than `longest`."""
    number = sum(len(piece.ids) for piece in pieces)
    hidden = range(0) if longest is None or number <= longest else range(longest // 2, number - longest // 2)
    line, n = Text().append("ids", style="dim"), 0
    for piece in pieces:
        words = []
        for token in piece.ids:
            words += [f"[... {len(hidden)} ...]"] if n == hidden.start and hidden else []
            words += [] if n in hidden else [str(token)]
            n += 1
        if words:
            line.append(" ")
            line.append_text(_marked(console, piece.kind, " ".join(words)))
    return line


# ------------------------------------------------------------------------------------------------ the page


def _page(**values: Any) -> str:
    loader = jinja2.PackageLoader("rlhf_fast.report", package_path="")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"shared": shared_prompt, "headline": _headline, "refused": _REFUSED}
    environment.globals["lengths"] = _lengths(values["found"])
    return environment.get_template("doctor.html.jinja").render(**values)
