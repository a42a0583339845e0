"""From the bytes of an image file to pixels of one size, and from 8-bit pixels to numbers in [-1, 1] and back."""

import io
from functools import cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError

# Still pictures that begin with a signature and that Pillow decodes itself. Left out: what starts another program (EPS
# starts Ghostscript) or needs one, video, icons and textures, and formats without a signature, as which Pillow could
# take a damaged file (TGA, PCX).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM", "QOI")
_UPRIGHT = dict(enumerate((0, 3, 1, 5, 4, 6, 2), 2))  # EXIF's orientation -> Image.Transpose


@cache
def suffixes() -> tuple[str, ...]:
    """The endings of the names of files that `decode` reads, lower case; Pillow may be built without some formats."""
    Image.init()
    known = Image.registered_extensions().items()
    return (*(suffix for suffix, kind in known if kind in _FORMATS and kind in Image.OPEN), ".mpo")


def decode(content: bytes, size: int, crop: str) -> tuple[np.ndarray, str]:
    """An image file, of any name -> uint8 [3,size,size] and what was done to it; of several pictures the first counts.
    Damaged files raise almost any exception; a damaged orientation is ignored."""
    treated, done = _treat(_to_rgb(_open(content)), size, crop)
    return np.asarray(treated).transpose(2, 0, 1), done


def _open(content: bytes) -> Image.Image:
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[kind for kind in _FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError:
        raise ValueError(f"its content is no image that can be read: {content[:24]!r}...") from None
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright RGB: apply the EXIF orientation, put transparency on white, scale 16-bit grey to 8 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("its pixels have 32 bits, and their range is unknown: convert it to 8 or 16 bits")
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # malformed metadata raise almost any exception; the pixels are fine
        orientation = None
    if orientation in _UPRIGHT:
        image = image.transpose(Image.Transpose(_UPRIGHT[orientation]))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _treat(image: Image.Image, size: int, crop: str) -> tuple[Image.Image, str]:
    """Crop and resize an RGB image, unless it has the target size; fractional offsets are rounded down."""
    width, height = image.size
    if (width, height) == (size, size):
        return image, f"already {size}x{size}: unchanged"
    side = 0  # of a square to crop
    if width == height:
        done = "square: whole frame"
    elif crop == "none":
        done = "whole frame squashed to a square"
    elif crop == "celeba" and abs(width / height / (178 / 218) - 1) <= 0.006:  # reduced copies have rounded sizes
        done, side = "aspect ratio 178:218: centred square of 148/178 of the width", round(width * 148 / 178)
    else:
        done, side = "largest centred square", min(width, height)
        done = done if crop == "square" else f"other aspect ratio: {done}"
    if side:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size == (size, size):
        return image, f"{done}, not resized"
    verb = "enlarged" if min(image.size) < size else "reduced"
    return image.resize((size, size), Image.Resampling.BICUBIC), f"{done}, {verb} to {size}x{size}"


def to_float(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [N,3,H,W] -> float32 in [-1, 1] on the device."""
    return torch.as_tensor(np.array(images)).to(device).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Round images in [-1, 1], any shape, to uint8 and clip values outside. Raises UserError on NaN."""
    if bool(torch.isnan(x).any()):
        raise UserError("Images with NaN pixels cannot be turned into 8-bit images.")
    return ((x.float() + 1) * 127.5).round().clip(0, 255).to(torch.uint8)
