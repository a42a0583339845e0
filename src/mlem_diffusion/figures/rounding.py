"""The figure of precision.json: rounding errors of lower precision, compared with the differences of levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..models.rounding import PrecisionErrors
from .style import save_figure


def plot_precision(found: PrecisionErrors, path: Path, *, precision: str, title: str = "") -> None:
    """Draw rounding errors (solid) and differences (dashed) against noise level (left), and their ratio (right)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, name in enumerate(found.names):
        colour = colormaps["viridis"](0.9 * k / max(1, len(found.names) - 1))
        left.plot(found.logsnr, np.sqrt(found.rounding[k]), color=colour, label=name)
        left.plot(found.logsnr, np.sqrt(found.difference[k]), color=colour, linestyle="--")
        right.plot(found.logsnr, found.ratio()[k], color=colour)
    left.plot([], [], color="0.3", label=f"{precision} against\nfloat32")
    left.plot([], [], color="0.3", linestyle="--", label="difference to the level\nbelow (the first: to\nthe image)")
    left.set_ylabel("root mean square per pixel")
    right.set_ylabel("rounding over difference")
    right.axhline(1.0, color="0.6", linewidth=1)
    figure.legend(loc="outside right center", fontsize=8.5, frameon=False)
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_xlabel("log-SNR (noise to data)")
        ax.grid(alpha=0.25)
    figure.suptitle(f"{title}: what {precision} rounds away" if title else f"What {precision} rounds away", fontsize=12)
    save_figure(figure, path)
