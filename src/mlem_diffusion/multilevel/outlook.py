"""What plain ML-EM can gain with a family, before it is sampled: a prediction from measured gains and errors.

EM with the largest level has the squared error D / N^q after N evaluations (q = 2 for additive noise). Independent
coins with the best p(t) add S / C for their cost C in evaluations of the largest level: to minimise sum_kj A_kj / p_kj
at the cost sum_kj c_k p_kj gives S = (sum_k sqrt(V_k c_k))^2 with V_k = (sum_j sqrt(A_kj))^2, gains A (gains.py) and
costs c_k of one firing. So at a squared error e EM costs (D / e)^(1/q) and ML-EM about S / e. For q = 2 the speed-up is
sqrt(D e) / S: it falls with e, since the top level is fixed."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .gains import Effects, best_chain, firing_costs

_POINTS = 49  # errors at which the speed-up is predicted
_STEPS = np.unique(np.round(np.geomspace(1, 4096, 200)))


def variance_cost(effects: Effects, costs: np.ndarray, unit: float) -> tuple[float, list[int]]:
    """S, and the chain of levels for which it is smallest. costs [K]: of one more evaluation of each level; unit: of
    one evaluation of the largest level, in the same unit."""
    values = np.zeros((len(costs),) * 2)
    for low, high in itertools.combinations(range(len(costs)), 2):
        values[low, high] = np.sqrt((effects.difference(low, high) ** 2).mean(axis=0)).sum() ** 2
    chain, _ = best_chain(values, costs)
    roots = np.sqrt(values * firing_costs(costs) / unit)
    return float(sum(roots[a, b] for a, b in itertools.pairwise(chain)) ** 2), chain


def law(errors: Mapping[int, float]) -> tuple[float, float]:
    """D and q of the squared errors D / N^q, by least squares on logarithms; errors {steps N: error}, two or more."""
    steps = np.array(sorted(errors), dtype=np.float64)
    q, log_d = np.polyfit(-np.log(steps), np.log([errors[int(n)] for n in steps]), 1)
    return float(math.exp(log_d)), float(q)


def speedup(error: np.ndarray, s: float, d: float, q: float, first: float) -> np.ndarray:
    """Predicted speed-up in cost over EM with the largest level at these squared errors.

    first: cost of the chain's first level, which runs at every step, in evaluations of the largest."""
    left = error[:, None] - d / _STEPS**q  # what the coins may add
    with np.errstate(divide="ignore"):
        cost = np.where(left > 0, _STEPS * first + s / np.maximum(left, 0), np.inf).min(axis=1)
    return (d / error) ** (1 / q) / cost


def outlook(effects: Effects, costs: np.ndarray, base: float, errors: Mapping[int, float]) -> dict[str, Any]:
    """S, D, q, the chain, the predicted window of plain ML-EM, and the S that a fourfold speed-up there needs.

    costs, base: level.shared_costs, in FLOPs. errors: of the largest level alone, {steps: squared error}. The window is
    the factor of 2 in rms error, within the range of these errors, in which the least predicted speed-up is largest. At
    its ends the prediction is for jumps that stay small (Plan.largest_effect)."""
    unit = float(costs[-1]) + base
    s, chain = variance_cost(effects, costs, unit)
    (d, q), first = law(errors), (float(costs[chain[0]]) + base) / unit
    error = np.geomspace(max(errors.values()), min(errors.values()), _POINTS)
    width = int(np.searchsorted(-error, -error[0] / 4)) + 1  # points in a factor of 2 in rms error

    def least(s: float) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(speedup(error, s, d, q, first), width).min(axis=1)

    out = {"S": s, "D": d, "q": q, "chain": [effects.names[k] for k in chain]}
    if width > len(error):
        return out | {"window": None, "S_for_4": None}
    at = int(np.argmax(least(s)))
    window = {"rms_error": [math.sqrt(error[at]), math.sqrt(error[at + width - 1])], "speedup": float(least(s)[at])}
    low, high = 1e-9, s
    if least(low)[at] < 4:  # the first level alone costs too much
        return out | {"window": window, "S_for_4": None}
    while high - low > 1e-3 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if least(middle)[at] >= 4 else (low, middle)
    return out | {"window": window, "S_for_4": low}


def sentence(found: Mapping[str, Any]) -> str:
    """The outlook in words."""
    text = f"Coins on {' + '.join(found['chain'])} add S / cost with S = {found['S']:.3g}; {found['chain'][-1]} alone "
    text += f"has the error {found['D']:.3g} / N^{found['q']:.2f}."
    if (window := found["window"]) is None:
        return f"{text} Its errors span less than a factor of 2 in rms error: no window is predicted."
    far, near = window["rms_error"]
    text += (
        f" Predicted for plain ML-EM: at least {window['speedup']:.2f} times EM's speed from rms error {far:.2g} to "
    )
    text += f"{near:.2g}."
    if window["speedup"] >= 4:
        return text
    needed = found["S_for_4"]
    return f"{text} Fourfold there needs {f'S = {needed:.2g}' if needed else 'a cheaper first level'}."
