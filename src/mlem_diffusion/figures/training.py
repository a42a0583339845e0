"""The figure of training: loss against images seen, and held-out error against log-SNR."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .style import LOGSNR, new_figure, note, plain_ticks, shades, styled, thousands


@styled
def plot_training(levels: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Training loss against images seen and held-out denoising error against log-SNR, one line per level.

    levels: their metadata, cheap to expensive; "history" and "held_out" may be empty.
    """
    figure = new_figure(11.5, 4.4, title)
    left, right = figure.subplots(1, 2)
    for level, colour in zip(levels, shades(len(levels)), strict=True):
        seen = [(point["images"], point["loss"]) for point in level.get("history") or []]
        held_out = level.get("held_out") or {"logsnr": [], "loss": []}
        _draw(left, seen, color=colour, marker="." if len(seen) < 30 else None, label=str(level["name"]))
        _draw(right, sorted(zip(held_out["logsnr"], held_out["loss"], strict=True)), color=colour, marker="o", ms=3.5)
    left.set(title="training", xlabel="images seen", ylabel="training loss")
    left.xaxis.set_major_formatter(thousands)
    right.set(title="held-out images", xlabel=LOGSNR, ylabel="denoising error")
    figure.legend(title="level", loc="outside right upper")
    for ax in (left, right):
        if any(len(line.get_xdata()) for line in ax.lines):
            ax.set_yscale("log")
            plain_ticks(ax.yaxis)
        else:
            note(ax, "not recorded")
    return figure


def _draw(ax: Any, points: list[tuple[float, float]], **style: Any) -> None:
    points = [(x, y) for x, y in points if y is not None and np.isfinite(y) and y > 0]
    ax.plot(*np.array(points, dtype=float).reshape(-1, 2).T, lw=1.6, **style)
