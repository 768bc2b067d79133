"""Upper envelopes of points in the plane of KL and reward, and means with standard errors over seeds."""

import math
import statistics
from collections.abc import Sequence

Point = tuple[float, float, float]  # step (or N of best-of-N, or a place on a path), KL, reward


def envelope(points: Sequence[Point], start: float, grid: Sequence[float]) -> list[float]:
    """The best reward of a point with at most this KL, for each KL of the grid; `start` is the reference's reward."""
    return [max([start, *(reward for _, kl, reward in points if kl <= limit)]) for limit in grid]


def mean_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error, of two values or more."""
    return {"mean": statistics.fmean(values), "se": statistics.stdev(values) / math.sqrt(len(values))}


def mean_errors(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean and standard error over the curves, at each place of the grid."""
    places = [mean_error(column) for column in zip(*curves, strict=True)]
    return {key: [place[key] for place in places] for key in ("mean", "se")}
