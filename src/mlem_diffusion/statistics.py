"""Errors of samples against a reference, frontiers and convex hulls of error against cost.
Errors are mean squared differences over channels and pixels, for unclipped images on the scale [-1, 1]."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor


def squared_errors(samples: Tensor, reference: Tensor) -> np.ndarray:
    """Mean squared difference of each image, float64 [N], for two float stacks [N, 3, H, W] (unclipped)."""
    return (samples.detach().cpu().double() - reference.detach().cpu().double()).square().flatten(1).mean(1).numpy()


def frontier(rows: Iterable[dict[str, Any]], cost: str, measure: str) -> list[dict[str, Any]]:
    """The lower-left frontier, cheapest first: the rows with a smaller `measure` than all rows of equal or lower cost.
    Rows with a missing or non-positive cost or measure are left out, such as the reference compared with itself."""
    usable = [r for r in rows if (r.get(cost) or 0) > 0 and (r.get(measure) or 0) > 0]
    best: list[dict[str, Any]] = []
    for row in sorted(usable, key=lambda r: (r[cost], r[measure])):
        if not best or row[measure] < best[-1][measure]:
            best.append(row)
    return best


def lower_hull(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Errors (ascending) and costs (descending) at the corners of the convex curve of least cost against error, for
    points (error, cost) in ascending order (Andrew's monotone chain). A mixture of two points is on their chord."""
    x: list[float] = []
    y: list[float] = []
    for error, cost in points:
        if y and cost >= y[-1]:
            continue  # not cheaper than a point of smaller error
        # while the last corner is on or above the chord from the one before it to this point
        while len(x) > 1 and (y[-1] - y[-2]) * (error - x[-2]) >= (cost - y[-2]) * (x[-1] - x[-2]):
            del x[-1], y[-1]
        x.append(error)
        y.append(cost)
    return x, y
