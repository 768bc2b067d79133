"""Rows for people, bars and Markdown of `python -m bench ranks`."""

from typing import Any

from bench.ranks import computed
from bench.record import page
from rlhf_fast.training.metrics import markdown_table

ONE = "1 process"
BAR = 0.9


def speed_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each stage and contender; the ratio is the median over the rounds of that round's ratio."""
    table = []
    for result in results:
        for name, seconds in result["seconds_per_step"].items():
            row = {"stage": _stage(result), "processes": name, "steps/s": 1 / seconds["median"]}
            row |= {f"{quantile} seconds": seconds[quantile] for quantile in ("median", "p20", "p80")}
            row["CPU time seconds"] = result["cpu_seconds_per_step"][name]["median"]
            if name != ONE:
                row["beside one process"] = f"{result['ratios'][name]['median']:.3g}x"
            table.append(row)
    return table


def bar_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps/s beside one process, and the collectives beside the formula."""
    table = []
    for result in results:
        for name, ratio in result["ratios"].items():
            least = BAR * result["faster"][name]
            row = {"stage": _stage(result), "what": f"steps/s, {name}", "bar": f">= {least:.3g}x"}
            table.append(row | {"measured": f"{ratio['median']:.3g}x", "met": _met(ratio["median"] >= least)})
        for name, traffic in result["traffic"].items():
            row = {"stage": _stage(result), "what": f"collectives, {name}", "bar": "as the formula says"}
            said = "; ".join(traffic["differences"]) or "equal"
            table.append(row | {"measured": said, "met": _met(not traffic["differences"])})
    return table


def traffic_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each stage, contender and kind of collective."""
    table = []
    for result in results:
        for name, traffic in result["traffic"].items():
            for kind, counted in traffic["found"].items():
                row = {"stage": _stage(result), "processes": name, "collective": kind, "count": counted["count"]}
                table.append(row | {"sent bytes": counted["bytes"]})
    return table


def tables(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows."""
    results = record["results"]
    return {
        "Steps": speed_rows(results),
        "Collectives of a step, or of a round": traffic_rows(results),
        "Bars": record["bars"],
    }


def markdown(record: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    return page("Several processes beside one", record, tables(record))


def computed_markdown() -> str:
    """The computed table, with what it is computed from."""
    reached = ", ".join(f"{part:.0%} of the {name}" for name, part in computed.REACHED.items())
    figures = [
        f"{computed.FLOPS / 1e12:.0f} TFLOP/s in bf16",
        f"{computed.MEMORY / 1e12:g} TB/s of memory",
        f"{computed.LINK / 1e9:.0f} GB/s of NVLink in each direction",
        f"{computed.NETWORK * 8 / 1e9:.0f} Gb/s between two machines",
    ]
    line = f"Computed, not measured, from {', '.join(figures)}, of which {reached} count as reached."
    return f"{line}\n\n{markdown_table(computed.table())}\n"


def _stage(result: dict[str, Any]) -> str:
    return f"{result['stage']}, {result['case']}"


def _met(holds: bool) -> str:
    return "yes" if holds else "NO"
