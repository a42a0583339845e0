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
from numpy.lib.stride_tricks import sliding_window_view

from .gains import Effects, best_chain, firing_costs

_POINTS = 49  # errors at which the speed-up is predicted
_STEPS = np.unique(np.round(np.geomspace(1, 4096, 200)))


def variance_cost(effects: Effects, costs: np.ndarray, unit: float) -> tuple[float, list[int]]:
    """S, and the chain of levels for which it is smallest; unit: cost of one evaluation of the largest level."""
    values = np.zeros((len(costs),) * 2)
    for low, high in itertools.combinations(range(len(costs)), 2):
        values[low, high] = np.sqrt(effects.gain(low, high)).sum() ** 2
    chain, _ = best_chain(values, costs)
    roots = np.sqrt(values * firing_costs(costs) / unit)
    return float(sum(roots[a, b] for a, b in itertools.pairwise(chain)) ** 2), chain


def law(errors: Mapping[int, float]) -> tuple[float, float]:
    """D and q of the squared errors D / N^q, by least squares on logarithms; errors {steps N: error}, two or more."""
    steps = np.array(sorted(errors), dtype=np.float64)
    q, log_d = np.polyfit(-np.log(steps), np.log([errors[int(n)] for n in steps]), 1)
    return float(math.exp(log_d)), float(q)


def speedup(error: np.ndarray, s: float, d: float, q: float, first: float) -> tuple[np.ndarray, np.ndarray]:
    """Predicted speed-up in cost over the largest level alone at these squared errors, and the S of a fourfold one.
    first: cost of the chain's first level, which runs at every step, in evaluations of the largest. The S is negative
    where the first level alone costs too much."""
    alone, left = (d / error) ** (1 / q), error[:, None] - d / _STEPS**q  # what the coins may add
    allowed, left = left > 0, np.maximum(left, 1e-300)
    cost = np.where(allowed, _STEPS * first + s / left, np.inf).min(axis=1)
    return alone / cost, np.where(allowed, (alone[:, None] / 4 - _STEPS * first) * left, -1.0).max(axis=1)


def outlook(effects: Effects, costs: np.ndarray, base: float, errors: Mapping[int, float]) -> dict[str, Any]:
    """S, D, q, the chain, the predicted window of plain ML-EM, and the S that a fourfold speed-up there needs.
    costs, base: level.shared_costs, in FLOPs. errors: of the largest level alone, {steps: squared error}. The window is
    the factor of 2 in rms error, within the range of these errors, in which the least predicted speed-up is largest. It
    holds as long as single firings change little (Plan.largest_effect)."""
    unit = float(costs[-1]) + base
    s, chain = variance_cost(effects, costs, unit)
    (d, q), first = law(errors), (float(costs[chain[0]]) + base) / unit
    error = np.geomspace(max(errors.values()), min(errors.values()), _POINTS)
    width = int(np.searchsorted(-error, -error[0] / 4)) + 1  # points in a factor of 2 in rms error
    out = {"S": s, "D": d, "q": q, "chain": [effects.names[k] for k in chain], "window": None, "S_for_4": None}
    if width <= len(error):
        gain, needed = (sliding_window_view(v, width).min(axis=1) for v in speedup(error, s, d, q, first))
        at = int(np.argmax(gain))
        ends = [math.sqrt(error[at]), math.sqrt(error[at + width - 1])]
        out["window"] = {"rms_error": ends, "speedup": float(gain[at])}
        out["S_for_4"] = float(needed[at]) if needed[at] > 0 else None
    return out


def sentence(found: Mapping[str, Any]) -> str:
    """The outlook in words."""
    by_steps = ", ".join(f"{s:.3g} on {n} steps" for n, s in found.get("S_by_steps", {}).items()) or f"{found['S']:.3g}"
    text = f"Coins on {' + '.join(found['chain'])} add S / cost with S = {by_steps}; {found['chain'][-1]} alone "
    text += f"has the error {found['D']:.3g} / N^{found['q']:.2f}."
    if (window := found["window"]) is None:
        return f"{text} Its errors span less than a factor of 2 in rms error: no window is predicted."
    far, near = window["rms_error"]
    text += f" Predicted for plain ML-EM: at least {window['speedup']:.2f} times the speed of {found['chain'][-1]} "
    text += f"alone from rms error {far:.2g} to {near:.2g}."
    if window["speedup"] >= 4:
        return text
    needed = found["S_for_4"]
    return f"{text} Fourfold there needs {f'S = {needed:.2g}' if needed else 'a cheaper first level'}."
