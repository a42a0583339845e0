"""The figure for rates.json: cost against error per gamma, the exponents, and the effect of the step size."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from .style import BLUE, COLOURS, GREEN, MARKERS, ORANGE, more_room, new_figure, styled

_METHODS = {  # colour, marker, line, label
    "em": (BLUE, "o", "-", "EM"),
    "ml_em": (ORANGE, "s", "--", "ML-EM"),
    "poisson": (GREEN, "^", ":", "jump process"),
}


@styled
def plot_rates(result: dict[str, Any], frame: DataFrame) -> Figure:
    """Draw the content of rates.json and rates.csv (`frame`)."""
    dynamics = [name for name in ("sde", "ode") if name in result]
    gammas = sorted(result[dynamics[0]], key=float)
    figure: Any = new_figure(2.75 * max(len(gammas), 3) + 0.8, 3.1 * len(dynamics) + 4.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3.1 * len(dynamics), 4.2])
    upper.suptitle("Cost against error to the solution with the true drift: measured points, fitted lines")
    axes = upper.subplots(len(dynamics), len(gammas), squeeze=False, sharex=True)
    for line, name in zip(axes, dynamics, strict=True):
        for ax, gamma in zip(line, gammas, strict=True):
            own = frame[(frame.dynamics == name) & np.isclose(frame.gamma, float(gamma))]
            _draw_costs(ax, own, result[name][gamma])
            ax.set_title(f"{name.upper()}, γ = {gamma}")
        line[0].set_ylabel("expected cost  (units of $T_0$,\n$T_k = 2^{γk}$ per evaluation)")
    upper.supxlabel("RMS error at $t$ = 1", fontsize=10)
    left, *right = lower.subplots(1, 1 + len(dynamics), squeeze=False)[0]
    _draw_exponents(left, result, dynamics, gammas)
    for ax, name in zip(right, dynamics, strict=True):
        _draw_step_size(ax, result["step_size"][name])
        ax.set_title(f"Step size, {name.upper()} (γ = 2.5, fires held fixed)")
    return figure


def _draw_costs(ax: Any, frame: Any, entries: dict[str, Any]) -> None:
    for method, (colour, marker, line, label) in _METHODS.items():
        entry, own = entries[method], frame[frame.method == method]
        ax.errorbar(own.error, own.cost, xerr=2 * own.error_se, fmt=marker, color=colour, ms=3.2, lw=0.8, alpha=0.85)
        ends, exponent = np.array(entry["error_range"]), entry["exponent"]
        fitted = np.exp(entry["log_cost_at_one"]) * ends**exponent
        ax.plot(ends, fitted, color=colour, ls=line, label=f"{label} −{-exponent:.2f}")
    ax.set(xscale="log", yscale="log")
    ax.legend(fontsize=8, loc="upper right", title="exponent", title_fontsize=8, handlelength=2.4)


def _draw_exponents(ax: Any, result: dict[str, Any], dynamics: list[str], gammas: list[str]) -> None:
    """Draw measured exponents with intervals over the predicted lines."""
    values = np.array([float(gamma) for gamma in gammas])
    dense = np.linspace(values.min(), values.max(), 200)
    laws = {"em": -(dense + 1), "ml_em": -np.maximum(dense, 1 + dense / 2), "poisson": -np.maximum(dense, 2)}
    for i, (method, (colour, marker, line, label)) in enumerate(_METHODS.items()):
        ax.plot(dense, laws[method], color=colour, ls=line, label=f"{label}, predicted limit")
        for j, name in enumerate(dynamics):
            entries = [result[name][gamma][method] for gamma in gammas]
            x = values + 0.035 * (i - 1) + 0.09 * (j - (len(dynamics) - 1) / 2)
            ax.vlines(x, *np.array([entry["interval"] for entry in entries]).T, color=colour)
            model = "error model, same range" if i + j == 0 else None
            ax.plot(x, [e["expected_in_range"] for e in entries], "_", color="black", ms=9, zorder=4, label=model)
            style = dict(color=colour, mfc=colour if name == "sde" else "white", ms=5)
            ax.plot(x, [e["exponent"] for e in entries], marker, label=f"{label}, {name.upper()}", **style)
    ax.set(xlabel="γ  (cost of one evaluation ∝ error$^{-γ}$)", ylabel="exponent of cost against error")
    ax.set_title("Measured exponents, 95% intervals")
    ax.legend(fontsize=7.5, loc="lower left")


def _draw_step_size(ax: Any, study: dict[str, Any]) -> None:
    for i, (name, curve) in enumerate(study["curves"].items()):
        n, error, se = np.array([(r["steps"], r["error"], r["error_se"]) for r in curve["rows"]]).T
        ax.errorbar(n, error, yerr=2 * se, label=name, marker=MARKERS[i], color=COLOURS[i], ms=4)
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="number of steps $n = 1/h$", ylabel="RMS error at $t$ = 1")
    more_room(ax, below=0.45)
    ax.legend(fontsize=7.5, loc="lower left", ncols=2)
