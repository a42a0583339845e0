"""The figure of training: loss against images seen, and held-out error against log-SNR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .style import colour_scale, dress, few_ticks, is_positive, new_figure, note, save_figure, thousands


def plot_training(levels: Sequence[dict[str, Any]], path: Path, *, title: str = "") -> Path:
    """Draw training loss against images seen and held-out denoising error against log-SNR, one line per level.

    levels, cheap to expensive: {"name", "width", "history": [{"images", "loss"}, ...], "logsnr": [...],
    "held_out": [...]}; the last two have equal lengths and may be empty. Raises UserError if there is no level, or
    if lengths differ.
    """
    if not levels:
        raise UserError("There is nothing to plot: no level has been trained.")
    figure = new_figure(11.5, 4.4)
    left, right = figure.subplots(1, 2)
    colours = colour_scale(len(levels), "viridis")
    any_history = any_held_out = False
    for level, colour in zip(levels, colours, strict=True):
        points = [(p["images"], p["loss"]) for p in level.get("history") or [] if is_positive(p.get("loss"))]
        if points:
            any_history = True
            left.plot(
                *np.array(points, dtype=float).T,
                color=colour,
                lw=1.6,
                marker="." if len(points) < 30 else None,
            )
        logsnr, held_out = list(level.get("logsnr") or []), list(level.get("held_out") or [])
        if len(logsnr) != len(held_out):
            raise UserError(f"Level {level['name']}: {len(logsnr)} noise levels but {len(held_out)} held-out errors.")
        points = sorted((x, y) for x, y in zip(logsnr, held_out, strict=True) if is_positive(y))
        if points:
            any_held_out = True
            right.plot(*np.array(points, dtype=float).T, color=colour, lw=1.6, marker="o", ms=3.5)
    for ax, filled in ((left, any_history), (right, any_held_out)):
        dress(ax)
        if filled:
            ax.set_yscale("log")
            few_ticks(ax.yaxis)
        else:
            note(ax, "not recorded")
    left.set(title="training", xlabel="images seen", ylabel="training loss")
    left.xaxis.set_major_formatter(thousands)
    right.set(title="held-out images", xlabel="log-SNR  (noisy to clean)", ylabel="denoising error")
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, lw=2, label=str(level["name"])) for level, c in zip(levels, colours, strict=True)
    ]
    figure.legend(handles=handles, title="level", loc="outside right upper", frameon=False)
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    return save_figure(figure, path)
