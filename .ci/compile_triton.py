"""Compiles every Triton kernel for sm_80 and sm_90, no GPU needed; prints registers and spills, fails on a spill.

A module of kernels/ lists what to compile as COMPILED: (kernel, signature, constants), the signature in Triton's
notation ({"logits": "*bf16", "V": "i64", "BLOCK": "constexpr"}) and the values of its constexpr arguments.
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
from triton.compiler import ASTSource

spilled = compiled = 0
for info in pkgutil.iter_modules(rlhf_fast.kernels.__path__):
    module = importlib.import_module(f"rlhf_fast.kernels.{info.name}")
    for kernel, signature, constants in module.COMPILED:
        for capability in (80, 90):
            source = ASTSource(kernel, signature, constants)
            ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(ptx)
                file.flush()
                architecture = re.search(r"\.target (\w+)", ptx)[1]
                command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers, spills = (int(re.search(p, said)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill"))
            print(f"{info.name}.{kernel.__name__} sm_{capability}: {registers} registers, {spills} bytes spilled")
            compiled += 1
            spilled += spills > 0
print(f"{compiled} compilations")
sys.exit(spilled > 0)
