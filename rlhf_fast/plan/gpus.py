"""GPUs and their memory, and what of it a run can have."""

import re

GIB = 1 << 30
MEMORY = {
    "T4 16GB": 15360 << 20,
    "RTX 4090 24GB": 24564 << 20,
    "A10G 24GB": 23028 << 20,
    "L4 24GB": 23034 << 20,
    "RTX 5090 32GB": 32607 << 20,
    "A100 40GB": 40960 << 20,
    "L40S 48GB": 46068 << 20,
    "A100 80GB": 81920 << 20,
    "H100 80GB": 81559 << 20,
    "H200 141GB": 143771 << 20,
    "B200 180GB": 183359 << 20,
}
"""Bytes, as nvidia-smi lists them."""
CONTEXT = 1 * GIB
"""For CUDA's context and its libraries' workspaces, none of which is a tensor."""
FRAGMENTATION = 0.05
"""Of the tensors' peak: what the caching allocator loses between blocks."""


def needed(peak: int) -> int:
    """Memory of a GPU on which tensors of `peak` bytes fit."""
    return round(peak * (1 + FRAGMENTATION)) + CONTEXT


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24 GB" or "25769803776". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"memory: expected bytes, or a number with a unit as in 24GiB, got {text!r}")
    number, unit, binary = match.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return round(float(number) * (1024 if binary else 1000) ** power)
