"""The weight of the KL penalty: fixed, or adapted towards a target (arXiv 1909.08593, section 2.2)."""

from typing import Any


class KLController:
    """`coef` is the weight of the KL penalty.

    target: KL per completion in nats, or None for a fixed weight. horizon: the larger, the slower `coef` moves.
    """

    def __init__(self, coef: float, target: float | None, horizon: float) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl_per_completion: float, completions: int) -> None:
        """Moves `coef` after a round of `completions` completions, whose mean KL is `kl_per_completion` nats."""
        if self.target is not None:
            error = max(-0.2, min(0.2, kl_per_completion / self.target - 1))
            self.coef *= 1 + error * completions / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must carry."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict`."""
        self.coef = state["coef"]
