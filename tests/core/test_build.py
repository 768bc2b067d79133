"""setup.py on a miniature tree: headers tracked, nothing rebuilt twice, a missing nvcc or compiler said in a line."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
BINDING = """\
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cpu, module) { module.attr("built") = true; }
"""
KERNEL = '#include "../math.h"\nnamespace rlhf::ISA { double half(double x) { return sigmoid(x - x); } }\n'


@pytest.fixture
def tree(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    shutil.copy(ROOT / "csrc/math.h", tmp_path / "csrc")
    (tmp_path / "csrc/bind_cpu.cpp").write_text(BINDING)
    (tmp_path / "csrc/cpu/kernel.cpp").write_text(KERNEL)
    (tmp_path / "rlhf_fast").mkdir()
    return tmp_path


def build(tree, **environment):
    """Builds in place and returns what was said."""
    keep = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "RLHF_FAST_CUDA")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=keep | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rebuilds_what_a_header_touches_and_nothing_else(tree):
    first = build(tree, RLHF_FAST_CUDA="0")
    assert (tree / f"rlhf_fast/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    assert "RLHF_FAST_CUDA=0, building the CPU core only" in first
    assert "no work to do" in build(tree, RLHF_FAST_CUDA="0")

    os.utime(tree / "csrc/math.h")
    again = build(tree, RLHF_FAST_CUDA="0")
    kernels, steps = len(list(tree.glob("build/*/kernel.*.o"))), again.count("-o kernel.")
    assert steps == kernels and "bind_cpu.cpp" not in again and "-shared" in again
    assert "no work to do" in build(tree, RLHF_FAST_CUDA="0")


def test_builds_nothing_again_for_pybind11_elsewhere(tree):
    """As in pip's build environments, each in a directory of its own."""
    build(tree, RLHF_FAST_CUDA="0")
    shutil.copytree(Path(pybind11.__file__).parent, tree / "elsewhere" / "pybind11")
    assert "no work to do" in build(tree, RLHF_FAST_CUDA="0", PYTHONPATH=str(tree / "elsewhere"))


def test_says_in_one_line_that_nvcc_is_missing(tree):
    empty = tree / "empty"
    empty.mkdir()
    lines = [line for line in build(tree, CUDA_HOME=str(empty)).splitlines() if "nvcc" in line]
    assert lines == ["rlhf-fast: nvcc not found, building the CPU core only"]


def test_a_machine_without_a_compiler_installs_without_the_core(tree):
    tools = tree / "tools"
    tools.mkdir()
    said = build(tree, PATH=str(tools), CXX="")
    assert "no C++ compiler found, operations will run on their PyTorch reference" in said
    assert list((tree / "rlhf_fast").glob("_cpu*")) == []
