"""The table of docs/models.md: how each model of the zoo decodes, and whether its rows are packed.

    python -m tests.support.zoo_table

measures every model and writes the table anew.
"""

import tempfile
import textwrap
from pathlib import Path

from tests.support.zoo import ZOO
from tests.support.zoo_checks import measure

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
DECODING = {
    "static, packed prompts": "our own step, packed prompts",
    "static": "our own step",
    "cache": "transformers' cache",
    "cache by length": "transformers' cache, prompts of each length apart",
    "whole": "whole rows",
}
_HEAD = "| decoding | packed | model types |\n|---|---|---|\n"


def read() -> dict[str, tuple[str, bool]]:
    """Member -> its decoding by the name of `engine._choice`, and whether its rows are packed."""
    names = {text: name for name, text in DECODING.items()}
    rows = [line.strip("| \n").split(" | ") for line in _table(PAGE.read_text()).splitlines()]
    return {m: (names[decoding], packed == "yes") for decoding, packed, members in rows for m in members.split(", ")}


def write(found: dict[str, tuple[str, bool]]) -> None:
    """Puts the rows of these members in place of the table."""
    text, rows = PAGE.read_text(), ""
    for choice, decoding in DECODING.items():
        for packed in (True, False):
            members = sorted(name for name, ways in found.items() if ways == (choice, packed))
            if members:
                rows += f"| {decoding} | {'yes' if packed else 'no'} | {', '.join(members)} |\n"
    PAGE.write_text(text.replace(_table(text), rows))


def _table(text: str) -> str:
    return text.split(_HEAD)[1].split("\n\n")[0] + "\n"


def main() -> None:
    """Measures every model."""
    found = {}
    for name in ZOO:
        with tempfile.TemporaryDirectory() as directory:
            member = measure(name, Path(directory))
        found[name] = member.decoding, member.packed
        errors = ", ".join(f"{kind} {error:.0e}" for kind, error in member.errors.items())
        print(textwrap.shorten(f"{name}: {errors}", 300), flush=True)
    write(found)


if __name__ == "__main__":
    main()
