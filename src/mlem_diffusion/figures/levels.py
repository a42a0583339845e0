"""The figures of a family of levels: training, diagnostics, gains and ablation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..multilevel.gains import Effects
from . import style

_UNITS = {"flops": (style.BLUE, "o", "FLOPs"), "seconds": (style.ORANGE, "s", "seconds")}


@style.styled
def plot_training(levels: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Training loss against images seen and held-out denoising error against log-SNR, by the levels' metadata."""
    figure = style.new_figure(11.5, 4.4, title)
    left, right = figure.subplots(1, 2)
    for level, colour in zip(levels, style.shades(len(levels)), strict=True):
        history, held_out = level["history"], level["held_out"]
        images, losses = [point["images"] for point in history], [point["loss"] for point in history]
        looks: Any = dict(color=colour, ls="--" if "teacher" in level else "-")
        left.plot(images, losses, marker="." if len(history) < 30 else None, label=level["name"], **looks)
        right.plot(held_out["logsnr"], held_out["loss"], marker="o", ms=3.5, **looks)
    title = "training" + (" (dashed: on the teacher's outputs)" if any("teacher" in v for v in levels) else "")
    left.set(yscale="log", title=title, xlabel="images seen", ylabel="training loss")
    left.xaxis.set_major_formatter(style.THOUSANDS)
    right.set(yscale="log", title="held-out images", xlabel=style.LOGSNR, ylabel="denoising error")
    for ax in (left, right):
        style.plain_ticks(ax.yaxis)
    figure.legend(title="level", loc="outside right upper")
    return figure


@style.styled
def plot_diagnostics(content: dict[str, Any]) -> Figure:
    """Mean square differences of levels, for one of the dynamics in diagnostics.json: against log-SNR, and pooled."""
    names = content["levels"]
    where = f"{content['samples']} trajectories of {names[-1]}, {content['dynamics'].upper()}, {content['step_rule']}"
    figure = style.new_figure(13, 4.8, where)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_noise_levels(left, names, np.asarray(content["logsnr"]), content["per_noise_level"])
    _draw_pooled(right, names, np.array(content["flops"]) / 1e9, content["pooled"])
    return figure


def _draw_noise_levels(ax: Any, names: list[str], logsnr: np.ndarray, found: dict[str, Any]) -> None:
    means, errors = (np.array(found[key], dtype=float) for key in ("mean_square", "mean_square_se"))
    for k, colour in enumerate(style.shades(len(names))[1:], 1):
        show = means[k] > 0
        x, y = logsnr[show], means[k][show]
        below, above = style.error_bars(y, errors[k][show])
        marker, label = style.MARKERS[k % len(style.MARKERS)], f"{names[k]} - {names[k - 1]}"
        ax.plot(x, y, color=colour, marker=marker, ms=4, label=label)
        ax.fill_between(x, y - below, y + above, color=colour, alpha=0.25, lw=0)
    ax.plot(logsnr, found["largest_variance"], color="0.45", ls=":", label=f"variance of {names[-1]}")
    ax.set(yscale="log", xlabel=style.LOGSNR, ylabel="mean square per pixel, images in [−1, 1]")
    ax.set_title("Differences of neighbouring levels (bands: ±2 s.e.)")
    ax.legend(loc="lower left")


def _draw_pooled(ax: Any, names: list[str], gflops: np.ndarray, pooled: dict[str, Any]) -> None:
    keys = ("mean_square", "mean_square_se", "variance_cost")
    values, errors, products = (np.array(pooled[key], dtype=float) for key in keys)
    show = (np.arange(len(names)) > 0) & (values > 0)
    bars = style.error_bars(values[show], errors[show])
    ax.errorbar(gflops[show], values[show], yerr=bars, color=style.ORANGE, marker="s", label="$V_k$, pooled")
    label = "$V_k c_k$  ($c_k$: GFLOP per firing)"
    ax.plot(gflops[show], products[show] / 1e9, color=style.BLUE, marker="o", label=label)
    ax.set(xscale="log", yscale="log", xlabel=style.GFLOP, ylabel="mean square, or its product with cost")
    ax.set_title("Pooled over noise levels (bars: ±2 s.e.)")
    for k in np.flatnonzero(show):
        ax.annotate(names[k], (gflops[k], values[k]), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    style.more_room(ax, above=0.25)
    ax.legend(loc="upper right")
    style.plain_ticks(ax.xaxis)


@style.styled
def plot_gains(all_effects: Sequence[Effects], title: str = "") -> Figure:
    """The effects of level differences on the final image against log-SNR, a panel per step rule.
    Effects are rates, with bands of two standard errors. The final denoising has no step and is left out."""
    figure = style.new_figure(1.5 + 4.6 * len(all_effects), 4.2, title)
    panels = figure.subplots(1, len(all_effects), squeeze=False)[0]
    for ax, effects in zip(panels, all_effects, strict=True):
        _draw_effects(ax, effects)
    panels[0].set_ylabel("effect on the final image,\nrms per unit of log-SNR")
    panels[0].legend()
    return figure


def _draw_effects(ax: Any, effects: Effects) -> None:
    gains, errors = effects.gains()
    steps = np.diff(effects.logsnr)
    inside = np.flatnonzero(steps > 0)  # two evaluations at one noise level (Heun) have no rate
    x, step, peak = effects.logsnr[inside], steps[inside], 0.0
    for k, colour in enumerate(style.shades(len(effects.names) - 1), 1):
        gain, error = gains[k, inside], errors[k, inside]
        low, rate, high = (np.sqrt(np.maximum(gain + s * error, 1e-30)) / step for s in (-2, 0, 2))
        ax.plot(x, rate, color=colour, label=f"{effects.names[k]} $-$ {effects.names[k - 1]}")
        ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        peak = max(peak, float(rate.max()))
    ax.set(yscale="log", ylim=(1e-5 * peak, 2 * peak), xlabel="log-SNR (noise to data)")
    ax.set_title(style.rule_title(effects.dynamics, effects.step_rule))


@style.styled
def plot_ablation(content: dict[str, Any], title: str = "") -> Figure:
    """Draw the content of ablation.json: each level's cost, and one panel of cost ratios per step rule.
    A bar runs from the geometric mean (marker) to the largest value. Hollow: levels that the ablation removed."""
    levels, units = content["levels"], list(content["kept"])
    rules = list(levels[0][f"cost_ratio_{units[0]}"] or {})
    figure = style.new_figure(4.2 + (1.6 + 0.42 * len(levels)) * len(rules), 4.2, title)
    axes = figure.subplots(1, 1 + len(rules), width_ratios=[1.0, *[0.9] * len(rules)], squeeze=False)[0]
    for unit, (colour, marker, word) in _UNITS.items():
        axes[0].plot([level[unit] / levels[-1][unit] for level in levels], color=colour, marker=marker, label=word)
    axes[0].set(yscale="log", title="Cost", ylabel=f"one evaluation, as a share of {levels[-1]['name']}'s")
    axes[0].legend(loc="lower right")
    for ax, rule in zip(axes[1:], rules, strict=True):
        _draw_cost_ratios(ax, levels, rule, units)
        ax.axhline(1 + content["tolerance"]["mean"], color="0.5", lw=0.9, ls=":")
    highest = max([1.25, *(ax.get_ylim()[1] for ax in axes[1:])])
    for ax in axes[1:]:  # one scale for all, with room for the legend
        ax.set_ylim(highest**-0.07, highest**1.2)
        style.plain_ticks(ax.yaxis)
    for ax in axes:
        ax.set_xticks(range(len(levels)), [e["name"] for e in levels], rotation=35 if len(levels) > 6 else 0)
        ax.set_xlim(-0.6, len(levels) - 0.4)
        ax.grid(False, axis="x")
    if rules:
        axes[1].set_ylabel("cost without the level / cost with it")
    return figure


def _draw_cost_ratios(ax: Any, levels: list[dict[str, Any]], rule: str, units: list[str]) -> None:
    for offset, unit in zip((-0.13, 0.13), units, strict=False):
        colour, marker, _ = _UNITS[unit]
        for k, level in enumerate(levels[:-1]):
            ratio = level[f"cost_ratio_{unit}"][rule]
            ax.plot([k + offset] * 2, [ratio["mean"], ratio["largest"]], color=colour, lw=2.5, alpha=0.45)
            face = colour if level[f"kept_{unit}"] else "white"
            ax.plot(k + offset, ratio["mean"], marker=marker, ms=7, mfc=face, mec=colour, mew=1.4, zorder=3)
    ax.set(yscale="log", title="Cost ratio: " + style.rule_title(*rule.split("/")).replace(", ", ",\n"))
    faces = {"kept": "0.3", "removed": "white"}
    handles = [Line2D([], [], color="0.3", marker="o", ls="", mfc=face, label=word) for word, face in faces.items()]
    ax.legend(handles=handles, loc="upper right", ncols=2)
