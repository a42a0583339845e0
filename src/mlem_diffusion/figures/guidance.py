"""The figure of examples/guidance.py: growth of gains with the scale of guidance, and errors at equal cost."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from .style import COLOURS, MARKERS, error_bars, new_figure, styled


@styled
def plot_guidance(frame: pd.DataFrame) -> Figure:
    """Rows of guidance.csv: the toy by the correlation of its errors, the trained pair by step rule."""
    figure = new_figure(8.5, 8.5, "Guidance: one guide for all levels (dashed), or a guide per level")
    for (top, *errors), name in zip(figure.subplots(3, 2, sharex=True).T, ("toy", "portraits"), strict=True):
        shown = frame.everywhere & ((frame.rule == "sde/ddpm") | (name != "toy"))
        own = frame[frame.problem.str.startswith(name) & shown]
        groups: Any = own.groupby(["guide", "problem", "rule"])
        for i, ((guide, problem, rule), rows) in enumerate(groups):
            label = f"{guide}, {rule if name == 'portraits' else problem.replace('toy,', 'rho =')}"
            look: Any = {"color": COLOURS[i], "marker": MARKERS[i], "ls": "--" if guide == "common" else "-"}
            top.plot(rows.w, rows.growth, label=label, **look)
            for ax, budget in zip(errors, ("few", "many"), strict=True):
                values = rows[f"{budget}_error"].to_numpy()
                ax.errorbar(rows.w, values, error_bars(values, rows[f"{budget}_error_se"].to_numpy()), **look)
                ax.set(yscale="log", ylabel=f"squared error, {budget} firings")
        top.plot(rows.w, rows.w**2, ":", color="black", label="$w^2$")
        top.set(yscale="log", ylabel="gain V over that of w = 1", title=f"{name}: {', '.join(own.rule.unique())}")
        errors[-1].set_xlabel("guidance scale w")
        top.legend(fontsize=7)
    return figure
