"""`python -m bench static`: registers, shared memory, occupancy and bytes of every GPU kernel, without a GPU.

python -m bench static            compiles and counts; tables under bench/results/
python -m bench static --check    the same, compared with the committed tables: exit code 1 where traffic has changed,
                                  where a kernel spills, or where one compiler has made other code
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.static import cuda, report, triton
from rlhf_fast.data.files import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results" / "static.json"
TRITON, CUDA = "Triton", "CUDA C++"


def record_of(modules: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Everything, ready for JSON, and the faults of the compiled kernels."""
    from bench.static import traffic

    by_triton, failed = triton.compile_all(modules)
    by_nvcc, spilled = cuda.compile_all()
    return {
        "made with": {TRITON: importlib.metadata.version("triton"), CUDA: nvcc_version() if by_nvcc else "none"},
        "not compiled": cuda.NOT_COMPILED,
        "kernels": {TRITON: [c.row() for c in by_triton], CUDA: [c.row() for c in by_nvcc]},
        "traffic": traffic.measure(),
    }, [*failed, *spilled]


def nvcc_version() -> str:
    """The release of the nvcc that the build finds, or "unknown"."""
    home = os.environ.get("CUDA_HOME")
    try:
        command = [f"{home}/bin/nvcc" if home else "nvcc", "--version"]
        found = re.search(r"V([\d.]+)", subprocess.run(command, capture_output=True, text=True).stdout)
    except OSError:
        found = None
    return found[1] if found else "unknown"


def main(argv: list[str]) -> int:
    """Runs `python -m bench static` with these arguments; its exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__, formatter_class=form)
    parser.add_argument("--check", action="store_true", help="compare with the committed tables and write nothing")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported
        command = [sys.executable, "-m", "bench", "static", *argv]
        return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    record, faults = record_of(triton.modules())
    numbers = {title: len(kernels) for title, kernels in record["kernels"].items()}
    print(", ".join(f"{title}: {n or 'no'} compilations" for title, n in numbers.items()), end="; ")
    print(f"{len(record['traffic'])} counted calls")
    if args.check:
        faults += report.differences(json.loads(RESULTS.read_text()), record)
    else:
        write_text(RESULTS, json.dumps(record, indent=1) + "\n")
        write_text(RESULTS.with_suffix(".md"), report.markdown(record))
        print(f"written: {RESULTS} and beside it .md")
    if not numbers[TRITON]:
        faults.append("no Triton kernel was compiled")
    for line in faults:
        print(f"FAILS: {line}")
    return int(bool(faults))
