"""A GPU's kernels on CPU tensors, for tests and `bench.exactness`: Triton's interpreted, those of csrc/cuda compiled
for the CPU (`csrc/cuda_on_host`), with no GPU and no nvcc.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy
import torch
from torch import Tensor

from rlhf_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "csrc/cuda_on_host"
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
    module.parent.mkdir(parents=True, exist_ok=True)
    with open(module.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several pytest workers one builds
        if not module.exists():
            _compile(module, flags, sources)
    return module


def _compile(module: Path, flags: list[str], sources: list[Path]) -> None:
    import pybind11

    scratch = module.parent / str(os.getpid())
    scratch.mkdir(exist_ok=True)
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


@functools.cache
def load() -> ModuleType:
    """The module, built."""
    spec = importlib.util.spec_from_file_location("_cuda", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def cuda_on_cpu(module: ModuleType) -> Iterator[Tensor]:
    """CPU tensors run the back end "cuda" on the emulated kernels, all on one stream; yields their scratch memory."""
    if importlib.util.find_spec("rlhf_fast._cuda") is None:
        sys.modules["rlhf_fast._cuda"] = module  # which the back end imports
    from rlhf_fast.ops import cuda_backend

    scratch = torch.zeros(module.scratch_bytes, dtype=torch.uint8)
    with (
        patch.object(cuda_backend, "_cuda", module),
        patch.object(cuda_backend, "_current_stream", lambda device: contextlib.nullcontext(0)),
        patch.object(cuda_backend, "_scratch", lambda device, stream: scratch),
        patch.dict(dispatch.KERNELS["cpu"], dispatch.KERNELS["cuda"]),
    ):
        yield scratch


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Triton's interpreter rounds to bfloat16, to nearest even as compiled kernels do; by itself it cuts off. And it
    takes a fraction of its time: triton.language is prepared once a launch, not once more at every function called in
    it, scans are done in doubling steps, as a GPU does them, and numpy's dtypes are looked up once."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, prepare = interpreter._convert_float, interpreter._patch_lang

    def rounding(data: numpy.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> numpy.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(numpy.array(data, dtype=numpy.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    prepared = set()

    def prepare_once(function: Callable) -> object:
        if tl.core.is_builtin(tl.load):  # a launch begins
            prepared.clear()
        if (module := function.__module__) in prepared:
            return None
        prepared.add(module)
        return prepare(function)

    def scan(self: interpreter.ScanOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        types, sums = [x.dtype for x in inputs], [x.handle.data for x in inputs]
        length, step = sums[0].shape[self.axis], 1
        place = numpy.arange(length).reshape(-1, *[1] * (sums[0].ndim - 1 - self.axis))
        while step < length:
            before = [numpy.roll(x, step, self.axis) for x in sums]
            both = self.combine_fn.fn(*map(self.to_tensor, before, types), *map(self.to_tensor, sums, types))
            both = both if isinstance(both, tuple) else (both,)
            sums = [numpy.where(place < step, x, y.handle.data) for x, y in zip(sums, both, strict=True)]
            step *= 2
        return list(map(self.to_tensor, sums, types))

    look_up = interpreter._get_np_dtype
    look_up_scalar = functools.cache(look_up)

    with (
        patch.object(interpreter, "_convert_float", rounding),
        patch.object(interpreter, "_patch_lang", prepare_once),
        patch.object(interpreter.ScanOps, "generic_scan", scan),
        patch.object(interpreter, "_get_np_dtype", lambda t: (look_up_scalar if type(t) is tl.dtype else look_up)(t)),
    ):
        yield
