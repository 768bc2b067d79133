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


def functions(libraries: list[Path]) -> dict[str, set[str]]:
    """By NVIDIA library, the names that torch's libraries want of it: `name@library`, or a name of its kind."""
    wanted: dict[str, set[str]] = {}
    for library in libraries:
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r"NEEDED.*\[(.+)\]", needed):
            if NVIDIA.match(name):
                wanted.setdefault(name, set())
        symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        for symbol in symbols.stdout.split():
            name, _, version = symbol.partition("@")
            home = version if NVIDIA.match(version) else next((UNVERSIONED[k] for k in UNVERSIONED if name.startswith(k)), "")
            if home:
                wanted.setdefault(home, set()).add(name)
    return wanted


def source(names: set[str]) -> str:
    """C functions of these names. What gives a text gives the empty one, everything else an error."""
    text = "const char *{}(void) {{ return \"\"; }}"
    number = "long {}(void) {{ return %d; }}" % NO_DEVICE
    is_text = re.compile(r"(Get|get)(Error|Status|Result)?(String|Name)|GetLastError")
    return "\n".join((text if is_text.search(name) else number).format(name) for name in sorted(names)) + "\n"


def main(site: Path) -> None:
    lib = site / "torch" / "lib"
    wanted = functions(sorted(lib.glob("*.so*")))
    with tempfile.TemporaryDirectory() as scratch:
        for name, names in wanted.items():
            code, script = Path(scratch, "code.c"), Path(scratch, "versions")
            code.write_text(source(names))
            script.write_text(f"{name} {{ *; }};\n")
            versions = [] if name in UNVERSIONED.values() else [f"-Wl,--version-script={script}"]
            link = ["cc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}", *versions, code, "-o", lib / name]
            subprocess.run(link, check=True)
    print(f"stand-ins for {', '.join(wanted) or 'nothing: torch is a CPU build'}")


main(Path(sys.argv[1]))
