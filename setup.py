"""Builds the compiled core: rlhf_fast._cpu, and rlhf_fast._cuda where nvcc is found.

Needs a C++17 compiler with OpenMP and no torch. A build.ninja of our own keeps builds incremental and tracks headers.
Environment: CXX (compiler), CUDA_HOME, RLHF_FAST_CUDA=0 (skip CUDA), RLHF_FAST_WERROR=1 (warnings are errors),
RLHF_FAST_CXXFLAGS (more flags for the C++ compiler and linker, such as a sanitizer's), RLHF_FAST_CUDA_ARCH=90 (machine
code for one compute capability alone, which takes a third of the time).
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MORE_CXXFLAGS = os.environ.get("RLHF_FAST_CXXFLAGS", "")
CXXFLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
# Both passes turn selects into jumps, and loops with jumps do not vectorise.
KERNEL_FLAGS = "-fno-thread-jumps -fno-tree-pre"
# Every kernel source is compiled once per instruction set, in a namespace of that name; the widest is chosen at load.
ISA_FLAGS = {"scalar": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
NVCCFLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
ALL_ARCHS = "-gencode arch=compute_80,code=[sm_80,sm_90,compute_80]"  # nothing in the kernels is for 90 alone
RULES = """\
ninja_required_version = 1.5
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -fopenmp $more $in -o $out
rule nvlink
  command = $nvcc -shared -cudart static $in -o $out
"""


def find_nvcc() -> str | None:
    """The CUDA compiler, or None with one line that says why not."""
    if os.environ.get("RLHF_FAST_CUDA") == "0":
        print("rlhf-fast: RLHF_FAST_CUDA=0, building the CPU core only")
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        print("rlhf-fast: nvcc not found, building the CPU core only")
    return nvcc


def find_cxx() -> str | None:
    """The C++ compiler, or None with one line that says why not."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    why = "no C++ compiler found"
    if cxx:
        probe = [*shlex.split(cxx), "-std=c++17", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
        if subprocess.run(probe, input=b"#include <omp.h>", stderr=subprocess.DEVNULL).returncode == 0:
            return cxx
        why = f"{cxx} does not compile C++17 with OpenMP (another one: CXX=...)"
    print(f"rlhf-fast: {why}, operations will run on their PyTorch reference")
    return None


def gpu_archs() -> str:
    """nvcc's flags of the GPUs to compile for."""
    arch = os.environ.get("RLHF_FAST_CUDA_ARCH")
    if arch is not None and not arch.isdecimal():
        raise SystemExit(f"rlhf-fast: RLHF_FAST_CUDA_ARCH: expected a compute capability such as 90, got {arch!r}")
    return f"-gencode arch=compute_{arch},code=sm_{arch}" if arch else ALL_ARCHS


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja into a directory that outlives pip's temporary ones, runs ninja, hands the modules over."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cxx = find_cxx()
        self.nvcc = find_nvcc() if self.cxx else None
        wanted = {"rlhf_fast._cpu": self.cxx, "rlhf_fast._cuda": self.nvcc}
        self.extensions[:] = [extension for extension in self.extensions if wanted[extension.name]]

    def build_extensions(self) -> None:
        if not self.extensions:
            return
        for tool in ("pybind11", "ninja"):
            if importlib.util.find_spec(tool) is None:  # pip brings them, but not with --no-build-isolation
                raise SystemExit(f"rlhf-fast: {tool} not found, which the build needs: pip install pybind11 ninja")
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build.mkdir(parents=True, exist_ok=True)
        modules = {e.name: build / self.get_ext_filename(e.name.rpartition(".")[2]) for e in self.extensions}
        text = self.build_ninja(modules, self.pybind11_headers(build))
        if not (build / "build.ninja").exists() or (build / "build.ninja").read_text() != text:
            (build / "build.ninja").write_text(text)
        import ninja

        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build)]
        subprocess.run(command + (["-v"] if self.verbose > 1 else []), check=True)
        for name, module in modules.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(module), str(target))

    def pybind11_headers(self, build: Path) -> Path:
        """A copy that stays put: pip brings its own to a new place each time, which would compile everything again."""
        import pybind11

        headers = build / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            unfinished = Path(tempfile.mkdtemp(dir=build))
            shutil.copytree(pybind11.get_include(), unfinished, dirs_exist_ok=True)
            unfinished.rename(headers)
        return headers

    def build_ninja(self, modules: dict[str, Path], pybind11_headers: Path) -> str:
        includes = f" -I{escape(pybind11_headers)} -I{escape(sysconfig.get_paths()['include'])}"
        warnings = " -Wall -Wextra" + (" -Werror" if os.environ.get("RLHF_FAST_WERROR") == "1" else "")
        lines = [RULES, f"cxx = {self.cxx}", f"nvcc = {self.nvcc}", f"more = {MORE_CXXFLAGS}"]

        def compile_(rule: str, source: Path, flags: str, tag: str = "") -> str:
            target = f"{source.stem}{tag}.o"
            lines.append(f"build {target}: {rule} {escape(source)}\n  flags = {flags}")
            return target

        csrc = ROOT / "csrc"
        objects = [compile_("cxx", csrc / "bind_cpu.cpp", f"{CXXFLAGS} -O1{warnings}{includes} {MORE_CXXFLAGS}")]
        for isa, isa_flags in ISA_FLAGS.items():
            for source in sorted((csrc / "cpu").glob("*.cpp")):
                flags = f"{CXXFLAGS} {KERNEL_FLAGS}{warnings} {isa_flags} -DISA={isa} {MORE_CXXFLAGS}"
                objects.append(compile_("cxx", source, flags, f".{isa}"))
        if "rlhf_fast._cpu" in modules:
            lines.append(f"build {escape(modules['rlhf_fast._cpu'].name)}: link {' '.join(objects)}")
        if "rlhf_fast._cuda" in modules:
            objects = [compile_("cxx", csrc / "bind_cuda.cpp", f"{CXXFLAGS} -O1{warnings}{includes}")]
            nvccflags = f"{NVCCFLAGS} {gpu_archs()}"
            nvccflags += " -Werror all-warnings" if os.environ.get("RLHF_FAST_WERROR") == "1" else ""
            for source in sorted((csrc / "cuda").glob("*.cu")):
                objects.append(compile_("nvcc", source, nvccflags, ".cuda"))
            lines.append(f"build {escape(modules['rlhf_fast._cuda'].name)}: nvlink {' '.join(objects)}")
        return "\n".join(lines) + "\n"


setup(
    packages=[*find_packages(include=["rlhf_fast*"]), "rlhf_fast.kernels"],
    package_dir={"rlhf_fast.kernels": "kernels"},
    ext_modules=[Extension("rlhf_fast._cpu", sources=[]), Extension("rlhf_fast._cuda", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
