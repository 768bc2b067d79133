"""setup.py on a miniature tree: headers tracked, nothing rebuilt twice, a missing nvcc or compiler said in a line."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BINDING = """\
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cpu, module) { module.attr("built") = true; }
"""
KERNEL = '#include "../math.h"\nnamespace rlhf::ISA { double half(double x) { return sigmoid(x - x); } }\n'


def plant(root):
    shutil.copy(ROOT / "setup.py", root)
    (root / "csrc/cpu").mkdir(parents=True)
    shutil.copy(ROOT / "csrc/math.h", root / "csrc")
    (root / "csrc/bind_cpu.cpp").write_text(BINDING)
    (root / "csrc/cpu/kernel.cpp").write_text(KERNEL)
    (root / "rlhf_fast").mkdir()
    return root


def build(tree, **environment):
    """Builds in place and returns what was said."""
    keep = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "RLHF_FAST_CUDA")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=keep | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_builds_once_and_again_what_a_header_touches(tmp_path):
    tree = plant(tmp_path)
    nowhere = tree / "nowhere"
    nowhere.mkdir()
    first = build(tree, CUDA_HOME=str(nowhere))
    assert (tree / f"rlhf_fast/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    assert [x for x in first.splitlines() if "not found" in x] == [
        "rlhf-fast: nvcc not found, building the CPU core only"
    ]

    again = build(tree, RLHF_FAST_CUDA="0")
    assert "RLHF_FAST_CUDA=0, building the CPU core only" in again and "no work to do" in again

    # pip brings pybind11 to a directory of its own at every install
    shutil.copytree(Path(pybind11.__file__).parent, tree / "elsewhere" / "pybind11")
    assert "no work to do" in build(tree, RLHF_FAST_CUDA="0", PYTHONPATH=str(tree / "elsewhere"))

    os.utime(tree / "csrc/math.h")
    again = build(tree, RLHF_FAST_CUDA="0")
    kernels, steps = len(list(tree.glob("build/*/kernel.*.o"))), again.count("-o kernel.")
    assert steps == kernels and "bind_cpu.cpp" not in again and "-shared" in again
    assert "no work to do" in build(tree, RLHF_FAST_CUDA="0")


def test_a_machine_without_a_compiler_installs_without_the_core(tmp_path):
    tree = plant(tmp_path)
    tools = tree / "tools"
    tools.mkdir()
    said = build(tree, PATH=str(tools), CXX="")
    assert "no C++ compiler found, operations will run on their PyTorch reference" in said
    assert list((tree / "rlhf_fast").glob("_cpu*")) == []


def test_a_compiler_without_openmp_is_as_good_as_none(tmp_path):
    tree = plant(tmp_path)
    cxx = tree / "c++"
    cxx.write_text("#!/bin/sh\necho unsupported option -fopenmp >&2\nexit 1\n")
    cxx.chmod(0o755)
    said = build(tree, CXX=str(cxx))
    assert f"{cxx} does not compile C++17 with OpenMP" in said
    assert not list((tree / "rlhf_fast").glob("_cpu*"))


def test_one_arch_or_all(tmp_path):
    """nvcc's flags, as build.ninja has them; both compilers are a stand-in that compiles nothing."""
    tree = plant(tmp_path)
    (tree / "csrc/cuda").mkdir()
    for file in ("csrc/bind_cuda.cpp", "csrc/cuda/kernel.cu"):
        (tree / file).write_text("")
    nvcc = tree / "home/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2" "$2.d"; shift; done\n')
    nvcc.chmod(0o755)
    given = {"CXX": str(nvcc), "CUDA_HOME": str(tree / "home")}
    one, every = "-gencode arch=compute_90,code=sm_90", "-gencode arch=compute_80,code=[sm_80,sm_90,compute_80]"
    for flags, environment in ((one, {"RLHF_FAST_CUDA_ARCH": "90"}), (every, {})):
        build(tree, **given, **environment)
        (ninja,) = tree.glob("build/*/build.ninja")
        assert f"{flags}\n" in ninja.read_text()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | given | {"RLHF_FAST_CUDA_ARCH": "sm_90", "RLHF_FAST_CUDA": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    message = "RLHF_FAST_CUDA_ARCH: expected a compute capability such as 90, got 'sm_90'"
    assert done.returncode and message in done.stderr


def test_what_another_processor_runs_compiles():
    """`.ci/aarch64` compiles and runs this file; here its calls have to fit the kernels of today."""
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([*command, "-DISA=scalar", ROOT / "tests/emulation/numbers.cpp"], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
