"""Shared parts of the figures: colours, labels, axes, ticks and saving; grids of images."""

import io
import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULE_NAMES
from ..files import atomic_write

# Okabe-Ito colours are distinct for colour-blind readers; each series also has its own marker.
BLUE, ORANGE, PURPLE, YELLOW, GREEN, SKY = "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#009E73", "#56B4E9"
COLOURS = (BLUE, ORANGE, PURPLE, YELLOW, GREEN, SKY)
BASELINE, COINS, MULTILEVEL = "#23395b", "#ef8a00", "#b4005a"  # of methods, in all comparisons
MARKERS = "os^Dv<P>"
GFLOP = "GFLOP per evaluation of one image ($T_k$)"
THOUSANDS = EngFormatter(places=1, sep="")  # 61.4k
LOGSNR = "log-SNR  $\\log(\\alpha^2/\\sigma^2)$   (noisy → clean)"

# the decorator of every figure function; matplotlib's defaults come first, whatever the user's matplotlibrc says
styled = context(["default", {
    "figure.dpi": 130, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#e3e6ea",
    "legend.fontsize": 9,
}])  # fmt: skip
# inside it, for a figure on a slide
large = context({"font.size": 15, "legend.fontsize": 13, "lines.linewidth": 2.5, "lines.markersize": 9})


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of this size in inches, with a title of at most two lines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = textwrap.wrap(title, round(9 * width), max_lines=2, placeholder=" …")
    figure.suptitle("\n".join(lines), fontsize=13, parse_math=False)
    return figure


def shades(count: int, name: str = "viridis") -> list[Any]:
    """Colours for levels from cheap (light) to expensive (dark), of the colour map viridis or Blues."""
    cheap, expensive = (0.35, 1.0) if name == "Blues" else (0.9, 0.0)
    return [colormaps[name](value) for value in np.linspace(expensive, cheap, count)[::-1]]


def rule_title(dynamics: str, step_rule: str) -> str:
    return f"{STEP_RULE_NAMES[step_rule]}, {DYNAMICS_NAMES[dynamics]}"


def distance_label(frame: Any) -> str:
    """The name of a table's distance and its number of images, for an axis."""
    known = frame[frame.distance.notna()]
    return "" if known.empty else f"{known.distance_name.iloc[0]}  (n = {known.num_distance.iloc[0]:.0f})"


def error_bars(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Bars [2, N] of two standard errors; the lower end stays above zero, since a log axis cannot show it."""
    return np.stack([np.minimum(2 * errors, 0.95 * values), 2 * errors])


def plain_ticks(axis: Any, many_below: float = 12.0) -> None:
    """Plain numbers on a log axis, at more places the less it spans: at many below this factor."""
    low, high = axis.get_view_interval()
    places = (1.0,) if high > 200 * low else (1.0, 2.0, 5.0)
    if high < many_below * low:
        places = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=places))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if 1e-4 < value < 1e5 else f"1e{np.log10(value):.0f}")
    axis.set_minor_formatter(NullFormatter())


def more_room(ax: Any, below: float = 0.0, above: float = 0.0) -> None:
    """Widen a log axis by these shares, for a legend."""
    low, high = ax.get_ylim()
    ax.set_ylim(low / (high / low) ** below, high * (high / low) ** above)


@styled
def save(figure: Figure | Image.Image, path: Path) -> None:
    """Save a PNG, atomically; a plot in 256 colours: a third of the bytes, and no visible loss in drawings of lines."""
    picture: Any = figure
    if isinstance(figure, Figure):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # an empty box shows that the font lacks a character
            figure.savefig(content := io.BytesIO(), dpi=figure.dpi, format="png")
        picture = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    atomic_write(path, lambda p: picture.save(p, format="PNG", optimize=True))


def image_grid(images: Any, columns: int | None = None, pad: int = 1) -> Image.Image:
    """Tile uint8 RGB images [N, 3, H, W] row by row on white, in a nearly square grid by default.
    Each pixel becomes a block of pixels, so that images are at least 64 high. `pad` is the gap, around the grid too."""
    from torchvision.utils import make_grid  # it loads the compiler, which takes seconds

    images = torch.as_tensor(images).cpu()
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = math.ceil(64 / images.shape[2])
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Image.fromarray(make_grid(large, columns, pad, pad_value=255).permute(1, 2, 0).numpy())


def comparison_grid(rows: list[tuple[str, Any]]) -> Image.Image:
    """One row of images per setting, with its label at the left; a column is one seed under all settings."""
    strips = [image_grid(images, len(images), pad=2) for _, images in rows]
    labels = ["\n".join(textwrap.fill(line, 26) for line in label.split("\n")) for label, _ in rows]
    size = max(12, min(18, strips[0].height // 6))
    font, margin = ImageFont.load_default(size), size // 2
    needed = [(size + 6) * (label.count("\n") + 2) for label in labels]
    heights = [max(strip.height, height) for strip, height in zip(strips, needed, strict=True)]
    left = math.ceil(max(font.getlength(line) for label in labels for line in label.split("\n"))) + 2 * margin
    sheet = Image.new("RGB", (left + max(strip.width for strip in strips), sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for label, strip, height in zip(labels, strips, heights, strict=True):
        sheet.paste(strip, (left, top + (height - strip.height) // 2))
        pen.multiline_text((margin, top + height / 2), label, "#1c1c20", font, anchor="lm", spacing=3)
        top += height
    return sheet
