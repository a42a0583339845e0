"""The figure for gamma.json: error against FLOPs, and gamma per noise level and training length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .style import ESTIMATE_STYLES, decimal_ticks, light_grid, save_figure

LENGTH_COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#0072B2", "#D55E00", "#009E73")
PAPER_GAMMA = 2.5


def plot_gamma(result: dict[str, Any], path: Path, title: str = "") -> None:
    """Draw the content of gamma.json to a PNG.

    `result` is the result of `gamma.estimate.estimate`, with an optional list "training_lengths" of {"fraction",
    "images", "estimates", "levels", "points"}, in order of training. Without the list, the two lower panels show a
    single training length. If `result` has "differences_fall" (gamma/level_quality.py), a third row shows it.
    """
    from matplotlib.figure import Figure

    lengths = result.get("training_lengths") or [{**result, "fraction": 1.0}]
    falls = result.get("differences_fall")
    rows = 3 if falls else 2
    figure = Figure(figsize=(13, 4.75 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, 2)
    if falls:
        _draw_ratios(axes[2, 0], falls, "to_largest", "$E|f^k-f^K|^2$")
        _draw_ratios(axes[2, 1], falls, "to_previous", "$E|f^k-f^{k-1}|^2$")
    _draw_fits(axes[0, 0], result)
    _draw_noise_levels(axes[0, 1], result)
    _draw_lengths(axes[1, 0], lengths)
    _draw_losses(axes[1, 1], lengths)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=9.5,
        frameon=False,
        title="γ panels: an arrow is an interval that goes on beyond the axis; "
        "no marker means no finite γ, or one beyond the axis.   Errors: images in [−1, 1].",
        title_fontsize=9.5,
    )
    if title:
        figure.suptitle(title, fontsize=13)
    save_figure(figure, path)


def _text(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    interval = f"[{low:.2f}, {'∞' if high is None else f'{high:.2f}'}]"
    gamma = estimate["gamma"]
    return f"no finite γ {interval}" if gamma is None else f"γ = {gamma:.2f} {interval}"


def _draw_fits(ax: Any, result: dict[str, Any]) -> None:
    lowest = []
    for name, (colour, marker, label) in ESTIMATE_STYLES.items():
        fit, points = result["estimates"][name], result["points"][name]
        floor = fit["floor"] if name == "loss_fit" and fit["gamma"] is not None else 0.0
        if name == "loss_fit" and fit["gamma"] is None:
            label = "loss"
        x = np.array([p["gflop"] for p in points])
        y = np.array([p["value"] for p in points]) - floor
        # Levels are compared on the same images: the standard error of the contrast is the relevant one.
        se = np.array([p.get("contrast_se", p["se"]) for p in points])
        show = y > 0
        lowest.extend(y[show])
        # A log axis cannot show a bar that reaches zero: cut it at a twentieth of its point.
        bars = np.stack([np.minimum(2 * se, 0.95 * y), 2 * se])[:, show]
        ax.errorbar(
            x[show],
            y[show],
            yerr=bars,
            fmt=marker,
            color=colour,
            ms=6,
            capsize=3,
            lw=1,
            label=f"{label}:  {_text(fit)}",
        )
        if fit["gamma"] is None or fit["amplitude"] is None:
            continue
        s, a = 2 / fit["gamma"], fit["amplitude"]
        if name == "loss_fit":
            dense = np.geomspace(x[0], x[-1], 200)
            ax.plot(dense, a * dense**-s, color=colour, lw=1.3)
        elif name == "to_largest":
            dense = np.geomspace(x[0], x[-1], 200)
            largest = result["levels"][-1]["gflop"]
            ax.plot(dense, a * (dense**-s - largest**-s), color=colour, lw=1.3)
        else:  # the law is for pairs of levels, so it is defined at the points only
            before = np.array([p["gflop_previous"] for p in points])
            ax.plot(x, a * (before**-s - x**-s), color=colour, lw=1.3, ls="--")
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("GFLOP per evaluation of one image ($T_k$)")
    ax.set_ylabel("mean squared error per pixel")
    ax.set_title("Error against FLOPs, pooled over noise levels (bars: ±2 s.e.)", fontsize=11)
    if lowest:  # room for the legend under the points
        low, high = ax.get_ylim()
        low = max(low, min(lowest) / 4)
        ax.set_ylim(low / (high / low) ** 0.38, high)
    light_grid(ax)
    decimal_ticks(ax.xaxis)
    ax.legend(loc="lower left", fontsize=9, title="law fitted to the points, 95% interval", title_fontsize=9)


def _draw_noise_levels(ax: Any, result: dict[str, Any]) -> None:
    rows = result["per_noise_level"]
    x = np.array([row["logsnr"] for row in rows])
    step = float(np.min(np.abs(np.diff(np.sort(x))))) if len(x) > 1 else 1.0
    estimates = [row["estimates"] for row in rows]
    top = _gamma_top(estimates)
    for i, name in enumerate(ESTIMATE_STYLES):
        _intervals(ax, x + 0.22 * step * (i - 1), [e[name] for e in estimates], name, top)
    ax.set_xlabel("log-SNR  $\\log(\\alpha^2/\\sigma^2)$   (noisy → clean)")
    ax.set_title("γ per noise level (95% profile intervals)", fontsize=11)
    _finish_gamma_axis(ax, top)


def _draw_lengths(ax: Any, lengths: list[dict[str, Any]]) -> None:
    x = np.arange(len(lengths), dtype=float)
    estimates = [entry["estimates"] for entry in lengths]
    top = _gamma_top(estimates)
    for i, name in enumerate(ESTIMATE_STYLES):
        _intervals(ax, x + 0.14 * (i - 1), [e[name] for e in estimates], name, top)
    ax.set_xlim(-0.6, len(lengths) - 0.4)
    ax.set_xticks(x, [_length_label(entry).replace(", ", "\n") for entry in lengths])
    ax.set_xlabel("training length")
    ax.set_title("γ at several training lengths, pooled (95% intervals)", fontsize=11)
    _finish_gamma_axis(ax, top)


def _draw_losses(ax: Any, lengths: list[dict[str, Any]]) -> None:
    shades = LENGTH_COLOURS if len(lengths) > 1 else (ESTIMATE_STYLES["loss_fit"][0],)
    for i, entry in enumerate(lengths):
        colour, marker = shades[i % len(shades)], "ov^sDP"[i % 6]
        levels, fit = entry["levels"], entry["estimates"]["loss_fit"]
        x = np.array([level["gflop"] for level in levels])
        bars = [2 * p.get("contrast_se", p["se"]) for p in entry["points"]["loss_fit"]]
        ax.errorbar(
            x,
            [level["loss"] for level in levels],
            yerr=bars,
            fmt=marker,
            color=colour,
            ms=6,
            capsize=3,
            lw=1,
            label=_length_label(entry),
        )
        if fit["gamma"] is None or fit["amplitude"] is None:
            continue
        dense = np.geomspace(x[0], x[-1], 200)
        ax.plot(dense, fit["floor"] + fit["amplitude"] * dense ** (-2 / fit["gamma"]), color=colour, lw=1.3)
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("GFLOP per evaluation of one image ($T_k$)")
    ax.set_ylabel("held-out mean squared error per pixel")
    ax.set_title("Denoising loss against FLOPs (bars: ±2 s.e. between levels)", fontsize=11)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** (0.08 * (1 + len(lengths))))  # room for the legend
    light_grid(ax)
    decimal_ticks(ax.xaxis)
    decimal_ticks(ax.yaxis)
    ax.legend(loc="upper right", fontsize=9, title="training length", title_fontsize=9)


def _draw_ratios(ax: Any, falls: dict[str, Any], kind: str, what: str) -> None:
    """Draw ratios of neighbouring squared differences by noise level; crosses mark rises beyond two standard errors."""
    from matplotlib import colormaps

    x, rows = falls["noise_levels"], falls[kind]
    bad = {(*v["levels"], v["logsnr"]) for v in falls["violations"] if v["kind"] == kind}
    for i, (pair, ratio) in enumerate(zip(rows["pairs"], rows["ratio"], strict=True)):
        colour = colormaps["viridis"](0.9 * i / max(len(rows["pairs"]) - 1, 1))
        ax.plot(x, ratio, "o-", color=colour, ms=4, lw=1.2, label=f"{pair[1]} / {pair[0]}")
        hit = [(a, r) for a, r in zip(x, ratio, strict=True) if (*pair, a) in bad]
        if hit:
            ax.plot(*zip(*hit, strict=True), "x", color="#D55E00", ms=10, mew=2, ls="none")
    ax.axhline(1.0, color="0.25", lw=1, zorder=0)
    ax.set_yscale("log")
    decimal_ticks(ax.yaxis)
    ax.set_xlabel("log-SNR  $\\log(\\alpha^2/\\sigma^2)$   (noisy → clean)")
    ax.set_ylabel("later level / earlier level")
    ax.set_title(f"Does {what} fall with the level? (crosses: it rises, beyond 2 s.e.)", fontsize=11)
    light_grid(ax)
    ax.legend(fontsize=9, ncols=2)


def _length_label(entry: dict[str, Any]) -> str:
    images = sorted({int(n) for n in entry.get("images") or [level["images"] for level in entry["levels"]]})
    span = _count(images[0]) if len(images) == 1 else f"{_count(images[0])} to {_count(images[-1])}"
    return f"{100 * entry['fraction']:.0f}%, {span} images"


def _count(n: int) -> str:
    if n >= 1_000_000:
        return f"{n / 1e6:.3g}M"
    return f"{n / 1e3:.3g}k" if n >= 1_000 else str(n)


def _gamma_top(estimates: list[dict[str, Any]]) -> float:
    """Upper end of a gamma axis: between 5 and 20, and above most point estimates; wide intervals may exceed it."""
    points = [e["gamma"] for row in estimates for e in row.values() if e["gamma"] is not None]
    typical = float(np.quantile(points, 0.9)) if points else PAPER_GAMMA
    return float(np.clip(1.6 * typical, 5.0, 20.0))


def _intervals(ax: Any, x: np.ndarray, estimates: list[dict[str, Any]], name: str, top: float) -> None:
    """Draw points with intervals; an interval that exceeds the axis ends in an arrow."""
    colour, marker, label = ESTIMATE_STYLES[name]
    label = label.replace(" $-$ fitted floor", " (floor fitted)")
    edge = 0.97 * top
    for position, estimate in zip(x, estimates, strict=True):
        low, high = estimate["interval"]
        start = min(low, 0.9 * top)
        if high is None or high > edge:
            ax.plot([position, position], [start, edge], color=colour, lw=1.2, alpha=0.8)
            ax.plot(position, edge, marker=(3, 0, 0), color=colour, ms=7, ls="none")
        else:
            ax.plot([position, position], [start, high], color=colour, lw=1.2, alpha=0.8)
            ax.plot(position, high, marker="_", color=colour, ms=6)
        if start == low:
            ax.plot(position, start, marker="_", color=colour, ms=6)
    finite = [(p, e["gamma"]) for p, e in zip(x, estimates, strict=True) if e["gamma"] is not None]
    inside = [(p, g) for p, g in finite if g <= edge]
    ax.plot(*(np.array(inside).T if inside else ([], [])), marker, color=colour, ms=6, label=label)


def _finish_gamma_axis(ax: Any, top: float) -> None:
    for value, style, text, va in (
        (2.0, "-", "HTMC\nabove 2", "top"),
        (PAPER_GAMMA, ":", f"paper {PAPER_GAMMA}", "bottom"),
    ):
        ax.axhline(value, color="0.25", lw=1, ls=style, zorder=0)
        ax.annotate(
            text,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3 if va == "top" else 1),
            textcoords="offset points",
            ha="left",
            va=va,
            fontsize=8.5,
            color="0.25",
        )
    ax.set_ylim(0, top)
    ax.set_ylabel("exponent γ  (cost ∝ error$^{-γ}$)")
    light_grid(ax)
