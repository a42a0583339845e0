"""The figure of compare.csv: distance and error against compute for every sampler setting."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULE_NAMES
from ..errors import UserError
from ..statistics import frontier
from .style import colour_scale, dress, few_ticks, is_positive, new_figure, note, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
_COST = {"gflops_realised": "compute (GFLOP per image, realised)", "seconds": "time (seconds per image)"}
_LINES = {
    "em": "-",
    "ddpm": (0, (5, 1.5)),
    "ddim": (0, (5, 1.5)),
    "dpmpp_2m": (0, (1, 1.2)),
}
_DOTS = {"em": "o", "ddpm": "s", "ddim": "s", "dpmpp_2m": "^"}
_COLOURS = {"baseline": "#23395b", "stitched": "#1a9a8a", "paper": "#ef8a00", "other": "#b4005a"}
_MARKS = {"stitched": "D", "paper": "o", "other": "*"}
_SIZES = {"stitched": 20, "paper": 26, "other": 60}


def plot_compare(rows: list[Row], path: Path, *, title: str = "") -> Path:
    """Draw compare.csv, one column of panels per dynamics: distance and error against compute, error against time.

    rows: the result of `comparison.table.for_figures`. Costs are per image. Errors are mean squared errors to the
    reference with bars of two standard errors. Bars and points that are not positive are left out, because log axes
    cannot show them. Settings with too few evaluations of the top level (`table.trusted`) are hollow and on no
    frontier. Raises UserError for no rows, and for rows with different sample counts or different distances, which
    cannot share an axis.
    """
    if not rows:
        raise UserError("There is nothing to plot: the comparison holds no rows.")
    n = _one_value(rows, "num_samples", "sample counts num_samples")
    distance_name = _one_value((r for r in rows if r.get("distance") is not None), "distance_name", "distances")
    dynamics = [name for name in DYNAMICS_NAMES if any(row["dynamics"] == name for row in rows)]
    if not dynamics:
        raise UserError("The comparison has rows for neither dynamics: expected sde or ode.")
    shades = _level_shades(rows)
    # A distance seldom spans decades, and a log axis would hide its zero. Both dynamics use the same kind of axis.
    distances = [row["distance"] for row in rows if is_positive(row.get("distance"))]
    wide = bool(distances) and max(distances) > 8 * min(distances)
    panels = [("distance", "gflops_realised"), ("error", "gflops_realised"), ("error", "seconds")]
    if not distances and any(is_positive(row.get("error")) for row in rows):
        del panels[0]  # a family without images has no distances

    figure = new_figure(4.9 * len(dynamics) + 2.9, 3.7 * len(panels))
    axes = figure.subplots(len(panels), len(dynamics), squeeze=False)
    for column, name in enumerate(dynamics):
        own = [row for row in rows if row["dynamics"] == name]
        for line, (measure, cost) in enumerate(panels):
            ax = axes[line, column]
            drawn = _draw_panel(ax, own, cost, measure, shades, log=measure == "error" or wide)
            ax.set_xlabel(_COST[cost])
            if line == 0:
                ax.set_title(DYNAMICS_NAMES[name], fontsize=13, pad=10)
            if not drawn:
                note(ax, "not computed")
            elif measure == "distance":
                floors = [row["distance_floor"] for row in own if row.get("distance_floor")]
                if floors:
                    _floor(ax, floors[0], f"real against real, n = {n}")
            if column == 0:
                label = (
                    f"{distance_name or 'distance'}  (n = {n})"
                    if measure == "distance"
                    else "error (MSE to the reference)"
                )
                ax.set_ylabel(label)
    _share_rows(axes)
    figure.legend(
        handles=_legend(rows, shades),
        loc="outside right upper",
        frameon=False,
        fontsize=9.5,
        handlelength=2.8,
    )
    if title:
        figure.suptitle(title, fontsize=15, fontweight="bold")
    return save_figure(figure, path)


# ---- panels ------------------------------------------------------------------------------------------------


def _draw_panel(ax: Axes, rows: list[Row], cost: str, measure: str, shades: dict[str, Any], *, log: bool) -> bool:
    """Draw one panel. Returns False if no row has both numbers."""
    dress(ax)
    rows = [row for row in rows if is_positive(row.get(cost)) and is_positive(row.get(measure))]
    if not rows:
        return False
    ax.set_xscale("log")
    values = [row[measure] for row in rows]
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0, top=1.08 * max(values))

    by_method = {
        name: [row for row in rows if row["method"] == name] for name in ("single", "stitched", "paper", "other")
    }
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in by_method["single"]:
        lines.setdefault((row["levels"], row["step_rule"]), []).append(row)
    for (level, rule), group in lines.items():
        group.sort(key=lambda row: row[cost])
        style: dict[str, Any] = dict(
            color=shades[level], ls=_LINES.get(rule, "-."), marker=_DOTS.get(rule, "v"), lw=1.1, ms=3.6
        )
        _with_bars(ax, group, cost, measure, zorder=3, **style)
    for name in ("stitched", "paper", "other"):
        for sure in (True, False):
            group = [row for row in by_method[name] if row["trusted"] is sure]
            if group:
                size = _SIZES[name] ** 0.5
                style: dict[str, Any] = dict(color=_COLOURS[name], marker=_MARKS[name], ls="none", ms=size, alpha=0.85)
                style |= dict(mew=0.5, mec="white") if sure else dict(mfc="none", mew=0.9, mec=_COLOURS[name])
                _with_bars(ax, group, cost, measure, zorder=5, **style)
    _draw_frontier(ax, by_method["single"] + by_method["stitched"], cost, measure, _COLOURS["baseline"], 2)
    _draw_frontier(ax, by_method["paper"], cost, measure, _COLOURS["paper"], 4)
    if by_method["other"]:  # any multilevel setting, including the paper's
        _draw_frontier(ax, by_method["paper"] + by_method["other"], cost, measure, _COLOURS["other"], 3.5)
    few_ticks(ax.xaxis)
    if ax.get_yscale() == "log":
        few_ticks(ax.yaxis)
    return True


def _with_bars(ax: Axes, rows: list[Row], cost: str, measure: str, **style: Any) -> None:
    x = np.array([row[cost] for row in rows], dtype=float)
    y = np.array([row[measure] for row in rows], dtype=float)
    bars = None
    if measure == "error":
        up = 2 * np.array([row.get("error_se") or 0.0 for row in rows], dtype=float)
        bars = np.stack([np.minimum(up, 0.9 * y), up])  # a log axis cannot show a lower end below zero
    ax.errorbar(x, y, yerr=bars, elinewidth=0.8, capsize=1.5, capthick=0.7, **style)


def _draw_frontier(ax: Axes, rows: list[Row], cost: str, measure: str, colour: str, zorder: float) -> None:
    best = frontier([row for row in rows if row["trusted"]], cost, measure)
    if best:
        x, y = [row[cost] for row in best], [row[measure] for row in best]
        ax.step(x, y, where="post", color=colour, lw=3.2, alpha=0.55, solid_capstyle="round", zorder=zorder)


def _floor(ax: Axes, value: float, label: str) -> None:
    ax.axhline(value, color="#555555", ls="--", lw=1.2, zorder=1)
    if ax.get_yscale() == "log":
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, value / 1.25), high)
    text = f"{label}: {value:.3g}"
    ax.annotate(
        text,
        (0.01, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )


def _share_rows(axes: np.ndarray) -> None:
    """Give the panels of a row the same vertical range if they have the same scale, so that columns are comparable."""
    for line in axes:
        filled = [ax for ax in line if ax.lines or ax.containers]
        if len({ax.get_yscale() for ax in filled}) == 1:
            limits = [ax.get_ylim() for ax in filled]
            for ax in filled:
                ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


# ---- shades and legend -------------------------------------------------------------------------------------


def _level_shades(rows: list[Row]) -> dict[str, Any]:
    """A colour per single level, light for cheap and dark for expensive, by GFLOPs per network call."""
    calls: dict[str, float] = {}
    for row in rows:
        if row["estimator"] == "single":
            per_call = (row.get("gflops_expected") or row.get("gflops_realised") or 0) / max(
                row.get("network_calls") or 0, 1
            )
            calls[row["levels"]] = max(per_call, calls.get(row["levels"], 0.0))
    names = sorted(calls, key=lambda name: (calls[name], name))
    return dict(zip(names, colour_scale(len(names), "Blues"), strict=True))


def _legend(rows: list[Row], shades: dict[str, Any]) -> list[Any]:
    from matplotlib.lines import Line2D

    def heading(text: str) -> Any:
        return Line2D([], [], ls="none", label=r"$\bf{" + text.replace(" ", r"\ ") + "}$")

    methods = {row["method"] for row in rows}
    handles = []
    if shades:
        handles.append(heading("one level"))
        handles += [Line2D([], [], color=colour, lw=3, label=name) for name, colour in shades.items()]
        handles.append(heading("step rule"))
        rules = {row["step_rule"] for row in rows if row["estimator"] == "single"}
        for rule in sorted(rules, key=lambda name: (list(_LINES).index(name) if name in _LINES else 9, name)):
            style: dict[str, Any] = dict(ls=_LINES.get(rule, "-."), marker=_DOTS.get(rule, "v"), ms=4, lw=1.2)
            handles.append(Line2D([], [], color="#55606e", label=STEP_RULE_NAMES.get(rule, rule), **style))
    several = [name for name in ("stitched", "paper", "other") if name in methods]
    if several:
        handles.append(heading("several levels"))
    for name in several:
        label = {"stitched": "stitched", "paper": "ML-EM, independent coins"}.get(name) or _kinds(rows)
        style: dict[str, Any] = dict(marker=_MARKS[name], ms=_SIZES[name] ** 0.5, mec="white", mew=0.5)
        handles.append(Line2D([], [], ls="none", color=_COLOURS[name], label=label, **style))
    if any(not row["trusted"] for row in rows):
        style: dict[str, Any] = dict(marker="o", mfc="none", mec="#777777", ms=5)
        handles.append(Line2D([], [], ls="none", label="hollow: top level\nfired too rarely", **style))
    handles.append(heading("frontier"))
    for name, label in (("baseline", "baselines"), ("paper", "paper's ML-EM"), ("other", "any multilevel")):
        if name in methods or (name == "baseline" and methods & {"single", "stitched"}):
            handles.append(Line2D([], [], color=_COLOURS[name], lw=3.2, alpha=0.55, label=label))
    return handles


def _kinds(rows: list[Row]) -> str:
    """The legend label of the multilevel estimators that are not the paper's."""
    best = [row for row in rows if row["method"] == "other"]
    coins = sorted({(row.get("coins") or "").split("-")[0] for row in best} - {""})
    kinds = ([" / ".join(coins) + " coins"] if coins else []) + (
        ["quadrature"] if any(row["estimator"] == "quadrature" for row in best) else []
    )
    return "multilevel, " + ",\n".join(kinds)


# ---- helpers -----------------------------------------------------------------------------------------------


def _one_value(rows: Iterable[Row], column: str, what: str) -> Any:
    values = sorted({row.get(column) for row in rows} - {None, ""}, key=str)
    if len(values) > 1:
        raise UserError(f"Different {what} cannot share a figure: {', '.join(map(str, values))}.")
    return values[0] if values else None
