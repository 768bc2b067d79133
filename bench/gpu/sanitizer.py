"""compute-sanitizer over a selection of the operators' tests, on both back ends: memory accesses, then races.

A dry run gives the same command to a stand-in that runs the tests and checks nothing.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.hour import ROOT
from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work, processes

TOOLS = "memcheck", "racecheck"
TESTS = (
    "tests/ops/test_logprobs.py::test_hand_computed",
    "tests/ops/test_logprobs.py::test_int32_ids",
    "tests/ops/test_sampling.py::test_inverse_cdf_by_hand",
    "tests/ops/test_returns.py::TestGAE::test_hand_computed",
    "tests/ops/test_policy_loss.py::TestPPO::test_hand_computed",
)
CASE = "cuda or triton"
SLOWER = 25.0  # seconds that a process takes longer under the sanitizer, assumed
STAND_IN = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
"$@"; code=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $code
"""


def work(setting: Setting) -> Iterator[Work]:
    """A process for each tool; the tests themselves are small."""
    yield processes(len(TOOLS))
    yield Work(seconds=setting.pick(SLOWER * len(TOOLS), 5.0))


def command(sanitizer: str, tool: str) -> list[str]:
    """The selection under one tool; exit code 86 for what the tool finds."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "86"]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-k", CASE]
    return [sanitizer, *options, *pytest]


def stand_in(directory: Path) -> str:
    """A program that takes the sanitizer's place in a dry run."""
    path = directory / "compute-sanitizer"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def run(setting: Setting, found: Found) -> None:
    """A row per tool. What one tool finds does not keep the other from looking."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = f"{os.environ.get('PATH', '')}:{home}/bin:{home}/compute-sanitizer"
    sanitizer = stand_in(setting.scratch) if setting.dry else shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        found.row("compute-sanitizer", "not found")
        return
    cached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an access beyond a tensor falls into torch's own block
    for tool in TOOLS:
        done = subprocess.run(
            command(sanitizer, tool), cwd=ROOT, env=os.environ | cached, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        tests = re.findall(r"\d+ (?:passed|failed)[^\n]*", said)
        found.row(f"compute-sanitizer --tool {tool}", "; ".join(summary) or "no summary", "; ".join(tests[-1:]))
        if done.returncode:
            found.details[tool] = said.splitlines()[-60:]
            found.fail(f"{tool}: exit code {done.returncode}: {'; '.join(tests[-1:] or said.splitlines()[-1:])}")
