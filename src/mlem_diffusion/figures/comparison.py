"""The figure of compare.csv: distance and error against compute for every sampler setting."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULE_NAMES
from ..statistics import frontier
from . import style

_COSTS = {"gflops_realised": "compute (GFLOP per image, realised)", "seconds": "time (seconds per image)"}
_RULES = {"em": dict(ls="-", marker="o"), "dpmpp_2m": dict(ls=(0, (1, 1.2)), marker="^")}
_RULES["ddpm"] = _RULES["ddim"] = dict(ls=(0, (5, 1.5)), marker="s")
_OTHER_RULE = dict(ls="-.", marker="v")
_METHODS: dict[str, Any] = {
    "stitched": dict(label="stitched", color="#1a9a8a", marker="D", ms=4.5, ls="none"),
    "coins": dict(label="ML-EM, independent coins", color=style.COINS, marker="o", ms=5.1, ls="none"),
    "other": dict(label="other coins, quadrature", color=style.MULTILEVEL, marker="*", ms=7.7, ls="none"),
}
_HOLLOW: Any = dict(label="hollow: top level\nfired too rarely", ls="none", marker="o", mfc="none", color="0.5", ms=5)
_FRONTIERS = {  # methods, colour, zorder; drawn if the last method has a row
    "baselines": (("stitched", "single"), style.BASELINE, 2.0),
    "independent coins": (("coins",), style.COINS, 4.0),
    "any multilevel": (("coins", "other"), style.MULTILEVEL, 3.5),
}
_FLOOR: dict[str, Any] = dict(color="#555555", ls="--")
_THICK: dict[str, Any] = dict(lw=3.2, alpha=0.55)
_WINDOWS: Any = {"any": (0.985, style.MULTILEVEL), "coins": (0.925, style.COINS)}  # place across the panel, colour
_BAR: Any = dict(label="bar: window in which all\nbaselines cost at least\nso many times as much", color="0.4", lw=4)


@style.styled
def plot_compare(frame: DataFrame, title: str = "", speedups: dict[str, Any] | None = None) -> Figure:
    """Draw `settings.for_figures`, a column of panels per dynamics: distance and error against compute, error in time.
    Errors have bars of two standard errors, distances their intervals. Settings that are not trusted are hollow and on
    no frontier. speedups: the content of speedup.json, whose windows over all baselines are marked at the right if
    their bound is above 1."""
    panels = [("distance", "gflops_realised"), ("error", "gflops_realised"), ("error", "seconds")]
    if frame.distance.isna().all():
        panels = panels[1:]  # a family without images, or few samples
    distance = style.distance_label(frame)
    labels = {"distance": distance, "error": "error (MSE to the reference)"}
    dynamics = [name for name in DYNAMICS_NAMES if (frame.dynamics == name).any()]
    singles = frame[frame.method == "single"]
    per_call = (singles.gflops_expected / singles.network_calls).groupby(singles.levels).max().sort_values()
    blues = dict(zip(per_call.index, style.shades(len(per_call), "Blues"), strict=True))  # the cheapest is light
    figure = style.new_figure(4.9 * len(dynamics) + 2.9, 3.7 * len(panels), title)
    axes = figure.subplots(len(panels), len(dynamics), squeeze=False, sharey="row")
    marked = False
    for line, (measure, cost) in zip(axes, panels, strict=True):
        for ax, name in zip(line, dynamics, strict=True):
            _draw_panel(ax, frame[frame.dynamics == name], cost, measure, blues)
            ax.set_xlabel(_COSTS[cost])
            if speedups and measure == "error":
                unit = "seconds" if cost == "seconds" else "flops"
                marked |= _mark_windows(ax, speedups["strict"].get(name, {}), unit)
        line[0].set_ylabel(labels[measure])
    for ax, name in zip(axes[0], dynamics, strict=True):
        ax.set_title(DYNAMICS_NAMES[name], fontsize=13, pad=10)
    handles = [*_legend(frame, blues), *([Line2D([], [], **_BAR)] if marked else [])]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9.5, handlelength=2.8)
    return figure


def _draw_panel(ax: Any, frame: Any, cost: str, measure: str, blues: dict[str, Any]) -> None:
    frame = frame[(frame[cost] > 0) & (frame[measure] > 0)]
    if frame.empty:
        ax.text(0.5, 0.5, "not computed", transform=ax.transAxes, ha="center", color="#777777")
        return
    singles = frame[frame.method == "single"].sort_values(cost)
    for (level, rule), group in singles.groupby(["levels", "step_rule"]):
        looks = dict(color=blues[level], lw=1.1, ms=3.6) | _RULES.get(rule, _OTHER_RULE)
        _draw_points(ax, group, cost, measure, zorder=3, **looks)
    for name, looks in _METHODS.items():
        for trusted, group in frame[frame.method == name].groupby("trusted"):
            faces = dict(mew=0.5, mec="white") if trusted else dict(mfc="none", mew=0.9, mec=looks["color"])
            _draw_points(ax, group, cost, measure, zorder=5, alpha=0.85, **looks, **faces)
    for methods, colour, zorder in _FRONTIERS.values():
        rows = frame[frame.method.isin(methods) & frame.trusted].to_dict("records")
        best = [(row[cost], row[measure]) for row in frontier(rows, cost, measure)]
        if best and methods[-1] in set(frame.method):
            ax.step(*np.transpose(best), where="post", color=colour, solid_capstyle="round", zorder=zorder, **_THICK)
    if measure == "distance":
        ax.axhline(frame.distance_floor.max(), zorder=1, **_FLOOR)
    ax.set(xscale="log", yscale="log")
    style.plain_ticks(ax.xaxis)
    style.plain_ticks(ax.yaxis)


def _mark_windows(ax: Any, found: dict[str, Any], unit: str) -> bool:
    """A bar over the squared errors of the window of each method over all baselines; whether there is one."""
    marked = False
    for method, (place, colour) in _WINDOWS.items():
        wide = found.get(method, {}).get("all", {}).get(unit, {}).get("window")
        if wide and wide["lower95"] > 1:
            ends, across = np.square(wide["rms_error"]), ax.get_yaxis_transform()
            ax.plot([place] * 2, ends, transform=across, color=colour, lw=4, solid_capstyle="butt", zorder=6)
            looks: Any = dict(ha="right", va="center", rotation=90, color=colour, fontsize=10, fontweight="bold")
            ax.text(place - 0.012, np.sqrt(ends.prod()), f"≥ {wide['lower95']:.3g}×", transform=across, **looks)
            marked = True
    if marked:  # room for the bars
        low, high = ax.get_xlim()
        ax.set_xlim(low, high * (high / low) ** 0.15)
    return marked


def _draw_points(ax: Any, frame: Any, cost: str, measure: str, **looks: Any) -> None:
    bars = np.stack([frame.distance - frame.distance_low, frame.distance_high - frame.distance])
    if measure == "error":
        bars = style.error_bars(frame.error, frame.error_se.fillna(0.0))
    ax.errorbar(frame[cost], frame[measure], yerr=bars, elinewidth=0.8, capsize=1.5, capthick=0.7, **looks)


def _legend(frame: Any, blues: dict[str, Any]) -> list[Line2D]:
    """Entries for single levels, step rules, methods and frontiers."""
    methods, rules = set(frame.method), set(frame.step_rule[frame.method == "single"])
    entries: list[Any] = [dict(label=f"{name} alone", color=colour, lw=3) for name, colour in blues.items()]
    for name, label in STEP_RULE_NAMES.items():
        if name in rules:
            entries.append(dict(label=label, color="#55606e", **_RULES.get(name, _OTHER_RULE)))
    entries += [looks for name, looks in _METHODS.items() if name in methods] + [_HOLLOW]
    for name, (of, colour, _) in _FRONTIERS.items():
        if of[-1] in methods:
            entries.append(dict(label=f"frontier: {name}", color=colour, **_THICK))
    if frame.distance.notna().any():
        entries.append(dict(label=f"real images against\nreal images: {frame.distance_floor.max():.3g}", **_FLOOR))
    return [Line2D([], [], **looks) for looks in entries]
