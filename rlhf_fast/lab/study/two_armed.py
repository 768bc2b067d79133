"""The two-armed bandit of `rlhf-fast study variance`: exact variances of all estimators, over p.

Each variance is per logit and for one sampled draw: RLOO's is k times the variance of the mean of a group of k. The
value model's baseline is the expected reward, which a value model learns where there is one state. The greedy baseline
lowers REINFORCE's variance up to p = r1 / (2 (r1 - r2)) and raises it beyond.
"""

from typing import Any

from rlhf_fast.exact import two_armed

REWARDS = ((1.0, 0.5), (3.0, 1.0), (1.0, 0.1))
GROUPS = (2, 3, 4)


def variances(p: float, r1: float, r2: float) -> dict[str, float]:
    """Estimator -> variance of one draw, where the better arm has probability p."""
    return {
        "REINFORCE": two_armed.variance(p, r1, r2),
        "ReMax": two_armed.variance(p, r1, r2, two_armed.greedy_baseline(p, r1, r2)),
        **{f"RLOO, k = {k}": k * two_armed.rloo_variance(p, r1, r2, k) for k in GROUPS},
        "value model": two_armed.variance(p, r1, r2, two_armed.mean_baseline(p, r1, r2)),
    }


def bandits(points: int = 100) -> list[dict[str, Any]]:
    """For each of REWARDS the crossover, and the estimators' variances at p = 0, 1 / points, ..., 1."""
    grid = [i / points for i in range(points + 1)]
    cases = []
    for r1, r2 in REWARDS:
        rows = [variances(p, r1, r2) for p in grid]
        curves = {name: [row[name] for row in rows] for name in rows[0]}
        cases.append({"r1": r1, "r2": r2, "crossover": two_armed.crossover(r1, r2), "p": grid, "variance": curves})
    return cases


def table(places: tuple[float, ...] = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)) -> list[dict[str, Any]]:
    """Rows for the console, on both sides of each crossover that there is."""
    rows = []
    for r1, r2 in REWARDS:
        for p in places:
            exact = variances(p, r1, r2)
            lower = "lower" if exact["ReMax"] < exact["REINFORCE"] else "HIGHER"
            cells = {name: f"{value:.5f}" for name, value in exact.items()}
            rows.append({"r1, r2": f"{r1:g}, {r2:g}", "p": f"{p:g}", **cells, "ReMax against REINFORCE": lower})
    return rows
