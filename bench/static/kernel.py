"""One compiled kernel, as the tables have it."""

from typing import Any, NamedTuple

from bench.static.occupancy import LIMITS, occupancy


class Compiled(NamedTuple):
    """A kernel for one arch. shared: bytes of a block's static shared memory. spilled: bytes, of stores and loads.

    loads: bytes of a load from global memory -> how many such loads the PTX has, where it was read.
    """

    kernel: str
    arch: str
    threads: int
    registers: int
    shared: int
    spilled: int
    loads: dict[int, int] | None = None

    def row(self) -> dict[str, Any]:
        """For JSON, with the occupancy."""
        found = self._asdict()
        found["loads"] = None if self.loads is None else {str(size): n for size, n in sorted(self.loads.items())}
        warps = occupancy(self.arch, self.threads, self.registers, self.shared)
        return found | {"warps": warps, "occupancy": warps / LIMITS[self.arch].warps}
