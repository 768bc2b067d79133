"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU; prints registers and spills, fails on any.

A module of kernels/ lists what to compile as COMPILED: (kernel, pointers, constants). pointers: the types, in Triton's
notation, of those of its pointer arguments that are not *fp32; the other arguments are annotated in the kernel.
constants: its constexpr arguments, pointers to be None, and the launch's options. A module with WIDE = True has to
read 16 bytes at a time, where it names integers as MULTIPLES_OF_16 with those.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import rlhf_fast.kernels


def signature(kernel: triton.JITFunction, pointers: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    return {
        p.name: "constexpr" if p.name in constants else p.annotation_type or pointers.get(p.name, "*fp32")
        for p in kernel.params
    }


def compile_module(name: str) -> tuple[list[str], int]:
    """A line for every kernel of the module and target; how many of them spill or read in small pieces."""
    module = importlib.import_module(f"rlhf_fast.kernels.{name}")
    lines, failed = [], 0
    for kernel, pointers, constants in getattr(module, "COMPILED", []):
        options = {key: constants[key] for key in ("num_warps", "maxnreg") if key in constants}
        constants = {key: value for key, value in constants.items() if key not in options}
        for capability in (80, 90, 100):
            types = signature(kernel, pointers, constants)
            aligned = {  # pointers as torch's allocator leaves them
                (i,): [["tt.divisibility", 16]]
                for i, (key, t) in enumerate(types.items())
                if t.startswith("*") or key in getattr(module, "MULTIPLES_OF_16", ())
            }
            source = ASTSource(kernel, types, constants, aligned)
            ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(ptx)
                file.flush()
                architecture = re.search(r"\.target (\w+)", ptx)[1]
                command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers, spills = (int(re.search(p, said)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill"))
            wide = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
            lines.append(
                f"{name}.{kernel.__name__} {architecture}: {registers} registers, {spills} bytes spilled, "
                f"{wide} loads of 16 bytes"
            )
            failed += spills > 0 or (getattr(module, "WIDE", False) and wide == 0)
    return lines, failed


if __name__ == "__main__":
    modules = [info.name for info in pkgutil.iter_modules(rlhf_fast.kernels.__path__)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        compiled = list(pool.map(compile_module, modules))
    lines = [line for of_module, _ in compiled for line in of_module]
    print(*lines, f"{len(lines)} compilations", sep="\n")
    sys.exit(not lines or any(failed for _, failed in compiled))
