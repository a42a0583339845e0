"""The figure of ablation.json: the cost of each level in FLOPs and seconds, and the cost ratio without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULE_NAMES
from .style import save_figure

_UNITS = {"flops": ("#0072B2", "o", "FLOPs"), "seconds": ("#D55E00", "s", "seconds")}  # Okabe-Ito, as in plot_gamma


def plot_ablation(content: dict[str, Any], path: Path, title: str = "") -> None:
    """Draw the content of ablation.json to a PNG.

    Left: each level's share of the largest level's FLOPs and seconds. Right, one panel per step rule: cost at equal
    predicted error without the level, divided by the cost with it. A bar runs from the geometric mean (marker) to the
    largest value. Hollow markers are levels that the ablation removed."""
    from matplotlib.figure import Figure

    levels = content["levels"]
    rules = list(dict.fromkeys(rule for level in levels for rule in level["cost_ratio_flops"] or {}))
    figure = Figure(figsize=(4.2 + (1.6 + 0.42 * len(levels)) * len(rules), 4.2), dpi=150, layout="constrained")
    left, *right = figure.subplots(1, 1 + len(rules), width_ratios=[1.0, *[0.9] * len(rules)], squeeze=False)[0]
    _draw_shares(left, levels)
    for ax, rule in zip(right, rules, strict=True):
        _draw_cost_ratio(ax, levels, rule, content["tolerance"])
    of_all = [w["largest"] for e in levels[:-1] for unit in _UNITS for w in e[f"cost_ratio_{unit}"].values()]
    top = max(1.5, max(of_all, default=1.0) ** 1.2)  # room for the legend
    for ax in right:
        ax.set_ylim(top**-0.06, top)
        _ticks(ax, top)
    if right:
        right[0].set_ylabel("cost without the level / cost with it")
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


def _draw_shares(ax: Any, levels: list[dict[str, Any]]) -> None:
    for unit, (colour, marker, word) in _UNITS.items():
        ax.plot([e[f"{unit}_share"] for e in levels], color=colour, marker=marker, ms=6, lw=1.2, label=word)
    ax.set_yscale("log")
    ax.set_ylabel(f"one evaluation, as a share of {levels[-1]['name']}'s")
    ax.set_title("Cost", fontsize=11)
    ax.legend(fontsize=9, frameon=False, loc="lower right")
    _names(ax, levels)


def _draw_cost_ratio(ax: Any, levels: list[dict[str, Any]], rule: str, tolerance: dict[str, float]) -> None:
    from matplotlib.lines import Line2D

    for offset, (unit, (colour, marker, _)) in zip((-0.13, 0.13), _UNITS.items(), strict=True):
        for k, level in enumerate(levels[:-1]):
            ratio = level[f"cost_ratio_{unit}"][rule]
            ax.plot([k + offset] * 2, [ratio["mean"], ratio["largest"]], color=colour, lw=2.5, alpha=0.45)
            face = colour if level[f"kept_{unit}"] else "white"
            ax.plot(k + offset, ratio["mean"], marker=marker, ms=7, mfc=face, mec=colour, mew=1.4, zorder=3)
    ax.axhline(1 + tolerance["mean"], color="0.5", lw=0.9, ls=":")
    ax.set_yscale("log")
    dynamics, step_rule = rule.split("/")
    ax.set_title(f"Cost ratio: {STEP_RULE_NAMES.get(step_rule, step_rule)},\n{DYNAMICS_NAMES[dynamics]}", fontsize=11)
    handles = [
        Line2D([], [], color="0.3", marker="o", ls="", mfc="0.3", label="kept"),
        Line2D([], [], color="0.3", marker="o", ls="", mfc="white", label="removed"),
    ]
    ax.legend(handles=handles, fontsize=9, frameon=False, loc="upper right", ncols=2)
    _names(ax, levels)


def _ticks(ax: Any, top: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1.0, 1.1, 1.2, 1.3, 1.5, 2.0) if top < 2.5 else (1.0, 1.5, 2.0, 3.0, 5.0) if top < 12 else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _names(ax: Any, levels: list[dict[str, Any]]) -> None:
    ax.set_xticks(range(len(levels)), [e["name"] for e in levels], rotation=35 if len(levels) > 6 else 0)
    ax.set_xlim(-0.6, len(levels) - 0.4)
    ax.grid(axis="y", alpha=0.25)
