"""The figure of measured gains: the effect of each level difference on the final image, against noise level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULE_NAMES
from ..multilevel.gains import Effects
from .style import save_figure


def plot_gains(all_effects: Sequence[Effects], path: Path, title: str = "") -> None:
    """Draw one column per step rule: the differences in the top row, their effect on the final image in the bottom row.

    Effects are rates: root mean square per unit of log-SNR, with bands of two standard errors. The final denoising has
    no step and is left out.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.6 * len(all_effects), 7.5), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(all_effects), squeeze=False, sharex=True)
    for column, effects in enumerate(all_effects):
        top, bottom = axes[:, column]
        gains, error = effects.gains()
        moved = effects.logsnr[:-1]
        step = np.diff(effects.logsnr)
        peak, inside = 0.0, step > 0  # two evaluations at one noise level (Heun) have no rate
        for k in range(1, len(effects.names)):
            colour = colormaps["viridis"](0.9 * (k - 1) / max(1, len(effects.names) - 2))
            label = f"{effects.names[k]} $-$ {effects.names[k - 1]}"
            top.plot(effects.logsnr, np.sqrt(effects.squares[k]), color=colour, label=label)
            rate = np.sqrt(gains[k, :-1][inside]) / step[inside]
            low, high = (
                np.sqrt(np.maximum(gains[k, :-1] + s * error[k, :-1], 1e-30))[inside] / step[inside] for s in (-2, 2)
            )
            bottom.plot(moved[inside], rate, color=colour)
            bottom.fill_between(moved[inside], low, high, color=colour, alpha=0.2, linewidth=0)
            peak = max(peak, float(rate.max()))
        bottom.set_ylim(1e-5 * peak, 2 * peak)
        for ax in (top, bottom):
            ax.set_yscale("log")
            ax.grid(alpha=0.25)
        rule = STEP_RULE_NAMES.get(effects.step_rule, effects.step_rule)
        top.set_title(f"{rule}, {DYNAMICS_NAMES[effects.dynamics]}", fontsize=10.5)
        bottom.set_xlabel("log-SNR (noise to data)")
    axes[0, 0].set_ylabel("level difference, rms per pixel")
    axes[1, 0].set_ylabel("effect on the final image,\nrms per unit of log-SNR")
    axes[0, 0].legend(fontsize=8.5, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    save_figure(figure, path)
