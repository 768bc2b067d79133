"""Compiles csrc/cuda for the CPU, with the headers of include/ in place of CUDA's.

`python -m tests.emulation.cuda_on_host` builds the module. It needs a C++ compiler and pybind11, but no torch.
RLHF_FAST_CXXFLAGS adds flags, as for setup.py. A module that counts (see counts.cpp) needs GCC, and is slower.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path(__file__).resolve().parent / "include"
COUNTS = Path(__file__).resolve().parent / "counts.cpp"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def build(counting: bool = False) -> Path:
    """The module, compiled unless one of the same sources and flags is there already.

    counting: the module that counts the kernels' bytes of global memory.
    """
    flags = [*FLAGS, *shlex.split(os.environ.get("RLHF_FAST_CXXFLAGS", ""))]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    read = [*sources, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh"), *HEADERS.iterdir()]
    state = hashlib.sha256(repr(flags).encode())
    for path in sorted({*read, ROOT / "csrc/bind_cuda.cpp", *([COUNTS] if counting else [])}):
        state.update(path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = ROOT / "build/cuda_on_host" / state.hexdigest()[:16] / f"_cuda{suffix}"
    module.parent.mkdir(parents=True, exist_ok=True)
    with open(module.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several pytest workers one builds
        if not module.exists():
            _compile(module, flags, sources, counting)
    return module


def _compile(module: Path, flags: list[str], sources: list[Path], counting: bool) -> None:
    import pybind11

    scratch = module.parent / str(os.getpid())
    scratch.mkdir(exist_ok=True)
    cxx = os.environ.get("CXX", "g++")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's
    kernel = [f"-I{HEADERS}", "-include", "cuda_on_host.h", "-x", "c++"]
    binding = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_(source: Path) -> Path:
        target = scratch / f"{source.stem}.o"
        options = kernel if source.suffix == ".cu" else binding
        if counting and source.suffix == ".cu":
            options = [*kernel, "-fsanitize=thread"]
        elif source == COUNTS:
            options = [f"-I{HEADERS}"]
        subprocess.run([cxx, *flags, *options, "-c", source, "-o", target], check=True, env=environment)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, [ROOT / "csrc/bind_cuda.cpp", *sources, *([COUNTS] if counting else [])]))
    subprocess.run([cxx, *flags, "-shared", *objects, "-o", scratch / module.name], check=True, env=environment)
    (scratch / module.name).replace(module)


@functools.cache
def load(counting: bool = False) -> ModuleType:
    """The module, built."""
    name = "counting._cuda" if counting else "_cuda"  # pybind11 keeps one module of a name
    spec = importlib.util.spec_from_file_location(name, build(counting))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
