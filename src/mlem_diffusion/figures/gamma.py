"""The figures for gamma.json: error against FLOPs by one law, for a slide, and all estimates in detail."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

from . import style

PAPER_GAMMA = 2.5
_ESTIMATES = {
    "loss_fit": (style.BLUE, "o", "loss"),
    "drops": (style.PURPLE, "v", "drop in loss"),
    "differences": (style.ORANGE, "s", "$E|f^k-f^{k-1}|^2$"),
    "to_largest": (style.GREEN, "D", "$E|f^k-f^K|^2$"),
}
_GREY = "0.6"  # of estimates that do not apply, which are hollow too
_NOTE = "Arrow: the interval goes on. No marker: no finite γ, or beyond the axis.   Errors: images in [−1, 1]."


@style.styled
@style.large
def plot_gamma(result: dict[str, Any], title: str = "") -> Figure:
    """Root-mean-square error against FLOPs with one law, the answer to gamma > 2, and gamma by training length.
    The law is that of neighbouring levels' differences where it applies, else that of the loss."""
    estimates, lengths = result["estimates"], result["training_lengths"]
    name = "differences" if estimates["differences"].get("applicable", True) else "loss_fit"
    figure = style.new_figure(12, 6, title)
    main, by_length = figure.subplots(1, 2, width_ratios=(2.6, 1))
    _draw_errors(main, result, name)
    main.set_title("  95% ".join(_texts(estimates[name], 1)), loc="left", fontsize=27, pad=9, color=_ESTIMATES[name][0])
    _draw_gammas(by_length, range(len(lengths)), lengths, {name: _looks(estimates)[name]})
    labels = [f"{e['fraction']:.0%}\n{_texts(e['estimates'][name], 1)[0].replace(' finite', '')}" for e in lengths]
    by_length.set_xticks(range(len(lengths)), labels)
    by_length.set(xlabel="share of training", ylabel="γ, 95% interval", xlim=(-0.6, len(lengths) - 0.4))
    by_length.set_title(f"harder than Monte Carlo?\n{result['htmc']}", fontsize=16)
    by_length.locator_params(axis="y", nbins=6, integer=True)
    for ax in (main, by_length):
        ax.tick_params(labelsize=13)  # also of ticks that are made later
    return figure


def _draw_errors(ax: Any, result: dict[str, Any], name: str) -> None:
    """Root-mean-square errors with bars, the law if there is one, and the slope of the paper's gamma."""
    x, squares, bars, law = _measured(result, name)
    y, colour, floor = np.sqrt(squares), _ESTIMATES[name][0], result["estimates"][name]["floor"]
    bars = np.abs(np.sqrt(squares + [[-1], [1]] * bars) - y)
    what = r"\sqrt{L - L_\infty}" if floor and law else r"\sqrt{L}" if name == "loss_fit" else r"|f^k-f^{k-1}|"
    note = f", above $L_\\infty$ = {floor:.4f}" if floor and law else ""
    ax.errorbar(x, y, yerr=bars, fmt="o", color=colour, label=f"levels, ±2 s.e.{note}")
    cost, values = law or (x, squares)
    paper = values[0] ** 0.5 * (cost / cost[0]) ** (-1 / PAPER_GAMMA)
    ax.plot(cost, paper, ":", color="0.25", lw=1.5, label=f"slope of the paper's γ = {PAPER_GAMMA}")
    if law:
        ax.plot(cost, np.sqrt(values), color=colour, label="law: error ∝ cost$^{-1/γ}$")
    ax.set(xscale="log", yscale="log", xlabel=style.GFLOP, ylabel=f"root-mean-square error  ${what}$")
    style.more_room(ax, below=0.3)
    style.plain_ticks(ax.xaxis, many_below=4)
    style.plain_ticks(ax.yaxis)
    ax.legend(loc="lower left", reverse=True, frameon=False, title=None if law else "no law: γ is not finite")


@style.styled
def plot_gamma_details(result: dict[str, Any], title: str = "") -> Figure:
    """Draw the content of gamma.json, with all estimates."""
    lengths = result["training_lengths"]
    figure = style.new_figure(13, 9.5, title)
    fits, per_noise_level, by_length, losses = figure.subplots(2, 2).flat
    _draw_fits(fits, result)
    looks = _looks(result["estimates"])
    _draw_gammas(per_noise_level, [r["logsnr"] for r in result["per_noise_level"]], result["per_noise_level"], looks)
    per_noise_level.set(xlabel=style.LOGSNR, title="γ per noise level (95% profile intervals)")
    _draw_gammas(by_length, range(len(lengths)), lengths, looks)
    by_length.set_xticks(range(len(lengths)), [_length_label(entry).replace(", ", "\n") for entry in lengths])
    by_length.set(xlabel="training length", title="γ at several training lengths, pooled (95% intervals)")
    by_length.set_xlim(-0.6, len(lengths) - 0.4)
    _draw_losses(losses, lengths)
    figure.legend(*by_length.get_legend_handles_labels(), loc="outside lower center", ncols=4, title=_NOTE)
    return figure


def _looks(estimates: dict[str, Any]) -> dict[str, tuple[str, str, str, str]]:
    """Colour, marker, its filling and label of each estimate that the result has."""
    found = {}
    for name, (colour, marker, label) in _ESTIMATES.items():
        if name in estimates and estimates[name].get("applicable", True):
            found[name] = (colour, marker, colour, label)
        elif name in estimates:
            found[name] = (_GREY, marker, "white", f"{label}, not applicable")
    return found


def _draw_fits(ax: Any, result: dict[str, Any]) -> None:
    """Measured errors with bars, and the fitted laws."""
    lowest = np.inf
    for name, (colour, marker, filling, label) in _looks(result["estimates"]).items():
        x, y, bars, law = _measured(result, name)
        lowest = min([lowest, *y])
        label += ":  " + " ".join(_texts(result["estimates"][name]))
        ax.errorbar(x, y, yerr=bars, fmt=marker, color=colour, mfc=filling, lw=1, label=label)
        if law:
            ax.plot(*law, color=colour)
    for pair, point in zip(result.get("nestedness", ()), result["points"]["differences"], strict=False):
        text = "no drop" if pair["ratio"] is None else f"×{pair['ratio']:.{2 if pair['ratio'] < 10 else 0}f}"
        ax.text(point["gflop"], 0.96, text, transform=ax.get_xaxis_transform(), ha="center", fontsize=8.5)
    ax.set(xscale="log", yscale="log", xlabel=style.GFLOP, ylabel="mean squared error per pixel")
    ax.set_title("Error against FLOPs, pooled over noise levels (bars: ±2 s.e.)")
    ax.set_ylim(bottom=max(ax.get_ylim()[0], min(lowest, 1.0) / 4))
    style.more_room(ax, below=0.65, above=0.05)
    style.plain_ticks(ax.xaxis)
    title = "law fitted (loss: above its fitted floor), 95% interval"
    if "nestedness" in result:
        title += "\n×, above: $E|f^k-f^{k-1}|^2$ over the drop in loss (nested: 1)"
    ax.legend(loc="lower left", title=title)


def _measured(result: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """FLOPs and squared errors [N] above the floor, where positive, their bars [2, N], and FLOPs and values of the law:
    that of the points, less that of the level that they are differences to; or None."""
    fit, points = result["estimates"][name], result["points"][name]
    x, y = np.array([(point["gflop"], point["value"]) for point in points]).T
    y = y - (fit["floor"] or 0.0 if fit["amplitude"] else 0.0)
    show, law = y > 0, None
    if fit["amplitude"]:
        start = np.array([point.get("gflop_previous", point["gflop"]) for point in points])
        end = {"loss_fit": np.inf, "to_largest": result["levels"][-1]["gflop"]}.get(name, x)
        law = x, _law(fit, start) - _law(fit, end)
    return x[show], y[show], style.error_bars(y, _contrasts(points))[:, show], law


def _texts(fit: dict[str, Any], places: int = 2) -> tuple[str, str]:
    """Gamma and its interval."""
    gamma, low, high = ("∞" if v is None else f"{v:.{places}f}" for v in (fit["gamma"], *fit["interval"]))
    return "no finite γ" if fit["gamma"] is None else f"γ = {gamma}", f"[{low}, {high}]"


def _law(fit: dict[str, Any], gflops: Any) -> Any:
    return fit["amplitude"] * gflops ** (-2 / fit["gamma"])


def _contrasts(points: list[dict[str, Any]]) -> np.ndarray:
    """Standard errors; those of the contrast if known, because levels are compared on the same images."""
    return np.array([point.get("contrast_se", point["se"]) for point in points])


def _draw_gammas(ax: Any, x: Sequence[float], entries: list[dict[str, Any]], looks: dict[str, Any]) -> None:
    """Gamma with intervals at every x by every estimate; an interval that exceeds the axis ends in an arrow."""
    found = [entry["estimates"][name]["gamma"] for entry in entries for name in looks]
    typical = float(np.quantile([g for g in found if g is not None] or PAPER_GAMMA, 0.9))
    top = float(np.clip(1.6 * typical, 5.0, 20.0))  # above most points; wide intervals may exceed it
    edge, shift, small = 0.97 * top, 0.18 * min(np.diff(sorted(x)), default=1.0), 0.85 * rcParams["font.size"]
    for i, (name, (colour, marker, filling, label)) in enumerate(looks.items()):
        rows = [(e["gamma"], *e["interval"]) for e in (entry["estimates"][name] for entry in entries)]
        gamma, low, high = np.array(rows, dtype=float).T  # nan: not finite
        places, beyond = np.array(x) + (i - (len(looks) - 1) / 2) * shift, ~(high <= edge)
        ax.vlines(places, np.minimum(low, 0.9 * top), np.where(beyond, edge, high), color=colour, alpha=0.8)
        ax.plot(places[beyond], np.full(beyond.sum(), edge), "^", color=colour)
        ax.plot(places, np.where(gamma <= edge, gamma, np.nan), marker, color=colour, mfc=filling, label=label)
    for value, line, text, va in ((2.0, "-", "HTMC\nabove 2", "top"), (PAPER_GAMMA, ":", "paper 2.5", "bottom")):
        ax.axhline(value, color="0.25", lw=1, ls=line, zorder=0)
        ax.text(1.01, value, text, transform=ax.get_yaxis_transform(), va=va, fontsize=small, color="0.25")
    ax.set(ylim=(0, top), ylabel="exponent γ  (cost ∝ error$^{-γ}$)")


def _draw_losses(ax: Any, lengths: list[dict[str, Any]]) -> None:
    for i, entry in enumerate(lengths):
        colour = style.COLOURS[::-1][i % len(style.COLOURS)]
        fit = entry["estimates"]["loss_fit"]
        x, losses = np.array([(level["gflop"], level["loss"]) for level in entry["levels"]]).T
        looks = dict(fmt=style.MARKERS[i % 8], color=colour, lw=1, label=_length_label(entry))
        ax.errorbar(x, losses, yerr=2 * _contrasts(entry["points"]["loss_fit"]), **looks)
        if fit["amplitude"]:
            ax.plot(x, fit["floor"] + _law(fit, x), color=colour)
    ax.set(xscale="log", yscale="log", xlabel=style.GFLOP, ylabel="held-out mean squared error per pixel")
    ax.set_title("Denoising loss against FLOPs (bars: ±2 s.e. between levels)")
    style.more_room(ax, above=0.08 * (1 + len(lengths)))
    style.plain_ticks(ax.xaxis)
    style.plain_ticks(ax.yaxis)
    ax.legend(loc="upper right", title="training length")


def _length_label(entry: dict[str, Any]) -> str:
    span = " to ".join(dict.fromkeys(style.THOUSANDS(n) for n in (min(entry["images"]), max(entry["images"]))))
    return f"{100 * entry['fraction']:.0f}%, {span} images"
