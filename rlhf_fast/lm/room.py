"""Whether a process has room for a whole copy of a model in shards, which passes without gradients need.

Left out: what the passes add to the copy, such as a KV cache, which `rlhf-fast plan` knows; and on a CPU the limit of a
container. A run that is refused could not have made the copy at all.
"""

import re
from pathlib import Path

import torch

from rlhf_fast.ranks import current

_MEMINFO = Path("/proc/meminfo")
_GIB = 1 << 30
ROLLOUTS, EVALUATIONS, PASSES = "rollouts", "evaluations", "passes without gradients"
INSTEAD = "the sampler `vllm` decodes on a server, without this copy"


class NoRoom(ValueError):
    """A process has no room for a whole copy."""


def free_bytes(device: torch.device) -> tuple[int, str] | None:
    """Bytes that this process can still have, and where: on its GPU, or its share of the machine's memory.

    None where the system does not say.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached, f"on GPU {device.index or 0}"
    if not _MEMINFO.exists() or not (match := re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())):
        return None
    local = current().beside
    shared = f", shared by {local} processes" if local > 1 else ""
    return int(match[1]) * 1024 // local, f"in memory{shared}"


def check_room(copies: int, whose: str, what: str, device: torch.device, *, later: int = 0, instead: str = "") -> None:
    """NoRoom, in every process, where a process has no room for whole copies of models in shards.

    copies: their bytes in all, as `sharding.whole_bytes` counts them; without any nothing is asked. whose: the models'
    roles. what: what the copies are for. later: bytes that the run will hold besides, and does not hold yet. instead:
    what does without the copies. All processes call it.
    """
    if copies:
        found = [one for one in current().gather(free_bytes(device)) if one is not None]
        if found and (least := min(found))[0] < copies + later:
            raise NoRoom(refusal(whose, what, copies, later, *least, instead))


def refusal(whose: str, what: str, copies: int, later: int, free: int, where: str, instead: str = "") -> str:
    """The line that says that there is no room. The numbers are bytes."""
    beside = f" beside {_gib(later)} GiB for what a step holds" if later else ""
    wanted = f"room for the whole {whose} in {what}, {_gib(copies)} GiB{beside}"
    line = f"shard: expected {wanted}, got {_gib(free)} GiB {where}"
    return f"{line}; {instead}" if instead else line


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g}" if size < 100 * _GIB else f"{size / _GIB:.1f}"
