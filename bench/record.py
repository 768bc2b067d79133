"""What every file of results holds: the command, the date, the machine."""

import datetime
import importlib.metadata
import os
import platform
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.ops import dispatch

ROOT = Path(__file__).resolve().parent.parent  # where `python -m bench` runs


def machine() -> dict[str, Any]:
    """The processor, its threads, the kernels and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": dispatch._cpu.isa() if dispatch.COMPILED else "reference",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlhf_fast": rlhf_fast.__version__,
        "load before": round(os.getloadavg()[0], 1),
    }


def versions(*packages: str) -> dict[str, str]:
    """Package -> version, of the packages that are installed."""
    return {name: importlib.metadata.version(name) for name in packages if find_spec(name.replace("-", "_"))}


def about_run() -> dict[str, Any]:
    """{"command", "date", "machine"}."""
    return {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
    }
