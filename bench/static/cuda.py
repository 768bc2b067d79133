"""The CUDA C++ kernels as the build left them in rlhf_fast._cuda: registers and shared memory of sm_80 and sm_90.

sm_100 has no machine code in the module: a driver compiles the PTX of compute_80 for it, and here ptxas does. Both
tools come with Triton. Where nvcc was not found there is no module, and nothing is known.
"""

import importlib.util
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.static.kernel import Compiled
from bench.static.occupancy import SYSTEM_SHARED

THREADS = {"dpo_pairs": 64}
"""Threads of a block, where they are not MOST_THREADS (`launch` in the sources)."""
MOST_THREADS = 256  # kThreads in csrc/cuda/launch.cuh; shape_rewards takes fewer on short rows
NOT_COMPILED = "not compiled: there is no nvcc"
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_VERBOSE = re.compile(
    r"Compiling entry function '(\S+)' for '\S+'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


def module() -> Path | None:
    """The file of rlhf_fast._cuda, or None where it was not built."""
    spec = importlib.util.find_spec("rlhf_fast._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def demangled(names: list[str]) -> list[str]:
    """C++ names as people read them: of `rlhf::cuda::(anonymous namespace)::forward<float>(...)`, `forward<float>`."""
    said = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void ", "", line).replace("rlhf::cuda::(anonymous namespace)::", "") for line in said.split("\n")]


def source_of(name: str) -> str:
    """The source file that a mangled name of an anonymous namespace names: `dpo_loss` of `..._11_dpo_loss_cu_...`."""
    found = re.search(r"_\d+_([a-z_]+)_cu_", name)
    return found[1] if found else "?"


def titles(names: list[str]) -> dict[str, str]:
    """Mangled name -> `source.kernel<types>`."""
    return {n: f"{source_of(n)}.{short}" for n, short in zip(names, demangled(names), strict=False)}


def built(path: Path) -> list[Compiled]:
    """The kernels of sm_80 and sm_90."""
    command = [_tool("cuobjdump"), "--dump-resource-usage", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for part in said.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", part)
        rows = _RESOURCES.findall(part)
        names = titles([row[0] for row in rows]) if rows else {}
        for name, registers, _, shared, local in rows:
            assert arch
            own = int(shared) - (SYSTEM_SHARED if arch[1] == "sm_90" and int(shared) else 0)  # which is among it there
            found.append(Compiled(names[name], arch[1], threads(name), int(registers), own, int(local)))
    return found


def threads(name: str) -> int:
    """Threads of a block of the kernel with this mangled name."""
    return next((number for kernel, number in THREADS.items() if kernel in name), MOST_THREADS)


def by_driver(path: Path, capability: int = 100) -> list[Compiled]:
    """The kernels as ptxas makes them of the module's PTX."""
    with tempfile.TemporaryDirectory() as directory:
        command = [_tool("cuobjdump"), "-xptx", "all", str(path)]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)

        def compile_(file: Path) -> str:
            options = ["-v", f"-arch=sm_{capability}", str(file), "-o", "/dev/null"]
            done = subprocess.run([_tool("ptxas-blackwell"), *options], check=True, capture_output=True, text=True)
            return done.stdout + done.stderr

        with ThreadPoolExecutor() as pool:
            said = "".join(pool.map(compile_, sorted(Path(directory).glob("*.ptx"))))
    rows = _VERBOSE.findall(said)
    names = titles([row[0] for row in rows])
    return [
        Compiled(names[n], f"sm_{capability}", threads(n), int(registers), int(shared or 0), int(stores) + int(loads))
        for n, stores, loads, registers, shared in rows
    ]


def compile_all() -> tuple[list[Compiled], list[str]]:
    """Every kernel on every arch, sorted by name; which of ours spill. Nothing where nvcc was not found.

    What a driver spills on sm_100 stands in the table, and is no fault, because another driver compiles otherwise.
    """
    path = module()
    if path is None:
        return [], []
    ours = built(path)
    failed = [f"{c.kernel} {c.arch}: {c.spilled} bytes spilled" for c in ours if c.spilled]
    return sorted([*ours, *by_driver(path)], key=lambda c: (c.kernel, int(c.arch.removeprefix("sm_")))), failed
