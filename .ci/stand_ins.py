"""python .ci/stand_ins.py SITE: makes a CUDA build of torch in SITE import where there is no CUDA.

PyPI has old versions of torch as CUDA builds alone, which need gigabytes of NVIDIA's libraries before they import. The
CPU's half of torch uses none of them. A stand-in has the library's name and functions, which all answer "no device";
so torch finds no GPU, as on any machine without a driver.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice
UNVERSIONED = {"cuFile": "libcufile.so.0", "cusparseLt": "libcusparseLt.so.0", "nccl": "libnccl.so.2"}
NVIDIA = re.compile(r"lib(cu|nccl|nvrtc|nvToolsExt|nvshmem)")
TEXT = re.compile(r"Get(Error|Status|Result)?(String|Name)|GetErrorEnum|ncclGetLastError")  # functions that return one


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wanted(libraries: list[Path]) -> dict[str, set[str]]:
    """By NVIDIA library, the functions that torch's libraries take from it.

    Most symbols carry their library's name as their version; the other libraries' start with a word of their own.
    """
    functions: dict[str, set[str]] = {}
    for library in libraries:
        for name in re.findall(r"NEEDED.*\[(.+)\]", said("readelf", "-d", library)):
            if NVIDIA.match(name):
                functions.setdefault(name, set())
        for symbol in said("nm", "-D", "--undefined-only", library).split():
            name, _, version = symbol.partition("@")
            homes = [home for start, home in UNVERSIONED.items() if name.startswith(start)]
            homes += [version] if NVIDIA.match(version) else []
            for home in homes:
                functions.setdefault(home, set()).add(name)
    return functions


def source(names: set[str]) -> str:
    """C functions of these names. What gives a text gives the empty one, everything else an error."""
    text, number = 'const char *NAME(void) { return ""; }\n', f"long NAME(void) {{ return {NO_DEVICE}; }}\n"
    return "".join((text if TEXT.search(name) else number).replace("NAME", name) for name in sorted(names))


def main(site: Path) -> None:
    lib = site / "torch" / "lib"
    functions = wanted(sorted(lib.glob("*.so*")))
    with tempfile.TemporaryDirectory() as scratch:
        code, script = Path(scratch, "code.c"), Path(scratch, "versions")
        for name, names in functions.items():
            code.write_text(source(names))
            script.write_text(f"{name} {{ *; }};\n")
            versions = [] if name in UNVERSIONED.values() else [f"-Wl,--version-script={script}"]
            link = ["cc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}", *versions]
            subprocess.run([*link, code, "-o", lib / name], check=True)
    print(f"stand-ins for {', '.join(functions) or 'nothing: torch is a CPU build'}")


main(Path(sys.argv[1]))
