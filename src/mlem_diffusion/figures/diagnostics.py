"""The figure for a family's diagnostics: mean square differences per noise level, and pooled against cost."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .style import BLUE, GFLOP, LOGSNR, MARKERS, ORANGE, error_bars, more_room, new_figure, plain_ticks, shades, styled


@styled
def plot_diagnostics(content: dict[str, Any], title: str = "") -> Figure:
    """Draw the mean square differences of levels, for one of the dynamics in diagnostics.json.

    Left: against log-SNR, with bands of two standard errors. Right: the pooled value V, and V times the cost of one
    firing, against the level's FLOPs.
    """
    names = content["levels"]
    where = f"{content['samples']} trajectories of {names[-1]}, {content['dynamics'].upper()}, {content['step_rule']}"
    figure = new_figure(13, 4.8, f"{title}: {where}" if title else where)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_noise_levels(left, names, content["logsnr"], content["per_noise_level"])
    _draw_pooled(right, names, np.array(content["flops"]) / 1e9, content["pooled"])
    return figure


def _draw_noise_levels(ax: Any, names: list[str], logsnr: Any, found: dict[str, Any]) -> None:
    logsnr = np.asarray(logsnr)
    means, errors = (np.array(found[key], dtype=float) for key in ("mean_square", "mean_square_se"))
    colours = shades(len(names))
    for k in range(1, len(names)):
        show = means[k] > 0
        x, y, label = logsnr[show], means[k][show], f"{names[k]} - {names[k - 1]}"
        below, above = error_bars(y, errors[k][show])
        ax.plot(x, y, color=colours[k], marker=MARKERS[k % len(MARKERS)], ms=4, label=label)
        ax.fill_between(x, y - below, y + above, color=colours[k], alpha=0.25, lw=0)
    ax.plot(logsnr, found["largest_variance"], color="0.45", ls=":", label=f"variance of {names[-1]}")
    ax.set(yscale="log", xlabel=LOGSNR, ylabel="mean square per pixel, images in [−1, 1]")
    ax.set_title("Differences of neighbouring levels (bands: ±2 s.e.)")
    ax.legend(loc="lower left")


def _draw_pooled(ax: Any, names: list[str], gflops: np.ndarray, pooled: dict[str, Any]) -> None:
    values, errors, products = (
        np.array(pooled[key], dtype=float) for key in ("mean_square", "mean_square_se", "variance_cost")
    )
    show = (np.arange(len(names)) > 0) & (values > 0)
    bars = error_bars(values[show], errors[show])
    label = "$V_k c_k$  ($c_k$: GFLOP per firing)"
    ax.errorbar(gflops[show], values[show], yerr=bars, color=ORANGE, marker="s", label="$V_k$, pooled")
    ax.errorbar(gflops[show], products[show] / 1e9, color=BLUE, marker="o", label=label)
    ax.set(xscale="log", yscale="log", xlabel=GFLOP, ylabel="mean square, or its product with cost")
    ax.set_title("Pooled over noise levels (bars: ±2 s.e.)")
    for k in np.flatnonzero(show):
        ax.annotate(names[k], (gflops[k], values[k]), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    more_room(ax, above=0.25)
    ax.legend(loc="upper right")
    plain_ticks(ax.xaxis)
