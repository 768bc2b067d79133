"""What the measurements say: rows for people, the bars that have to be met, Markdown and a chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from bench.case import COMPILED, EAGER, OURS, UPCAST
from bench.linear_cases import TORCH_FUSED
from bench.measure import CEILING, OURS_IN_CUDA
from bench.record import opening
from rlhf_fast.training.metrics import markdown_table

COLORS = {OURS: "#0072B2", OURS_IN_CUDA: "#56B4E9", COMPILED: "#E69F00", UPCAST: "#999999", TORCH_FUSED: "#CC79A7"}


@dataclass(frozen=True)
class Bar:
    """A promise about a case: our speed as a multiple of a rival's or of the ceiling's, our seconds, or our temporary
    memory, in GiB or as a multiple of the first input (the logits: 1 would be a second [N, V] tensor)."""

    case: str
    against: str  # a contender, the ceiling, or one of OWN
    at_least: float = 0.0
    at_most: float = math.inf

    def measured(self, result: dict[str, Any]) -> float:
        """The number that the bar is about."""
        own = {
            "memory of the input": result["temporary_bytes"][OURS] / result["input_bytes"],
            "GiB": result["temporary_bytes"][OURS] / 2**30,
            "microseconds": result["seconds"][OURS]["median"] * 1e6,
        }
        return own[self.against] if self.against in OWN else speedup(result, self.against)

    def met(self, result: dict[str, Any]) -> bool:
        """Whether the number keeps the promise."""
        return self.at_least <= self.measured(result) <= self.at_most


OWN = ("memory of the input", "GiB", "microseconds")
_IN_PLACE = "token_logprobs forward + in-place backward"
AVX2_BARS = (
    Bar("token_logprobs forward fp32", CEILING, at_least=0.8),
    Bar(f"{_IN_PLACE} fp32", EAGER, at_least=6),
    Bar(f"{_IN_PLACE} fp32", COMPILED, at_least=3),
    Bar(f"{_IN_PLACE} fp32", "memory of the input", at_most=0.05),
    Bar(f"{_IN_PLACE} bf16", EAGER, at_least=6),
    Bar(f"{_IN_PLACE} bf16", COMPILED, at_least=3),
    Bar(f"{_IN_PLACE} bf16", "memory of the input", at_most=0.05),
    Bar("gae", EAGER, at_least=150),
    Bar("ppo_loss forward + backward", EAGER, at_least=5),
    Bar("ppo_loss forward + backward", COMPILED, at_least=1),
    Bar("linear_sft_loss forward + backward", CEILING, at_least=1 / 1.15),
    Bar("linear_sft_loss forward + backward", EAGER, at_least=1),
    Bar("linear_sft_loss forward + backward", TORCH_FUSED, at_least=1),
    Bar("linear_ppo_loss forward + backward", CEILING, at_least=1 / 1.15),
    Bar("linear_ppo_loss forward + backward", EAGER, at_least=1),
    Bar("linear_token_logprobs forward + backward", CEILING, at_least=1 / 1.5),
)
_SHARED = [bar for bar in AVX2_BARS if bar.against != CEILING]
AVX512_BARS = (
    Bar("token_logprobs forward fp32", CEILING, at_least=0.9),
    Bar("token_logprobs forward fp32", COMPILED, at_least=6),
    Bar("token_logprobs forward bf16", CEILING, at_least=0.8),
    *_SHARED,
    Bar("linear_sft_loss forward + backward", CEILING, at_least=1 / 1.15),
    Bar("linear_ppo_loss forward + backward", CEILING, at_least=1 / 1.1),
    Bar("linear_token_logprobs forward + backward", CEILING, at_least=1 / 1.35),
    Bar("linear_ppo_loss bf16 forward + backward", CEILING, at_least=1 / 1.5),
    Bar("linear_token_logprobs bf16 forward + backward", CEILING, at_least=1 / 2),
    Bar("dpo_loss forward + backward", EAGER, at_least=1),
    Bar("reward_loss forward + backward", EAGER, at_least=1),
)
_PPO, _GRADIENTS_GIB = "linear_ppo_loss forward + backward", (151_936 + 8192) * 4096 * 2 / 2**30
GPU_BARS = (
    Bar("token_logprobs forward bf16", CEILING, at_least=0.9),
    Bar(f"{_IN_PLACE} bf16", CEILING, at_least=0.9),
    Bar(f"{_IN_PLACE} bf16", "memory of the input", at_most=0.01),
    Bar("gae", "microseconds", at_most=20),
    Bar("ppo_loss forward + backward", EAGER, at_least=10),
    Bar(_PPO, CEILING, at_least=1 / 1.15),
    Bar(_PPO, "GiB", at_most=3 + _GRADIENTS_GIB),
    Bar("linear_ppo_loss, frozen head, forward + backward", CEILING, at_least=1 / 1.15),
)


def bars_of(device: str, kernels: str) -> Sequence[Bar]:
    """The bars of a GPU, or of a CPU whose kernels are these ("avx512", "avx2", ...: `machine()["kernels"]`)."""
    if device == "cuda":
        return GPU_BARS
    return AVX512_BARS if kernels == "avx512" else AVX2_BARS


def spread(result: dict[str, Any], names: Sequence[str]) -> float:
    """The largest ratio of the 80 % to the 20 % quantile. It is well above 1 if other work kept the machine busy."""
    return max(result["seconds"][name]["p80"] / result["seconds"][name]["p20"] for name in names)


def speedup(result: dict[str, Any], rival: str) -> float:
    """Our speed as a multiple of the rival's: the ratio of the medians."""
    return result["seconds"][rival]["median"] / result["seconds"][OURS]["median"]


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case and contender; "ours is faster" is our speed as a multiple of that contender's."""
    table = []
    for result in results:
        for name, seconds in result["seconds"].items():
            by = f"ceiling: {result['traffic'] or 'the bare matmuls'}" if name == CEILING else name
            row = {"operation": result["name"], "shape": result["shape"], "by": by}
            row |= {f"{quantile} seconds": seconds[quantile] for quantile in ("median", "p20", "p80")}
            if result["traffic"]:
                row["GB/s"] = result["traffic_bytes"] / seconds["median"] / 1e9
            if result["flops"]:
                row["GFLOP/s"] = result["flops"] / seconds["median"] / 1e9
            if CEILING in result["seconds"]:
                row["% of ceiling"] = 100 * result["seconds"][CEILING]["median"] / seconds["median"]
            if name != CEILING:
                row["ours is faster"] = f"{speedup(result, name):.3g}x" if name != OURS else ""
                row["temporary bytes"] = result["temporary_bytes"][name]
                row["max error"] = result["error"][name]
            table.append(row)
    return table


def bar_rows(results: Sequence[dict[str, Any]], bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """One row per bar whose case and rival were measured."""
    by_name = {result["name"]: result for result in results}
    return [
        {
            "operation": bar.case,
            "against": bar.against,
            "bar": f"<= {bar.at_most:g}" if bar.at_most < math.inf else f">= {bar.at_least:g}",
            "measured": bar.measured(by_name[bar.case]),
            "p80 / p20": spread(by_name[bar.case], [OURS, *({bar.against} & set(by_name[bar.case]["seconds"]))]),
            "met": "yes" if bar.met(by_name[bar.case]) else "NO",
        }
        for bar in bars
        if bar.case in by_name and (bar.against in by_name[bar.case]["seconds"] or bar.against in OWN)
    ]


def markdown(run: dict[str, Any], chart: str) -> str:
    """The whole result as one page of Markdown. chart: the name of the PNG beside it."""
    parts = [
        *opening(f"{'GPU' if 'GPU' in run['machine'] else 'CPU'} operations", run),
        "Times are medians of interleaved rounds. GB/s counts the bytes that have to be moved at least once. The "
        "ceiling moves as many bytes with plain torch in the same rounds (`sum`, on a GPU a copy, then `copy_` or "
        "`neg_`), or makes the bare matmuls. Temporary memory is the peak during one call above the memory that was "
        "held before; it includes the results. Errors are against float64, and relative where entries are large; a "
        "bf16 gradient out of matmuls has the relative error of its norm.",
        f"![Speed relative to eager PyTorch]({chart})",
        markdown_table(rows(run["cases"])),
    ]
    if run["bars"]:
        parts += ["## Bars", markdown_table(run["bars"])]
    return "\n\n".join(parts) + "\n"


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Speed of everyone as a multiple of eager's, one group of bars per case, on a logarithmic axis."""
    plot = Figure(figsize=(9, 1.2 + 0.55 * len(results)), layout="constrained")
    axes = plot.add_subplot()
    labelled: set[str] = set()
    height = 0.27
    for y, result in enumerate(results):
        names = [name for name in COLORS if name in result["seconds"]]
        for i, name in enumerate(names):
            ratio = result["seconds"][EAGER]["median"] / result["seconds"][name]["median"]
            label = None if name in labelled else name
            labelled.add(name)
            at = y + (i - (len(names) - 1) / 2) * height
            axes.barh(at, ratio - 1, height * 0.9, left=1, color=COLORS[name], label=label)
            axes.annotate(
                f"{ratio:.3g}x", (ratio, at), (3 if ratio >= 1 else -3, 0), textcoords="offset points",
                ha="left" if ratio >= 1 else "right", va="center", fontsize=8,
            )  # fmt: skip
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(results)), [f"{result['name']}\n{result['shape']}" for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speed as a multiple of eager PyTorch (longer is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return plot
