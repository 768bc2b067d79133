"""csrc/cuda compiled for the CPU (`cuda_on_host/cuda_on_host.h`) and run on CPU tensors, with no GPU and no nvcc."""

import contextlib
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

from rlhf_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "tests/cuda_on_host"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def build() -> Path:
    """The module, compiled unless one of the same sources and flags is there already."""
    flags = [*FLAGS, *shlex.split(os.environ.get("RLHF_FAST_CXXFLAGS", ""))]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    read = [*sources, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh"), *HEADERS.iterdir()]
    state = hashlib.sha256(repr(flags).encode())
    for path in sorted({*read, ROOT / "csrc/bind_cuda.cpp"}):
        state.update(path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = ROOT / "build/cuda_on_host" / state.hexdigest()[:16] / f"_cuda{suffix}"
    if module.exists():
        return module
    scratch = module.parent / str(os.getpid())  # several pytest workers may build at once
    scratch.mkdir(parents=True)
    cxx, includes = (
        os.environ.get("CXX", "g++"),
        [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"],
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's
    kernel = [f"-I{HEADERS}", "-include", "cuda_on_host.h", "-x", "c++"]

    def compile_(source: Path) -> Path:
        target = scratch / f"{source.stem}.o"
        options = includes if source.suffix == ".cpp" else kernel
        subprocess.run([cxx, *flags, *options, "-c", source, "-o", target], check=True, env=environment)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, [ROOT / "csrc/bind_cuda.cpp", *sources]))
    subprocess.run([cxx, *flags, "-shared", *objects, "-o", scratch / module.name], check=True, env=environment)
    (scratch / module.name).replace(module)
    return module


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replace_cpu_kernels(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """CPU tensors run the back end "cuda" on the emulated kernels, all on one stream; returns the scratch memory."""
    from rlhf_fast.ops import cuda_backend

    scratch = torch.zeros(module.scratch_bytes, dtype=torch.uint8)
    monkeypatch.setattr(cuda_backend, "_cuda", module)
    monkeypatch.setattr(cuda_backend, "_current_stream", lambda device: contextlib.nullcontext(0))
    monkeypatch.setattr(cuda_backend, "_scratch", lambda device, stream: scratch)
    monkeypatch.setitem(dispatch.KERNELS, "cpu", dispatch.KERNELS["cpu"] | dispatch.KERNELS["cuda"])
    return scratch
