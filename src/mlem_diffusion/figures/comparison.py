"""The figure of compare.csv: distance and error against compute for every sampler setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from ..diffusion.step_rules import DYNAMICS_NAMES
from ..errors import UserError
from ..statistics import frontier
from .style import error_bars, new_figure, note, plain_ticks, rule_name, shades, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_COSTS = {"gflops_realised": "compute (GFLOP per image, realised)", "seconds": "time (seconds per image)"}
_RULES = {"em": ("-", "o"), "ddpm": ((0, (5, 1.5)), "s"), "ddim": ((0, (5, 1.5)), "s"), "dpmpp_2m": ((0, (1, 1.2)), "^")}
_OTHER_RULE = ("-.", "v")
_METHODS = {  # colour, marker, size
    "stitched": ("#1a9a8a", "D", 4.5),
    "paper": ("#ef8a00", "o", 5.1),
    "other": ("#b4005a", "*", 7.7),
}
_FRONTIERS = {  # methods, colour, zorder
    "baselines": (("single", "stitched"), "#23395b", 2.0),
    "paper's ML-EM": (("paper",), "#ef8a00", 4.0),
    "any multilevel": (("paper", "other"), "#b4005a", 3.5),
}
_THICK = dict(lw=3.2, alpha=0.55)


@styled
def plot_compare(frame: DataFrame, title: str = "") -> Figure:
    """Draw compare.csv, one column of panels per dynamics: distance and error against compute, error against time.

    frame: the columns of compare.csv with the seeds pooled, and the columns "method" (single, stitched, paper or other)
    and "trusted". Costs are per image. Errors are mean squared errors to the reference with bars of two standard
    errors. Points that are not positive are left out, because log axes cannot show them. Settings with too few
    evaluations of the top level (not trusted) are hollow and on no frontier. Raises UserError for no rows, and for rows
    with different sample counts or different distances, which cannot share an axis.
    """
    n = _one_value(frame, "num_samples")
    distance = _one_value(frame[frame.distance.notna()], "distance_name") or "distance"
    dynamics = [name for name in DYNAMICS_NAMES if (frame.dynamics == name).any()]
    panels = [("distance", "gflops_realised"), ("error", "gflops_realised"), ("error", "seconds")]
    distances = frame.distance[frame.distance > 0]
    if distances.empty and (frame.error > 0).any():
        panels = panels[1:]  # a family without images has no distances
    # A distance seldom spans decades, and a log axis would hide its zero. Both dynamics use the same kind of axis.
    wide = not distances.empty and distances.max() > 8 * distances.min()
    blues = _level_shades(frame)
    figure = new_figure(4.9 * len(dynamics) + 2.9, 3.7 * len(panels), title)
    axes = figure.subplots(len(panels), len(dynamics), squeeze=False)
    for line, (measure, cost) in zip(axes, panels, strict=True):
        for ax, name in zip(line, dynamics, strict=True):
            own = frame[frame.dynamics == name]
            _draw_panel(ax, own, cost, measure, blues, log=measure == "error" or wide)
            ax.set_xlabel(_COSTS[cost])
            if measure == "distance" and own.distance.notna().any():
                _draw_floor(ax, own.distance_floor.max(), f"real against real, n = {n}")
        label = f"{distance}  (n = {n})" if measure == "distance" else "error (MSE to the reference)"
        line[0].set_ylabel(label)
        _share_range(line)
    for ax, name in zip(axes[0], dynamics, strict=True):
        ax.set_title(DYNAMICS_NAMES[name], fontsize=13, pad=10)
    figure.legend(handles=_legend(frame, blues), loc="outside right upper", fontsize=9.5, handlelength=2.8)
    return figure


def _draw_panel(ax: Any, frame: DataFrame, cost: str, measure: str, blues: dict[str, Any], log: bool) -> None:
    frame = frame[(frame[cost] > 0) & (frame[measure] > 0)]
    if frame.empty:
        note(ax, "not computed")
        return
    singles = frame[frame.method == "single"].sort_values(cost)
    for (level, rule), group in singles.groupby(["levels", "step_rule"]):
        line, marker = _RULES.get(rule, _OTHER_RULE)
        style = dict(color=blues[level], ls=line, marker=marker, lw=1.1, ms=3.6)
        _draw_points(ax, group, cost, measure, zorder=3, **style)
    for name, (colour, marker, size) in _METHODS.items():
        for trusted, group in frame[frame.method == name].groupby("trusted"):
            faces = dict(mew=0.5, mec="white") if trusted else dict(mfc="none", mew=0.9, mec=colour)
            style = dict(color=colour, marker=marker, ls="none", ms=size, alpha=0.85)
            _draw_points(ax, group, cost, measure, zorder=5, **style, **faces)
    for methods, colour, zorder in _frontiers_of(frame).values():
        rows = frame[frame.method.isin(methods) & frame.trusted].to_dict("records")
        best = np.array([(row[cost], row[measure]) for row in frontier(rows, cost, measure)]).reshape(-1, 2)
        ax.step(*best.T, where="post", color=colour, solid_capstyle="round", zorder=zorder, **_THICK)
    ax.set_xscale("log")
    plain_ticks(ax.xaxis)
    if log:
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    else:
        ax.set_ylim(bottom=0, top=1.08 * frame[measure].max())


def _draw_points(ax: Any, frame: DataFrame, cost: str, measure: str, **style: Any) -> None:
    bars = None
    if measure == "error":
        bars = error_bars(frame.error.to_numpy(), frame.error_se.fillna(0.0).to_numpy())
    ax.errorbar(frame[cost], frame[measure], yerr=bars, elinewidth=0.8, capsize=1.5, capthick=0.7, **style)


def _frontiers_of(frame: DataFrame) -> dict[str, tuple[tuple[str, ...], str, float]]:
    """The frontiers to draw: those whose last method has a row, or any method for the baselines."""
    present = set(frame.method)
    return {
        name: entry
        for name, entry in _FRONTIERS.items()
        if (entry[0][-1] in present or (name == "baselines" and "single" in present))
    }


def _draw_floor(ax: Any, value: float, label: str) -> None:
    if not value > 0:
        return
    ax.axhline(value, color="#555555", ls="--", zorder=1)
    if ax.get_yscale() == "log":
        ax.set_ylim(bottom=min(ax.get_ylim()[0], value / 1.25))
    where = dict(xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points")
    ax.annotate(f"{label}: {value:.3g}", (0.01, value), **where, fontsize=8, color="#444444")


def _share_range(line: Any) -> None:
    """Give the panels of a row the same vertical range, so that columns are comparable."""
    filled = [ax for ax in line if ax.has_data()]
    limits = np.array([ax.get_ylim() for ax in filled])
    for ax in filled:
        ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def _level_shades(frame: DataFrame) -> dict[str, Any]:
    """A blue per single level, light for cheap and dark for expensive, by GFLOPs per network call."""
    singles = frame[frame.method == "single"]
    per_call = (singles.gflops_expected / singles.network_calls).groupby(singles.levels).max().sort_values()
    return dict(zip(per_call.index, shades(len(per_call), "Blues"), strict=True))


def _legend(frame: DataFrame, blues: dict[str, Any]) -> list[Line2D]:
    handles = []

    def add(label: str, **style: Any) -> None:
        handles.append(Line2D([], [], label=label, **style))

    def heading(text: str) -> None:
        add(r"$\bf{" + text.replace(" ", r"\ ") + "}$", ls="none")

    if blues:
        heading("one level")
        for name, colour in blues.items():
            add(name, color=colour, lw=3)
        heading("step rule")
        rules = set(frame.step_rule[frame.method == "single"])
        for rule in sorted(rules, key=lambda name: (name not in _RULES, name)):
            line, marker = _RULES.get(rule, _OTHER_RULE)
            add(rule_name(rule), color="#55606e", ls=line, marker=marker, ms=4)
    several = [name for name in _METHODS if (frame.method == name).any()]
    if several:
        heading("several levels")
    labels = {"stitched": "stitched", "paper": "ML-EM, independent coins", "other": _other_kinds(frame)}
    for name in several:
        colour, marker, size = _METHODS[name]
        add(labels[name], color=colour, marker=marker, ms=size, mec="white", mew=0.5, ls="none")
    if not frame.trusted.all():
        add("hollow: top level\nfired too rarely", ls="none", marker="o", mfc="none", mec="#777777", ms=5)
    heading("frontier")
    for label, (_, colour, _) in _frontiers_of(frame).items():
        add(label, color=colour, **_THICK)
    return handles


def _other_kinds(frame: DataFrame) -> str:
    """The legend label of the multilevel estimators that are not the paper's."""
    others = frame[frame.method == "other"]
    coins = sorted({str(name).split("-")[0] for name in others.coins.dropna()} - {""})
    kinds = [" / ".join(coins) + " coins"] if coins else []
    kinds += ["quadrature"] if (others.estimator == "quadrature").any() else []
    return "multilevel, " + ",\n".join(kinds)


def _one_value(frame: DataFrame, column: str) -> Any:
    values = sorted(set(frame[column].dropna()) - {""}, key=str)
    if len(values) > 1:
        raise UserError(f"Rows that differ in {column} cannot share a figure: {', '.join(map(str, values))}.")
    return values[0] if values else None
