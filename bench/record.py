"""What every file of results holds: the command, the date, the machine; and the pages that show it."""

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
from rlhf_fast.ops.head_layers import bf16_unit
from rlhf_fast.training.metrics import markdown_table

BF16_UNITS = ("none", "vdpbf16ps", "AMX")

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
        "bf16 unit": BF16_UNITS[bf16_unit()],
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


def opening(title: str, record: dict[str, Any]) -> list[str]:
    """The first two paragraphs of a page of Markdown: its title, then the command, the date and the machine."""
    about = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    return [f"# {title}", f"`{record['command']}`, {record['date']}: {about}."]


def page(title: str, record: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> str:
    """A whole page of Markdown: the opening, then each table under its title."""
    parts = opening(title, record)
    for name, rows in tables.items():
        parts += [f"## {name}", markdown_table(rows)]
    return "\n\n".join(parts) + "\n"
