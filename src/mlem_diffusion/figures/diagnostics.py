"""The figure for a family's diagnostics: mean square differences per noise level, and pooled against cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..multilevel.diagnostics import Diagnostics, pooled
from ..multilevel.level_statistics import LevelStatistics, standard_error
from .style import ESTIMATE_STYLES, colour_scale, decimal_ticks, light_grid, save_figure

_COST, _SQUARE = ESTIMATE_STYLES["loss_fit"], ESTIMATE_STYLES["differences"]


def plot_diagnostics(d: Diagnostics, path: Path, title: str = "") -> None:
    """Draw the mean square differences of levels, per noise level and pooled.

    Left: against log-SNR, with bands of two standard errors. Right: the pooled value V, and V times the cost of one
    firing, against the level's FLOPs. Raises UserError if there are no statistics.
    """
    if d.statistics is None:
        raise UserError(f"There is nothing to plot: {d.findings[0].text}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_noise_levels(left, d.statistics)
    _draw_levels(right, d.statistics)
    where = f"{d.samples} trajectories of {d.names[-1]}, {d.dynamics.upper()}, {d.step_rule}"
    figure.suptitle(f"{title}: {where}" if title else where, fontsize=12)
    save_figure(figure, path)


def _draw_noise_levels(ax: Any, s: LevelStatistics) -> None:
    mean, se = s.mean_square, standard_error(s.square)
    colours = colour_scale(len(s.names), "viridis")
    for k in range(1, len(s.names)):
        show = mean[k] > 0
        if not show.any():
            continue
        low = np.maximum(mean[k] - 2 * se[k], 0.05 * mean[k])  # a log axis cannot show a band that reaches zero
        ax.plot(s.logsnr[show], mean[k][show], color=colours[k], marker="osD^v<>"[k % 7], ms=4, label=s.label(k))
        ax.fill_between(s.logsnr[show], low[show], (mean[k] + 2 * se[k])[show], color=colours[k], alpha=0.25, lw=0)
    ax.plot(s.logsnr, s.top_spread, color="0.45", ls=":", lw=1.3, label=f"variance of {s.names[-1]}")
    ax.set_yscale("log")
    ax.set_xlabel("log-SNR  $\\log(\\alpha^2/\\sigma^2)$   (noisy → clean)")
    ax.set_ylabel("mean square per pixel, images in [−1, 1]")
    ax.set_title("Differences of neighbouring levels (bands: ±2 s.e.)", fontsize=11)
    ax.legend(fontsize=9, loc="lower left")
    light_grid(ax)


def _draw_levels(ax: Any, s: LevelStatistics) -> None:
    of, x = pooled(s), s.flops[1:] / 1e9
    v, se = of["mean_square"][1:], of["mean_square_se"][1:]
    bars = np.stack([np.minimum(2 * se, 0.95 * v), 2 * se])
    series = (
        (v, bars, _SQUARE, "$V_k$, pooled"),
        (of["variance_cost"][1:] / 1e9, None, _COST, "$V_k c_k$  ($c_k$: GFLOP per firing)"),
    )
    for values, error, (colour, marker, _), label in series:
        show = values > 0
        bar = None if error is None else error[:, show]
        ax.errorbar(x[show], values[show], yerr=bar, color=colour, marker=marker, ms=6, capsize=3, lw=1.2, label=label)
    ax.set(xscale="log", yscale="log")
    for k, name in enumerate(s.names[1:]):
        if v[k] > 0:
            ax.annotate(name, (x[k], v[k]), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    ax.set_xlabel("GFLOP per evaluation of one image ($T_k$)")
    ax.set_ylabel("mean square, or its product with cost")
    ax.set_title("Pooled over noise levels (bars: ±2 s.e.)", fontsize=11)
    ax.legend(fontsize=9, loc="upper right")
    light_grid(ax)
    decimal_ticks(ax.xaxis)
