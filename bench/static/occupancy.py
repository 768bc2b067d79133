"""How many warps of a kernel a multiprocessor holds at once, by the limits of its arch.

Source: the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide. Registers are
handed out to warps in units of 256, shared memory to blocks in units of 128 bytes, of which the system keeps 1 KiB.
"""

from typing import NamedTuple

WARP = 32
REGISTER_UNIT, SHARED_UNIT, SYSTEM_SHARED = 256, 128, 1024


class Limits(NamedTuple):
    """Of one multiprocessor; shared: bytes."""

    registers: int
    shared: int
    warps: int
    blocks: int


LIMITS = {
    "sm_80": Limits(65536, 164 << 10, 64, 32),
    "sm_90": Limits(65536, 228 << 10, 64, 32),
    "sm_100": Limits(65536, 228 << 10, 64, 32),
}


def _units(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit


def occupancy(arch: str, threads: int, registers: int, shared: int) -> int:
    """Warps at once; 0 where not even one block fits. registers: of a thread; shared: bytes of a block."""
    limits, warps = LIMITS[arch], -(-threads // WARP)
    of_warp = _units(max(registers, 1) * WARP, REGISTER_UNIT)
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // of_warp // warps,
        limits.shared // (_units(shared, SHARED_UNIT) + SYSTEM_SHARED),
    )
    return blocks * warps
