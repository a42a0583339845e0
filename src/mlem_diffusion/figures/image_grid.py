"""Grids of uint8 RGB images [N, 3, H, W]: plain ones, and ones with a labelled row per sampler setting."""

import math
import textwrap
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont


def image_grid(images: Any, columns: int | None = None, pad: int = 1) -> Image.Image:
    """Tile images (tensor or array) row by row on white, in a nearly square grid by default.

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
