"""Grids of uint8 RGB images [N, 3, H, W]: plain ones, and ones with a labelled row per sampler setting."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files import atomic_write

if TYPE_CHECKING:
    import torch

    Images = np.ndarray | torch.Tensor

_BACKGROUND = (255, 255, 255)
_INK = (28, 28, 32)
_READABLE = 64  # pixels: the smallest height of an image with an automatic scale
_LABEL_CHARACTERS = 26


def image_grid(images_u8: Images, columns: int, scale: int | None = 1, pad: int = 1) -> Image.Image:
    """Tile images row by row on white.

    `scale` enlarges each pixel to a scale x scale block (nearest neighbour, without smoothing); None picks the
    smallest integer scale that makes images at least 64 pixels high. `pad` is the gap in pixels, also around the
    grid. Raises UserError for anything but uint8 [N, 3, H, W] with N >= 1.
    """
    images = _as_array(images_u8)
    if columns < 1:
        raise UserError(f"A grid needs at least one column, not {columns}.")
    images = _enlarge(images, _auto_scale(images, scale))
    count, height, width = images.shape[0], images.shape[2], images.shape[3]
    rows, columns = math.ceil(count / columns), min(columns, count)
    shape = (rows * (height + pad) + pad, columns * (width + pad) + pad, 3)
    canvas = np.full(shape, _BACKGROUND, dtype=np.uint8)
    for index in range(count):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        canvas[top : top + height, left : left + width] = images[index].transpose(1, 2, 0)
    return Image.fromarray(canvas)


def save_grid(images_u8: Images, path: Path, columns: int | None = None, scale: int | None = 1, pad: int = 1) -> Path:
    """Write `image_grid` as a PNG; `columns` defaults to a nearly square grid. Parent folders are created."""
    columns = columns or max(1, math.ceil(math.sqrt(len(images_u8))))
    return _save(image_grid(images_u8, columns, scale, pad), path)


def comparison_grid(rows: list[tuple[str, Images]], path: Path, scale: int | None = None, pad: int = 2) -> Path:
    """Write a PNG with one row of images per setting and its label at the left.

    All rows must have the same seeds in the same order, so that a column is one seed under all settings. Long labels
    wrap, and line breaks in labels stay. Rows may have different lengths. `scale` is as in `image_grid`.
    """
    if not rows:
        raise UserError("A comparison grid needs at least one row of images.")
    arrays = [_as_array(images) for _, images in rows]
    if len({array.shape[2:] for array in arrays}) > 1:
        raise UserError("The rows of a comparison grid must hold images of one size.")
    factor = _auto_scale(arrays[0], scale)
    strips = [image_grid(array, len(array), factor, pad) for array in arrays]

    size = max(12, min(18, strips[0].height // 6))
    font = ImageFont.load_default(size)
    labels = [
        "\n".join("\n".join(textwrap.wrap(line, _LABEL_CHARACTERS)) for line in label.split("\n")) for label, _ in rows
    ]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), label or " ", font=font, spacing=3) for label in labels]
    margin = size // 2
    label_width = math.ceil(max(box[2] for box in boxes)) + 2 * margin
    heights = [max(strip.height, math.ceil(box[3]) + margin) for strip, box in zip(strips, boxes, strict=True)]

    sheet = Image.new("RGB", (label_width + max(strip.width for strip in strips), sum(heights)), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    top = 0
    for label, strip, box, height in zip(labels, strips, boxes, heights, strict=True):
        sheet.paste(strip, (label_width, top + (height - strip.height) // 2))
        pen.multiline_text((margin, top + (height - box[1] - box[3]) / 2), label, fill=_INK, font=font, spacing=3)
        top += height
    return _save(sheet, path)


def _as_array(images: Images) -> np.ndarray:
    # A tensor on a GPU must be copied to the host first.
    array = images if isinstance(images, np.ndarray) else images.detach().cpu().numpy()
    if array.ndim != 4 or array.shape[1] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise UserError(f"A grid takes uint8 images [N, 3, H, W], not {array.dtype} {list(array.shape)}.")
    return array


def _auto_scale(images: np.ndarray, scale: int | None) -> int:
    if scale is None:
        return max(1, math.ceil(_READABLE / images.shape[2]))
    if scale < 1:
        raise UserError(f"The scale of a grid is a whole number of at least 1, not {scale}.")
    return scale


def _enlarge(images: np.ndarray, scale: int) -> np.ndarray:
    return images if scale == 1 else images.repeat(scale, axis=2).repeat(scale, axis=3)


def _save(image: Image.Image, path: Path) -> Path:
    path = Path(path)
    atomic_write(path, lambda p: image.save(p, format="PNG", optimize=True))
    return path
