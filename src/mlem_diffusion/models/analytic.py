"""A family with a known answer: the exact posterior mean of a Gaussian mixture plus smooth level errors.
Costs are declared, not counted: the method's claim concerns error against any given cost."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.level import Level
from ..diffusion.process import expand
from ..errors import UserError


class GaussianMixture:
    """Data distribution: 8 equally weighted normals with means [8, D] and one isotropic standard deviation.
    They overlap, 3 standard deviations apart: else a small error would flip a sample's component, without any rate."""

    def __init__(self, dim: int):
        means = 0.15 * torch.randn(8, dim, generator=torch.Generator().manual_seed(0))
        self.means, self.std = means - means.mean(0), 0.25

    def denoise(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """The exact posterior mean E[x0 | x] for x [B, C, H, W] = alpha x0 + sigma eps; logsnr [B] or 0-dim."""
        means = self.means.to(x)
        logsnr = logsnr.expand(len(x))[:, None]
        alpha2, sigma2, flat = torch.sigmoid(logsnr), torch.sigmoid(-logsnr), x.flatten(1)
        alpha, variance = alpha2.sqrt(), alpha2 * self.std**2 + sigma2
        # |x - alpha mu|^2 up to a term that all components share
        products = flat @ means.T * alpha - 0.5 * alpha**2 * (means**2).sum(1)
        mean = torch.softmax(products / variance, dim=1) @ means
        return (mean + alpha * self.std**2 / variance * (flat - alpha * mean)).reshape(x.shape)


def smooth_field(dim: int, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A random smooth field g(x [B, D], logsnr [B]) -> [B, D] of mean square about 1 (random Fourier features). It
    turns by 1.4 radians per unit of root mean square of x, and by 0.15 per unit of log-SNR."""
    generator, features = torch.Generator().manual_seed(seed), 64
    w = torch.randn(features, dim, generator=generator) * (1.4 / math.sqrt(dim))
    v = torch.randn(features, generator=generator) * 0.15
    phase = torch.rand(features, generator=generator) * (2 * math.pi)
    out = torch.randn(features, dim, generator=generator) * math.sqrt(2 / features)

    def field(x: Tensor, logsnr: Tensor) -> Tensor:
        return torch.sin(x @ w.T.to(x) + logsnr[:, None] * v.to(x) + phase.to(x)) @ out.to(x)

    return field


def analytic_family(levels: int = 7, gamma: float = 2.5, amplitude: float = 0.5) -> list[Level]:
    """Levels f^k = exact posterior mean + amplitude 2^-k c_out(t) g_k(x, t), k = 1..levels, of x [B, 1, 4, 4].
    Level k costs 2^(gamma k) MFLOP. The g_k are independent smooth fields of mean square 1; c_out is the residual
    standard deviation of a linear denoiser (EDM's preconditioning). So amplitude 2^-k is the error of the network's
    normalised output. The amplitude 0.5 is moderate: UNets of widths 8 and 16 differ by about 0.1 in that measure."""
    if levels < 1:
        raise UserError(f"The analytic family needs at least one level, not {levels}.")
    mixture = GaussianMixture(16)
    rms2 = float((mixture.means**2).mean()) + mixture.std**2  # mean square of the data, per dimension

    def level(k: int) -> Level:
        size, field = amplitude * 2.0**-k, smooth_field(16, k)

        def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
            logsnr = logsnr.expand(len(x))
            alpha2, sigma2 = torch.sigmoid(logsnr), torch.sigmoid(-logsnr)
            c_out = (sigma2 * rms2 / (alpha2 * rms2 + sigma2)).sqrt()
            return mixture.denoise(x, logsnr) + size * expand(c_out, x) * field(x.flatten(1), logsnr).reshape(x.shape)

        return Level(f"f{k}", denoise, 1e6 * 2 ** (gamma * k))

    return [level(k) for k in range(1, levels + 1)]
