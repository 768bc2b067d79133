"""Runs a notebook, cell by cell, in a kernel of its own: python .ci/check_notebook.py NOTEBOOK [--write]

Exit code 1 where the notebook is not valid or a cell raises, as an assert does. --write puts the outputs of this run
into the file; without it the file stays as it is.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SECONDS = 120  # of a cell


def main() -> int:
    """Runs the notebook; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    notebook = nbformat.read(args.notebook, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        startup_timeout=SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(args.notebook.parent)}},
        extra_arguments=["--log-level=ERROR"],
    )
    began = time.monotonic()
    try:
        client.execute()
    except CellExecutionError as error:
        print(f"{args.notebook}: {error}", file=sys.stderr)
        return 1
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{args.notebook}: {cells} cells ran in {time.monotonic() - began:.0f} s")
    if args.write:
        notebook.metadata.language_info = {"name": "python"}  # not the version that ran it
        nbformat.write(notebook, args.notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
