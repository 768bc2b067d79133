"""The build: setup.py, with the CUDA C++ kernels for this GPU's arch alone.

A dry run builds the CPU's core, which is there already, and the emulation of the CUDA C++ kernels.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from bench.device import CUDA
from bench.gpu.hour import ROOT
from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work

CORES = 16
OF_CPP, OF_CU = 12.0, 35.0  # seconds to compile a file, assumed


def work(setting: Setting) -> Iterator[Work]:
    """The files on `CORES` cores, and the slowest of them."""
    cpp, cu = (len(list((ROOT / "csrc").glob(f"{which}"))) for which in ("cpu/*.cpp", "cuda/*.cu"))
    yield Work(seconds=setting.pick(max((3 * cpp * OF_CPP + cu * OF_CU) / CORES, OF_CU), 1.0))


def environment(setting: Setting) -> dict[str, str]:
    """What setup.py reads."""
    if setting.dry:
        return {"RLHF_FAST_CUDA": "0"}
    major, minor = torch.cuda.get_device_capability()
    return {"RLHF_FAST_CUDA_ARCH": f"{major}{minor}"}


def run(setting: Setting, found: Found) -> None:
    """The GPU; what building took; whether what came out loads in a fresh process."""
    about = {} if setting.dry else CUDA().about()
    found.row("GPU", about.get("GPU", "none: a dry run"), ", ".join(f"{k} {v}" for k, v in about.items() if k != "GPU"))
    given = environment(setting)
    said = ", ".join(f"{key}={value}" for key, value in given.items())
    _timed(found, f"setup.py, {said}", [sys.executable, "setup.py", "build_ext", "--inplace"], given)
    if setting.dry:
        _timed(found, "the emulation", [sys.executable, "-m", "tests.emulation.cuda_on_host"], {})
    modules = ["rlhf_fast._cpu"] if setting.dry else ["rlhf_fast._cpu", "rlhf_fast._cuda"]
    _timed(found, f"{', '.join(modules)}: loading", [sys.executable, "-c", f"import {', '.join(modules)}"], {})


def _timed(found: Found, what: str, command: list[str], environment: dict[str, str]) -> None:
    """A row with the time of the command; a failure where it fails."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    found.row(what, f"{time.monotonic() - began:.1f} s", f"exit code {done.returncode}")
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        found.details[what] = said[-40:]
        found.fail(f"{what}: exit code {done.returncode}: {' '.join(said[-1:])}")
