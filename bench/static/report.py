"""The tables of `bench static`, and what has changed since the committed ones."""

from typing import Any

from rlhf_fast.training.metrics import markdown_table

H200_BYTES = 4.8e12  # a second, by its data sheet
NOTES = (
    "Nothing on this page was measured on a GPU. Registers, shared memory and spills are ptxas's. Occupancy is the "
    "share of a multiprocessor's warps that fit at once by these numbers and the arch's limits. sm_100 runs what a "
    "driver compiles from the PTX of the CUDA C++ kernels.",
)
TRAFFIC_NOTES = (
    "Loads and stores are bytes of global memory that the kernels of one call ask for, by element of the first tensor "
    "(of the longest, where the first has a number per row). They are counted access by access while the kernels run "
    "on the CPU, with full masks and every output asked for. A second pass over the same numbers counts again, though "
    "a cache may serve it; statistics and partial sums are among the bytes.",
    "Ideal are the bytes that no kernel can avoid: each input read once, each output written once. The bound is "
    "computed: an H200's 4.8 TB/s over the counted bytes. It is no measurement.",
)


def traffic_rows(traffic: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The counted rows, and the bound."""
    return [
        {
            "operator": row["operator"],
            "by": row["by"],
            "shape": row["shape"],
            "loads / element": f"{row['loads']:.2f} B",
            "stores / element": f"{row['stores']:.2f} B",
            "ideal": f"{row['ideal']:.2f} B",
            "of ideal": f"{row['of ideal']:.2f}",
            "H200, computed": f"{H200_BYTES / (row['loads'] + row['stores']) / 1e9:,.0f} G elements/s",
        }
        for row in traffic
    ]


def kernel_rows(kernels: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per kernel; of each arch the registers and the occupancy, and what is spilled."""
    rows: dict[str, dict[str, str]] = {}
    for found in kernels:
        row = rows.setdefault(found["kernel"], {"kernel": f"`{found['kernel']}`", "threads": str(found["threads"])})
        if found["loads"]:  # of the last arch; the PTX of all has the same
            row["loads of 16 B / all, in PTX"] = f"{found['loads'].get('16', 0)} / {sum(found['loads'].values())}"
        spilled = f", {found['spilled']} B spilled" if found["spilled"] else ""
        said = f"{found['registers']} registers, {found['shared']} B shared, {found['occupancy']:.0%}{spilled}"
        row[found["arch"]] = said
    return list(rows.values())


def markdown(record: dict[str, Any]) -> str:
    """The page."""
    made = ", ".join(f"{name} {version}" for name, version in record["made with"].items())
    parts = ["# GPU kernels without a GPU", f"`python -m bench static`, {made}.", *NOTES]
    parts += ["## Global memory", *TRAFFIC_NOTES, markdown_table(traffic_rows(record["traffic"]))]
    for title, kernels in record["kernels"].items():
        parts += [f"## {title}", markdown_table(kernel_rows(kernels)) if kernels else record["not compiled"]]
    return "\n\n".join(parts) + "\n"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a committed record says otherwise: traffic always, a compiler's numbers where the compiler is the same."""
    lines = []
    before = {(row["operator"], row["by"], row["shape"]): row for row in old["traffic"]}
    after = {(row["operator"], row["by"], row["shape"]): row for row in new["traffic"]}
    for key in [*before, *(key for key in after if key not in before)]:
        for name in ("loads", "stores", "ideal"):
            was, is_ = (side.get(key, {}).get(name) for side in (before, after))
            if was is None or is_ is None or abs(was - is_) > max(0.005, 0.005 * was):
                lines.append(f"{' '.join(key)}: {name} expected {was}, got {is_}")
    for title, kernels in new["kernels"].items():
        if kernels and old["made with"].get(title) == new["made with"].get(title):
            lines += _of_kernels(old["kernels"].get(title, []), kernels)
    return lines


def _of_kernels(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    before, after = ({(row["kernel"], row["arch"]): row for row in rows} for rows in (old, new))
    names = ("threads", "registers", "shared", "spilled", "loads")
    return [
        f"{' '.join(key)}: {name} expected {before.get(key, {}).get(name)}, got {after.get(key, {}).get(name)}"
        for key in sorted({*before, *after})
        for name in names
        if before.get(key, {}).get(name) != after.get(key, {}).get(name)
    ]
