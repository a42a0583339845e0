"""Shared parts of the figures: colours, axes, ticks and saving."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Okabe-Ito colours are distinct for colour-blind readers; each estimate also has its own marker.
ESTIMATE_STYLES: dict[str, tuple[str, str, str]] = {
    "loss_fit": ("#0072B2", "o", "loss $-$ fitted floor"),
    "differences": ("#D55E00", "s", "$E|f^k-f^{k-1}|^2$"),
    "to_largest": ("#009E73", "D", "$E|f^k-f^K|^2$"),
}


def colour_scale(count: int, name: str) -> list[Any]:
    from matplotlib import colormaps

    colours: Colormap = colormaps[name]
    low, high = (0.35, 1.0) if name == "Blues" else (0.0, 0.9)
    where = np.linspace(low, high, count) if count > 1 else np.array([high])
    # Light means cheap and dark means expensive; viridis runs from dark to light, so it is reversed.
    return [colours(value) for value in (where if name == "Blues" else high - where)]


def is_positive(value: Any) -> bool:
    return value is not None and np.isfinite(value) and value > 0


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(ax: Axes) -> None:
    ax.grid(True, which="major", color="#e3e6ea", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def few_ticks(axis: Any) -> None:
    """Put plain numbers on a log axis at powers of ten; if it spans less than a factor of 200, also at 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    short = high < 200 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,)))
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if 1e-4 < v < 1e5 else f"{v:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )
    axis.set_minor_formatter(NullFormatter())


def thousands(value: float, _position: int | None = None) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 else f"{value:g}"


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a PNG of at most 256 colours: a third of the bytes, and no visible loss in drawings of lines and points."""
    path, content = Path(path), io.BytesIO()
    figure.savefig(content, dpi=figure.dpi, format="png")
    picture = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    atomic_write(path, lambda p: picture.save(p, format="PNG", optimize=True))
    return path


def note(ax: Axes, text: str) -> None:
    ax.text(
        0.5,
        0.5,
        text,
        transform=ax.transAxes,
        ha="center",
        va="center",
        color="#777777",
        fontsize=12,
        style="italic",
    )
    ax.set_xticks([])
    ax.set_yticks([])


def decimal_ticks(axis: Any) -> None:
    """Put more ticks, with plain numbers, on a log axis that spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    ratio = high / low
    subs = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if ratio < 8 else (1.0, 2.0, 5.0) if ratio < 50 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_formatter(NullFormatter())
    if ratio < 50 or low > 1e-3:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def light_grid(ax: Any) -> None:
    ax.grid(True, which="major", color="0.88", lw=0.7)
    ax.set_axisbelow(True)
