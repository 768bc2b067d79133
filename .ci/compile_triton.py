"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU; prints registers and spills, fails on any.

A module of kernels/ lists what to compile as COMPILED: (kernel, pointers, constants). pointers: the types, in Triton's
notation, of those of its pointer arguments that are not *fp32; the other arguments are annotated in the kernel.
constants: its constexpr arguments, pointers to be None, and the launch's options. A module with WIDE = True has to
read 16 bytes at a time, where it names integers as MULTIPLES_OF_16 with those.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile

import rlhf_fast.kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


def signature(kernel: triton.JITFunction, pointers: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    return {
        p.name: "constexpr" if p.name in constants else p.annotation_type or pointers.get(p.name, "*fp32")
        for p in kernel.params
    }


failed = compiled = 0
for info in pkgutil.iter_modules(rlhf_fast.kernels.__path__):
    module = importlib.import_module(f"rlhf_fast.kernels.{info.name}")
    for kernel, pointers, constants in getattr(module, "COMPILED", []):
        options = {name: constants[name] for name in ("num_warps", "maxnreg") if name in constants}
        constants = {name: value for name, value in constants.items() if name not in options}
        for capability in (80, 90, 100):
            types = signature(kernel, pointers, constants)
            aligned = {  # pointers as torch's allocator leaves them
                (i,): [["tt.divisibility", 16]]
                for i, (name, t) in enumerate(types.items())
                if t.startswith("*") or name in getattr(module, "MULTIPLES_OF_16", ())
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
            print(
                f"{info.name}.{kernel.__name__} {architecture}: {registers} registers, {spills} bytes spilled, "
                f"{wide} loads of 16 bytes"
            )
            compiled += 1
            failed += spills > 0 or (getattr(module, "WIDE", False) and wide == 0)
print(f"{compiled} compilations")
sys.exit(failed > 0 or compiled == 0)
