"""The figure of the paper's protocol: error and distance of EM and ML-EM against compute, by DDPM and by DDIM."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from ..statistics import frontier
from . import style

_ML_EM: dict[str, dict[str, Any]] = {
    "coins": dict(label="ML-EM, fresh coins for each image", color=style.COINS, marker="o"),
    "pattern": dict(label="ML-EM, best of several shared patterns", color=style.MULTILEVEL, marker="D"),
}
_NAMES = {"sde": "DDPM (SDE)", "ode": "DDIM (ODE)"}


@style.styled
def plot_paper(frame: DataFrame, title: str = "", speedups: dict[str, Any] | None = None) -> Figure:
    """Draw the rows of the paper's protocol of `settings.for_figures`. speedups: that part of speedup.json, whose
    factor at equal error over EM with the largest level is an arrow in the middle of its window."""
    measures = ["error"] if frame.distance.isna().all() else ["error", "distance"]
    dynamics = [name for name in _NAMES if (frame.dynamics == name).any()]
    figure = style.new_figure(5.6 * len(dynamics), 4.1 * len(measures) + 0.7, title)
    axes = figure.subplots(len(measures), len(dynamics), squeeze=False, sharey="row")
    for line, measure in zip(axes, measures, strict=True):
        for ax, name in zip(line, dynamics, strict=True):
            own: Any = frame[frame.dynamics == name]
            singles = own[own.method == "single"]
            largest = str(singles.levels[(singles.gflops_expected / singles.network_calls).idxmax()])
            _draw_panel(ax, own[own[measure] > 0], measure, largest)
            if measure == "error" and speedups:
                _draw_arrow(ax, singles[singles.levels == largest], speedups.get(name, {}))
        line[0].set_ylabel(style.distance_label(frame) if measure == "distance" else "error (MSE to the fine sample)")
    for ax, name in zip(axes[0], dynamics, strict=True):
        ax.set_title(_NAMES[name], fontsize=14)
    for ax in axes[-1]:
        ax.set_xlabel("compute (GFLOP per image)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11)
    return figure


def _draw_panel(ax: Any, frame: Any, measure: str, largest: str) -> None:
    for level, rows in frame[frame.method == "single"].sort_values("gflops_realised").groupby("levels"):
        looks = dict(color=style.BASELINE, lw=2.2, ms=6, marker="s", zorder=4, label=f"EM, largest network ({level})")
        if level != largest:
            looks |= dict(lw=1, ms=3, alpha=0.35, zorder=2, label="EM, each smaller network")
        if looks["label"] in ax.get_legend_handles_labels()[1]:
            looks["label"] = "_"
        ax.plot(rows.gflops_realised, rows[measure], **looks)
    for method, looks in _ML_EM.items():
        rows = frame[(frame.method == method) & frame.trusted]
        ax.plot(rows.gflops_realised, rows[measure], **looks | dict(ls="none", ms=4, alpha=0.4, label="_"), zorder=5)
        best = frontier(rows.to_dict("records"), "gflops_realised", measure)
        x, y = [row["gflops_realised"] for row in best], [row[measure] for row in best]
        ax.plot(x, y, **looks, lw=1.8, ms=6.5, zorder=6)
    if measure == "distance" and frame.distance_floor.notna().any():
        floor = frame.distance_floor.max()
        ax.axhline(floor, color="0.35", ls="--", lw=1, zorder=1, label="_")
        ax.text(0.01, floor, " real against real", transform=ax.get_yaxis_transform(), va="bottom", fontsize=9)
    ax.set(xscale="log", yscale="log")
    style.plain_ticks(ax.xaxis)
    style.plain_ticks(ax.yaxis)


def _draw_arrow(ax: Any, rows: Any, found: dict[str, Any]) -> None:
    """An arrow from EM with the largest level to ML-EM at equal error, with the factor and its lower bound."""
    for method in reversed(_ML_EM):
        entry = found.get(method, {}).get("em_largest", {}).get("flops", {})
        points = [point for point in entry.get("curve", ()) if (point["lower95"] or 0) > 1]
        if not entry.get("window") or not points:
            continue
        middle = np.log(entry["window"]["rms_error"]).mean()
        point = min(points, key=lambda point: abs(np.log(point["at"]) / 2 - middle))
        start = rows.gflops_realised[(rows.error - point["at"]).abs().idxmin()]
        end, colour = start / point["speedup"], _ML_EM[method]["color"]
        arrow: Any = dict(arrowstyle="-|>", color=colour, lw=2.2, shrinkA=4, shrinkB=0, mutation_scale=18)
        ax.annotate("", (end, point["at"]), (start, point["at"]), arrowprops=arrow, zorder=7)
        text = f"{point['speedup']:.1f}×\n(≥ {point['lower95']:.1f}×)"
        looks: Any = dict(color=colour, fontsize=14, fontweight="bold", va="center")
        ax.annotate(text, (start, point["at"]), (9, 0), textcoords="offset points", **looks)
        return
