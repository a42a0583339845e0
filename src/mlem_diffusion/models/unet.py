"""A UNet of variable width in the style of ADM (Dhariwal and Nichol 2021), and the denoiser that uses it."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.process import expand
from ..errors import UserError
from .gaussian import GaussianDenoiser


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm with as many groups as divide the channels, up to 32, with at least 4 channels each; otherwise 1."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels, eps=1e-5)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """norm, SiLU, (resample), conv, norm scaled and shifted by the embedding, SiLU, conv, plus the skip path."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resample: str, dropout: float):
        super().__init__()
        self.resample = resample
        self.resampled = {"none": nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = _norm(outputs), _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """condition: output of `affine` for the embedding, [B, 2 * outputs], or [1, ...] for a shared noise level."""
        h = self.conv1(self.resampled(F.silu(self.norm1(x))))
        scale, shift = condition[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))
        return self.skip(self.resampled(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all positions, in heads of about 64 channels (one head if that does not divide evenly)."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 64) if channels % max(1, channels // 64) == 0 else 1
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # in channels_last all of these are views: the attention kernel reads the convolution's output in place
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)
        return x + self.out(y)


class _Stage(nn.Module):
    """A residual block and, at attention resolutions, attention after it."""

    def __init__(
        self, inputs: int, outputs: int, attend: bool = False, resample: str = "none", *, embedding: int, dropout: float
    ):
        super().__init__()
        self.block = ResBlock(inputs, outputs, embedding, resample, dropout)
        self.attention = Attention(outputs) if attend else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.block(x, condition)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """A UNet: x [B,inputs,S,S] and logsnr [B], or 0-dim if all samples share one noise level -> [B,3,S,S].
    width: base channels, multiplied by `multipliers` per resolution. blocks: residual blocks per resolution.
    attention: resolutions with attention, in pixels. patch: squares of this side become channels before the first
    convolution, so the network works at size / patch. Raises UserError if the size cannot be halved often enough."""

    def __init__(
        self, width: int, size: int, multipliers: Sequence[int] = (1, 2, 2, 2), blocks: int = 2,
        attention: Sequence[int] = (16,), dropout: float = 0.0, patch: int = 1, inputs: int = 3,
    ):  # fmt: skip
        super().__init__()
        if patch < 1 or size % patch or (size // patch) % 2 ** (len(multipliers) - 1):
            text = f"An image size of {size} cannot be halved {len(multipliers) - 1} times in patches of {patch}"
            raise UserError(f"{text} (unet.multipliers, unet.patch).")
        self.patch, self.inputs, embedding = patch, inputs, 4 * max(width, 8)
        size, channels = size // patch, 3 * patch**2
        self.frequencies: Tensor
        # log-SNR spans about -10 to 10: periods from 1 to 120 resolve it and stay monotone over the range
        self.register_buffer("frequencies", 2 * math.pi / torch.logspace(0, math.log10(120), 16), persistent=False)
        self.embed = nn.Sequential(nn.Linear(32, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        stage = partial(_Stage, embedding=embedding, dropout=dropout)
        # the order in which layers are made fixes their initial weights; size is the current resolution from here on
        current = width * multipliers[0]
        self.enter = nn.Conv2d(inputs * patch**2, current, 3, padding=1)
        skips, down, up = [current], [], []
        for i, multiplier in enumerate(multipliers):
            if i:
                down.append(stage(current, current, resample="down"))
                size //= 2
                skips.append(current)
            for _ in range(blocks):
                down.append(stage(current, width * multiplier, size in attention))
                current = width * multiplier
                skips.append(current)
        attends = size <= max(attention, default=0)
        self.middle = nn.ModuleList([stage(current, current, attends), stage(current, current)])
        for i, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                up.append(stage(current + skips.pop(), width * multiplier, size in attention))
                current = width * multiplier
            if i:
                up.append(stage(current, current, resample="up"))
                size *= 2
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.leave = nn.Sequential(_norm(current), nn.SiLU(), _zero(nn.Conv2d(current, channels, 3, padding=1)))
        self.joined_weight: Tensor | None
        self.register_buffer("joined_weight", None, persistent=False)
        self.register_buffer("joined_bias", None, persistent=False)

    def join_conditioning(self) -> None:
        """For inference: join all blocks' conditioning layers into one matrix product (a copy of the weights)."""
        layers = self._affine_layers()
        self.joined_weight = torch.cat([v.weight for v in layers]).detach()
        self.joined_bias = torch.cat([v.bias for v in layers]).detach()

    def _affine_layers(self) -> list[nn.Linear]:
        stages: list[Any] = [*self.down, *self.middle, *self.up]
        return [stage.block.affine for stage in stages]

    def _conditions(self, logsnr: Tensor) -> Iterator[Tensor]:
        """Return each residual block's scale and shift [B or 1, 2 outputs], in the order of the forward pass."""
        angles = logsnr.float().reshape(-1, 1) * self.frequencies
        embedding = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.enter.weight.dtype))
        layers = self._affine_layers()
        if self.joined_weight is None:
            return iter([layer(embedding) for layer in layers])
        together = F.linear(embedding, self.joined_weight, self.joined_bias)
        return iter(together.split([layer.out_features for layer in layers], dim=1))

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        condition = self._conditions(logsnr)
        x = x.to(self.enter.weight.dtype)
        x = self.enter(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [x]
        for module in self.down:
            x = module(x, next(condition))
            skips.append(x)
        for module in self.middle:
            x = module(x, next(condition))
        stages: list[Any] = list(self.up)
        for module in stages:
            x = module(x if module.block.resample == "up" else torch.cat([x, skips.pop()], dim=1), next(condition))
        x = self.leave(x)
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class Denoiser(nn.Module):
    """A preconditioned UNet F with one of three prediction targets: denoised = skip + out * F(input, logsnr).

    Scalar (gauss = None): skip is a multiple of x, and with data of root mean square `data_rms` F's input and target
    have unit variance at each log-SNR. target: "v" (the mix of image and noise that is uncorrelated with the input;
    EDM's preconditioning, Karras et al. 2022, table 1; v prediction if data_rms = 1), "epsilon" (the noise), or "x0"
    (the image over data_rms).

    With a linear Gaussian denoiser `gauss` of the data, skip is gauss(x, logsnr), and gauss(x) / data_rms are three
    more input channels: the network need not learn the linear part, and can undo it where it misleads. Then F's target
    is what gauss leaves over: for "v" in units of c, the root of gauss.mean_variance, so that it has unit variance; for
    the other targets in the units of their scalar forms. F is zero at first, so training starts from gauss. Prior art:
    Wang and Vastola (arXiv:2412.09726) show that learned denoisers are nearly Gaussian at high noise."""

    def __init__(
        self, unet: nn.Module, data_rms: float = 0.5, target: str = "v", gauss: GaussianDenoiser | None = None
    ):
        super().__init__()
        if target not in ("v", "epsilon", "x0"):
            raise UserError(f"The prediction target {target!r} is unknown; expected 'v', 'epsilon' or 'x0'.")
        self.unet, self.data_rms, self.target, self.gauss = unet, float(data_rms), target, gauss

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the network's input, the skip part of the denoised image, and the scale of the network's output."""
        u = expand(logsnr.float(), x)
        alpha, sigma, rms = torch.sigmoid(u).sqrt(), torch.sigmoid(-u).sqrt(), self.data_rms
        scale = torch.rsqrt((alpha * rms) ** 2 + sigma**2)
        noise, image = -sigma / alpha, torch.full_like(scale, rms)  # of the targets epsilon and x0
        if self.gauss is not None:
            linear = self.gauss(x, logsnr) if common is None else common
            own = expand(self.gauss.mean_variance(logsnr.float()).sqrt(), x) if self.target == "v" else image
            return torch.cat([scale * x, linear / rms], dim=1), linear, noise if self.target == "epsilon" else own
        if self.target == "v":
            return scale * x, alpha * rms**2 * scale**2 * x, sigma * rms * scale
        return scale * x, *((x / alpha, noise) if self.target == "epsilon" else (torch.zeros_like(x), image))

    def forward(self, x: Tensor, logsnr: Tensor, common: Tensor | None = None) -> Tensor:
        """The denoised image [B,3,S,S], float32; logsnr [B] or 0-dim; common: gauss(x, logsnr), if it is known."""
        given, skip, out = self._parts(x, logsnr, common)
        return skip + out * self.unet(given, logsnr).float()

    def loss(self, x: Tensor, x0: Tensor, logsnr: Tensor) -> Tensor:
        """Return the mean squared error of the network's output per image [B]: the image's over out^2."""
        given, skip, out = self._parts(x, logsnr, None)
        return (self.unet(given, logsnr).float() - (x0 - skip) / out).square().flatten(1).mean(1)
