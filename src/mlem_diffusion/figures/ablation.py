"""The figure of ablation.json: the cost of each level in FLOPs and seconds, and the cost ratio without it."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .style import BLUE, ORANGE, new_figure, plain_ticks, rule_title, styled

_UNITS = {"flops": (BLUE, "o", "FLOPs"), "seconds": (ORANGE, "s", "seconds")}


@styled
def plot_ablation(content: dict[str, Any], title: str = "") -> Figure:
    """Draw the content of ablation.json.

    Left: each level's share of the largest level's FLOPs and seconds. Right, one panel per step rule: cost at equal
    predicted error without the level, divided by the cost with it. A bar runs from the geometric mean (marker) to the
    largest value. Hollow markers are levels that the ablation removed."""
    levels, units = content["levels"], list(content["kept"])
    rules = list(levels[0][f"cost_ratio_{units[0]}"] or {})
    figure = new_figure(4.2 + (1.6 + 0.42 * len(levels)) * len(rules), 4.2, title)
    left, *right = figure.subplots(1, 1 + len(rules), width_ratios=[1.0, *[0.9] * len(rules)], squeeze=False)[0]
    for unit, (colour, marker, word) in _UNITS.items():
        left.plot([level[unit] / levels[-1][unit] for level in levels], color=colour, marker=marker, label=word)
    left.set(yscale="log", title="Cost", ylabel=f"one evaluation, as a share of {levels[-1]['name']}'s")
    left.legend(loc="lower right")
    highest = 1.25
    for ax, rule in zip(right, rules, strict=True):
        _draw_cost_ratios(ax, levels, rule, units)
        ax.axhline(1 + content["tolerance"]["mean"], color="0.5", lw=0.9, ls=":")
        highest = max(highest, ax.get_ylim()[1])
    for ax in right:  # one scale for all, with room for the legend
        ax.set_ylim(highest**-0.07, highest**1.2)
        plain_ticks(ax.yaxis)
    for ax in (left, *right):
        ax.set_xticks(range(len(levels)), [e["name"] for e in levels], rotation=35 if len(levels) > 6 else 0)
        ax.set_xlim(-0.6, len(levels) - 0.4)
        ax.grid(False, axis="x")
    if right:
        right[0].set_ylabel("cost without the level / cost with it")
    return figure


def _draw_cost_ratios(ax: Any, levels: list[dict[str, Any]], rule: str, units: list[str]) -> None:
    for offset, unit in zip((-0.13, 0.13), units, strict=False):
        colour, marker, _ = _UNITS[unit]
        for k, level in enumerate(levels[:-1]):
            ratio = level[f"cost_ratio_{unit}"][rule]
            ax.plot([k + offset] * 2, [ratio["mean"], ratio["largest"]], color=colour, lw=2.5, alpha=0.45)
            face = colour if level[f"kept_{unit}"] else "white"
            ax.plot(k + offset, ratio["mean"], marker=marker, ms=7, mfc=face, mec=colour, mew=1.4, zorder=3)
    ax.set(yscale="log", title="Cost ratio: " + rule_title(*rule.split("/")).replace(", ", ",\n"))
    faces = {"kept": "0.3", "removed": "white"}
    handles = [Line2D([], [], color="0.3", marker="o", ls="", mfc=face, label=word) for word, face in faces.items()]
    ax.legend(handles=handles, loc="upper right", ncols=2)
