"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU.

A module of kernels/ lists what to compile as COMPILED: (kernel, pointers, constants). pointers: the types, in Triton's
notation, of those of its pointer arguments that are not *fp32; the other arguments are annotated in the kernel.
constants: its constexpr arguments, pointers to be None, and the launch's options. A module with WIDE = True has to
read 16 bytes at a time, where it names integers as MULTIPLES_OF_16 with those.

A process in which TRITON_INTERPRET is set cannot compile, so the processes of `compile_all` drop it.
"""

import collections
import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from bench.static.kernel import Compiled

CAPABILITIES = 80, 90, 100
OPTIONS = "num_warps", "maxnreg"
WARPS = 4  # of a launch that names no number
_LOAD = re.compile(r"\bld\.global\S*?((?:\.v\d)?)\.[bfsu](\d+)\b")


def modules() -> list[str]:
    """The modules of kernels/, by name."""
    import rlhf_fast.kernels

    return [info.name for info in pkgutil.iter_modules(rlhf_fast.kernels.__path__)]


def load_sizes(ptx: str) -> dict[int, int]:
    """Bytes of one thread's load from global memory -> how many such instructions the PTX has."""
    sizes = [int(vector[2:] or 1) * int(bits) // 8 for vector, bits in _LOAD.findall(ptx)]
    return dict(collections.Counter(sizes))


def label(constants: dict[str, Any], pointers: dict[str, str]) -> str:
    """What tells a kernel's variants apart: the dtype of its logits, and its switches."""
    dtype = [pointers["logits"][1:]] if "logits" in pointers else []
    switches = [f"{k.lower()} {v}" for k, v in constants.items() if isinstance(v, bool | int) and k not in _SIZES]
    return ", ".join([*dtype, *switches, *(f"no {k}" for k, v in constants.items() if v is None)])


_SIZES = ("BLOCK", "ROWS", "COLUMNS", "CHUNK", "ALIGN", *OPTIONS)


def compile_kernel(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], multiples: tuple[str, ...]) -> Any:
    """(PTX, compiled) for each of CAPABILITIES."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants[key] for key in OPTIONS if key in constants}
    constants = {key: value for key, value in constants.items() if key not in options}
    types = {
        p.name: "constexpr" if p.name in constants else p.annotation_type or pointers.get(p.name, "*fp32")
        for p in kernel.params
    }
    aligned = {  # pointers as torch's allocator leaves them
        (i,): [["tt.divisibility", 16]]
        for i, (key, t) in enumerate(types.items())
        if t.startswith("*") or key in multiples
    }
    for capability in CAPABILITIES:
        source = ASTSource(kernel, types, constants, aligned)
        yield capability, triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) by ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)
        assert target, "PTX names its target"
        command = [get_ptxas(capability).path, "-v", f"-arch={target[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"Used (\d+) registers", said)
    assert found, said
    return int(found[1]), sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def compile_module(name: str) -> tuple[list[Compiled], list[str]]:
    """Every kernel of the module on every arch; which of them spill or read in small pieces."""
    module, found, failed = importlib.import_module(f"rlhf_fast.kernels.{name}"), [], []
    for kernel, pointers, constants in getattr(module, "COMPILED", []):
        said = label(constants, pointers)
        title = f"{name}.{kernel.__name__}" + (f" ({said})" if said else "")
        for capability, compiled in compile_kernel(kernel, pointers, constants, getattr(module, "MULTIPLES_OF_16", ())):
            ptx = compiled.asm["ptx"]
            registers, spilled = assembled(ptx, capability)
            threads = 32 * constants.get("num_warps", WARPS)
            shared, loads = compiled.metadata.shared, load_sizes(ptx)
            found.append(Compiled(title, f"sm_{capability}", threads, registers, shared, spilled, loads))
            if spilled:
                failed.append(f"{title} sm_{capability}: {spilled} bytes spilled")
            if getattr(module, "WIDE", False) and 16 not in loads:
                failed.append(f"{title} sm_{capability}: expected loads of 16 bytes, got {loads}")
    return found, failed


def compile_all(names: list[str]) -> tuple[list[Compiled], list[str]]:
    """`compile_module` of all of them, in as many processes as there are processors."""
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with (
        patch.dict(os.environ, own, clear=True),
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool,
    ):
        results = list(pool.map(compile_module, names))
    return [c for found, _ in results for c in found], [line for _, failed in results for line in failed]
