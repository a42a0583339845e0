"""Convert images between bytes and numbers in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


def to_float(images: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [N,3,H,W] -> float32 in [-1, 1] on the device."""
    return (
        torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images).to(device).float() / 127.5 - 1
    )


def to_uint8(x: Tensor) -> Tensor:
    """Round images in [-1, 1], any shape, to uint8 and clip values outside. Raises UserError on NaN."""
    if bool(torch.isnan(x).any()):
        raise UserError("Images with NaN pixels cannot be turned into 8-bit images.")
    return ((x.float() + 1) * 127.5).round().clip(0, 255).to(torch.uint8)
