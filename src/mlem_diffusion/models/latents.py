"""Latents: what the levels denoise if it is not images, and how they become images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.level import weight_type
from ..errors import UserError, is_out_of_memory


@dataclass(frozen=True)
class Latents:
    """Latents z = (raw - shift) * scale of an autoencoder's raw ones [B,C,h,w].
    decoder: raw latents -> images [B,3,H,W] on the scale [-1, 1]. scale, shift: one number, or one for each channel.
    batch: images that are decoded at a time; half as many at a time if they do not fit in memory."""

    decoder: Callable[[Tensor], Any]
    scale: float | Sequence[float] = 1.0
    shift: float | Sequence[float] = 0.0
    batch: int = 8

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"Latents: batch={self.batch} is not an image or more at a time.")

    @property
    def scaling(self) -> str:
        """Scale and shift in words, by which latents are compared."""
        scale, shift = (np.ravel(values).astype(float).tolist() for values in (self.scale, self.shift))
        return f"scale {scale}, shift {shift}"

    def _columns(self, like: Tensor) -> list[Tensor]:
        """Scale and shift [1 or C, 1, 1]."""
        found = [
            torch.tensor(v, dtype=like.dtype, device=like.device).reshape(-1, 1, 1) for v in (self.scale, self.shift)
        ]
        for values in found:
            if len(values) not in (1, like.shape[1]):
                raise UserError(f"Latents of {like.shape[1]} channels cannot be scaled by {len(values)} numbers.")
        return found

    def encode(self, raw: Tensor) -> Tensor:
        """The latents of an autoencoder's raw ones."""
        scale, shift = self._columns(raw)
        return (raw - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B,3,H,W] of latents, float32 on the same device."""
        scale, shift = self._columns(latents)
        raw, done, batch = latents / scale + shift, [], self.batch
        raw, first = raw.to(weight_type(getattr(self.decoder, "__self__", self.decoder)) or raw.dtype), 0
        while first < len(raw):
            part = raw[first : first + batch]
            try:
                found = self.decoder(part)
            except RuntimeError as error:
                if not is_out_of_memory(error) or batch == 1:
                    raise
                batch = max(1, batch // 2)
                continue
            found = found[0] if isinstance(found, tuple) else getattr(found, "sample", found)
            if len(found) != len(part):
                raise UserError(f"The decoder returned {len(found)} images for {len(part)} latents.")
            done.append(found.float())
            first += len(part)
        return torch.cat(done)

    __call__ = decode


def latents_of(vae: Any, batch: int = 8) -> Latents:
    """The latents of a diffusers autoencoder, such as AutoencoderKL or AutoencoderDC: its decoder, scale and shift."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return Latents(vae.decode, (config.scaling_factor / std).tolist(), mean.tolist(), batch)
    return Latents(vae.decode, config.scaling_factor, getattr(config, "shift_factor", None) or 0.0, batch)
