"""The bandits' configs; as in `rlhf_fast.config`, only values and checks of them."""

from dataclasses import dataclass
from typing import Literal

from rlhf_fast.config.fields import arg, check, check_fields, required


@dataclass(frozen=True, kw_only=True)
class BanditConfig:
    """What both bandits take."""

    out: str = required("JSON file of the results; the plots go beside it.")
    n: int = arg(20, "Preferences.", at_least=1)
    ratios: list[float] = arg([0.5, 2.0, 5.0, 10.0], "m/n of RMB-PO+, each a method of its own.")
    beta: float = arg(0.01, "Strength of the KL to the uniform policy.", above=0)
    seeds: int = arg(60, "Runs, each with data and starts of its own that all methods share.", at_least=2)
    first_seed: int = arg(2021, "The first seed; the others follow it.", at_least=1)
    pref_states: bool = arg(True, "RMB-PO+ trains on the preferences' states too, as the published code does.")
    sizes: list[int] = arg([10, 20, 40], "n of the plot of the gap against n; [] for none.")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("ratios", "sizes"):
            check(self, name, lambda v: all(x > 0 for x in v) and len(set(v)) == len(v), "distinct numbers > 0")
        if not self.pref_states:
            check(self, "ratios", lambda v: all(int(x * n) >= 1 for x in v for n in (self.n, *self.sizes)), "m >= 1")


@dataclass(frozen=True, kw_only=True)
class LinearBanditConfig(BanditConfig):
    """DPO, RMB-PO and RMB-PO+ on the linear bandit of arXiv 2312.10584, over many seeds, beside the published figures.

    RMB-PO learns a reward from the n preferences and optimises it on their states, RMB-PO+ on m more states too.
    """

    mode: Literal["faithful", "exact"] = arg(
        "faithful", "The published optimisers and step counts, or the global optimum of every objective."
    )
    setting: Literal["matched", "mismatched"] = arg(
        "matched", "The policy's features: the reward's features, or the same with sine and cosine swapped."
    )


@dataclass(frozen=True, kw_only=True)
class NeuralBanditConfig(BanditConfig):
    """DPO, RMB-PO and RMB-PO+ on the neural bandit of arXiv 2312.10584: 50 numbers in a state, ten actions, networks.

    Every method starts from the same policy; DPO in both forms, RMB-PO+ with as many epochs and with as many steps.
    """

    reward: Literal["additive", "contextual"] = arg(
        "additive", "The true reward: additive as published (the same action is best in every state), or contextual."
    )
    n: int = arg(50, "Preferences.", at_least=1)
    seeds: int = arg(50, "Runs, each with networks and data of its own that all methods share.", at_least=2)
    sizes: list[int] = arg([], "n of the plot of the gap against n.")


def seeds_of(config: BanditConfig) -> range:
    """The seeds of all runs."""
    return range(config.first_seed, config.first_seed + config.seeds)
