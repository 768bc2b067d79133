"""The kinds of tries by name, in the order of the report. A new kind is a module with a KIND and a line here."""

from bench.trust import crashes, damage, disk, kills, ops, ranks, reuse, rewards, rows, soak, two
from bench.trust.kind import Kind

KINDS: dict[str, Kind] = {
    "crashes": crashes.KIND,
    "kills": kills.KIND,
    "two": two.KIND,
    "ranks": ranks.KIND,
    "disk": disk.KIND,
    "damage": damage.KIND,
    "reuse": reuse.KIND,
    "rows": rows.KIND,
    "rewards": rewards.KIND,
    "ops": ops.KIND,
    "soak": soak.KIND,
}
