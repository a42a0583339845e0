"""The figure of measured gains: the effect of each level difference on the final image, against noise level."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..multilevel.gains import Effects
from .style import new_figure, rule_title, shades, styled


@styled
def plot_gains(all_effects: Sequence[Effects], title: str = "") -> Figure:
    """One column per step rule: the differences in the top row, their effect on the final image in the bottom row.

    Effects are rates: root mean square per unit of log-SNR, with bands of two standard errors. The final denoising has
    no step and is left out.
    """
    figure = new_figure(1.5 + 4.6 * len(all_effects), 7.5, title)
    axes = figure.subplots(2, len(all_effects), squeeze=False, sharex=True)
    for (top, bottom), effects in zip(axes.T, all_effects, strict=True):
        _draw_column(top, bottom, effects)
    axes[0, 0].set_ylabel("level difference, rms per pixel")
    axes[1, 0].set_ylabel("effect on the final image,\nrms per unit of log-SNR")
    axes[0, 0].legend()
    return figure


def _draw_column(top: Any, bottom: Any, effects: Effects) -> None:
    gains, errors = effects.gains()
    steps = np.diff(effects.logsnr)
    inside = np.flatnonzero(steps > 0)  # two evaluations at one noise level (Heun) have no rate
    x, step, peak = effects.logsnr[inside], steps[inside], 0.0
    for k, colour in enumerate(shades(len(effects.names) - 1), 1):
        gain, error = gains[k, inside], errors[k, inside]
        low, rate, high = (np.sqrt(np.maximum(gain + s * error, 1e-30)) / step for s in (-2, 0, 2))
        label = f"{effects.names[k]} $-$ {effects.names[k - 1]}"
        top.plot(effects.logsnr, np.sqrt(effects.squares[k]), color=colour, label=label)
        bottom.plot(x, rate, color=colour)
        bottom.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        peak = max(peak, float(rate.max()))
    top.set(yscale="log", title=rule_title(effects.dynamics, effects.step_rule))
    bottom.set(yscale="log", ylim=(1e-5 * peak, 2 * peak), xlabel="log-SNR (noise to data)")
