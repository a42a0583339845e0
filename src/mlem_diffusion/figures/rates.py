"""The figure for rates.json: cost against error per gamma, the exponents, and the effect of the step size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .style import save_figure

# Okabe-Ito colours are distinct for colour-blind readers; each method also has its own marker and line.
STYLES: dict[str, tuple[str, str, str, str]] = {
    "em": ("#0072B2", "o", "-", "EM"),
    "ml_em": ("#D55E00", "s", "--", "ML-EM"),
    "poisson": ("#009E73", "^", ":", "jump process"),
}
DYNAMICS = {"sde": "SDE", "ode": "ODE"}
_CURVES = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#009E73", "#56B4E9")
_MARKERS = "os^Dv<"


def plot_rates(result: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the content of rates.json and rates.csv (`rows`) to a PNG."""
    from matplotlib.figure import Figure

    dynamics = [d for d in DYNAMICS if d in result]
    gammas = sorted(result[dynamics[0]], key=float)
    columns = max(len(gammas), 3)
    figure = Figure(figsize=(2.75 * columns + 0.8, 3.1 * len(dynamics) + 4.6), dpi=120, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.1 * len(dynamics), 4.2])
    upper, lower = parts
    axes = upper.subplots(len(dynamics), len(gammas), squeeze=False, sharex=True)
    for line, name in enumerate(dynamics):
        for column, gamma in enumerate(gammas):
            own = [r for r in rows if r["dynamics"] == name and f"{r['gamma']:g}" == gamma]
            _draw_costs(axes[line, column], own, result[name][gamma])
            axes[line, column].set_title(f"{DYNAMICS[name]}, γ = {gamma}", fontsize=11)
        axes[line, 0].set_ylabel("expected cost  (units of $T_0$,\n$T_k = 2^{γk}$ per evaluation)")
    for ax in axes[-1]:
        ax.set_xlabel("RMS error at $t$ = 1")
    upper.suptitle("Cost against error to the solution with the true drift: measured points, fitted lines", fontsize=13)
    panels = lower.subplots(1, 1 + len(dynamics), squeeze=False)[0]
    _draw_exponents(panels[0], result, dynamics, gammas)
    for ax, name in zip(panels[1:], dynamics, strict=True):
        _draw_step_size(ax, result["step_size"][name])
        ax.set_title(f"Step size, {DYNAMICS[name]} (γ = 2.5, fires held fixed)", fontsize=11)
    save_figure(figure, path)


def _draw_costs(ax: Any, rows: Sequence[dict[str, Any]], entries: dict[str, Any]) -> None:
    for method, (colour, marker, line, label) in STYLES.items():
        if method not in entries:
            continue
        entry, own = entries[method], [r for r in rows if r["method"] == method]
        error, cost = np.array([(r["error"], r["cost"]) for r in own]).T
        bars = 2 * np.array([r["error_se"] for r in own])
        ax.errorbar(error, cost, xerr=bars, fmt=marker, color=colour, ms=3.2, lw=0.8, alpha=0.85)
        ends = np.array(entry["error_range"])
        fitted = np.exp(entry["log_cost_at_one"]) * ends ** entry["exponent"]
        text = f"{label} {_number(entry['exponent'])}"
        ax.plot(ends, fitted, color=colour, ls=line, lw=1.3, label=text)
    ax.set(xscale="log", yscale="log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / (high / low) ** 0.02, high)
    ax.legend(fontsize=8, loc="upper right", title="exponent", title_fontsize=8, handlelength=2.4)
    _grid(ax)


def _draw_exponents(ax: Any, result: dict[str, Any], dynamics: Sequence[str], gammas: Sequence[str]) -> None:
    """Draw measured exponents with intervals over the predicted lines."""
    values = np.array([float(g) for g in gammas])
    dense = np.linspace(values.min(), values.max(), 200)
    laws = {"em": -(dense + 1), "ml_em": -np.maximum(dense, 1 + dense / 2), "poisson": -np.maximum(dense, 2)}
    for i, (method, (colour, marker, line, label)) in enumerate(STYLES.items()):
        ax.plot(dense, laws[method], color=colour, ls=line, lw=1.2, label=f"{label}, predicted limit")
        for j, name in enumerate(dynamics):
            entries = [result[name][g][method] for g in gammas]
            x = values + 0.035 * (i - 1) + 0.09 * (j - (len(dynamics) - 1) / 2)
            y = np.array([e["exponent"] for e in entries])
            low, high = np.array([e["interval"] for e in entries]).T
            face = colour if name == "sde" else "white"
            ax.vlines(x, low, high, color=colour, lw=1.2)
            expected = [e["expected_in_range"] for e in entries]
            ax.plot(
                x, expected, "_", color="black", ms=9, zorder=4, label="error model, same range" if i + j == 0 else None
            )
            ax.plot(x, y, marker, color=colour, mfc=face, ms=5, label=f"{label}, {DYNAMICS[name]}")
    ax.set_xlabel("γ  (cost of one evaluation ∝ error$^{-γ}$)")
    ax.set_ylabel("exponent of cost against error")
    ax.set_title("Measured exponents, 95% intervals", fontsize=11)
    ax.legend(fontsize=7.5, loc="lower left", ncols=1)
    _grid(ax)


def _draw_step_size(ax: Any, study: dict[str, Any]) -> None:
    for i, (name, curve) in enumerate(study["curves"].items()):
        n, error, se = np.array([(r["steps"], r["error"], r["error_se"]) for r in curve["rows"]]).T
        line = ":" if "base" in name else "-"
        ax.errorbar(n, error, yerr=2 * se, marker=_MARKERS[i], color=_CURVES[i], ls=line, ms=4, lw=1.2, label=name)
    for entry in study["agreement"]:
        jump = entry["poisson"]
        label = f"jump process, {entry['levels']} levels"
        ax.axhline(jump["error"], color="0.35", lw=1, ls="--" if entry["levels"] == 4 else "-.", label=label)
    ax.set(xscale="log", yscale="log")
    ax.set_xscale("log", base=2)
    ax.set_xlabel("number of steps $n = 1/h$")
    ax.set_ylabel("RMS error at $t$ = 1")
    low, high = ax.get_ylim()
    ax.set_ylim(low / (high / low) ** 0.45, high)  # room for the legend
    ax.legend(fontsize=7.5, loc="lower left", ncols=2)
    _grid(ax)


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _grid(ax: Any) -> None:
    ax.grid(True, which="major", color="0.88", lw=0.7)
    ax.set_axisbelow(True)
