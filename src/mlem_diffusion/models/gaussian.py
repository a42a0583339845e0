"""A linear Gaussian denoiser from the data's covariance: a nearly free first level.
For data N(mu, C), E[x0 | x] at x = alpha x0 + sigma eps is mu + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha mu), the
best linear denoiser of any data with that mean and covariance. C = U diag(l) U^T + rho (1 - U U^T) has r principal
directions and one variance for all others (probabilistic PCA, Tipping and Bishop 1999): two thin matrix products."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..diffusion.level import Level
from ..diffusion.process import expand
from ..errors import UserError
from ..files import Damaged, atomic_write, sha256_of, unreadable

CHUNK = 1024  # images at a time
DENSE_LIMIT = 1024  # up to this many dimensions the covariance of all images is diagonalised exactly
SUBSET_VALUES = 100_000_000  # above DENSE_LIMIT: float32 values in the images that are decomposed (400 MB)
HELD_OUT, JUDGED, TOLERANCE = 10, 4096, 1.005  # for the choice of the rank: every tenth image, at most so many; factor


class GaussianDenoiser(nn.Module):
    """Posterior mean under N(mean, U diag(variances) U^T + residual (1 - U U^T)); differentiable, in float32.
    mean: [C,H,W] in [-1, 1]; basis: U [D, r], orthonormal columns, D = C H W; variances: [r], per direction;
    residual: variance of each of the D - r other directions."""

    mean: Tensor
    basis: Tensor
    variances: Tensor
    residual: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, variances: Tensor, residual: Tensor):
        super().__init__()
        # not persistent: a network that is preconditioned by it does not store it again
        values = {"mean": mean, "basis": basis.contiguous(), "variances": variances, "residual": residual}
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        """Denoised image [B,C,H,W] for noised x [B,C,H,W] and logsnr [B] or 0-dim."""
        u = logsnr.expand(len(x)).to(self.mean.dtype)[:, None]
        alpha, alpha2, sigma2 = torch.sigmoid(u).sqrt(), torch.sigmoid(u), torch.sigmoid(-u)
        # the gain alpha C / (alpha^2 C + sigma^2) along the basis [B, r], and along all other directions [B, 1]
        along = alpha * self.variances / (alpha2 * self.variances + sigma2)
        rest = alpha * self.residual / (alpha2 * self.residual + sigma2)
        centred = (x.to(self.mean.dtype) - expand(alpha, x) * self.mean).flatten(1)
        projected = (centred @ self.basis) * (along - rest)
        return (rest * centred + projected @ self.basis.T).reshape(x.shape) + self.mean

    def mean_variance(self, logsnr: Tensor) -> Tensor:
        """c^2 [B] or []: the posterior variance, mean over the dimensions, for logsnr [B] or 0-dim.
        It is the mean squared error of this denoiser on any data with this mean and covariance: sum_i l_i sigma^2 /
        (alpha^2 l_i + sigma^2) / D, with l_i = residual for the D - r other directions."""
        d, r = self.basis.shape
        u = logsnr.to(self.mean.dtype)[..., None]
        alpha2, sigma2 = torch.sigmoid(u), torch.sigmoid(-u)
        along = self.variances * sigma2 / (alpha2 * self.variances + sigma2)
        rest = self.residual * sigma2 / (alpha2 * self.residual + sigma2)
        return (along.sum(-1) + (d - r) * rest[..., 0]) / d

    def as_level(self, name: str = "gauss") -> Level:
        """A level; its FLOPs are those into the basis and out of it, and of vector arithmetic."""
        d, r = self.basis.shape
        return Level(name, self, float(4 * r * d + 7 * d + r))

    def save(self, path: Path) -> None:
        atomic_write(path, lambda p: p.write_bytes(save({k: v.cpu().contiguous() for k, v in self.named_buffers()})))


def load_gaussian(path: Path, device: torch.device | str = "cpu", sha256: str | None = None) -> GaussianDenoiser:
    """Load a denoiser that `save` wrote; Damaged if it cannot be read, or is not the file with this hash."""
    if sha256 is not None and (not path.is_file() or sha256_of(path) != sha256):
        text = "is missing or not the Gaussian denoiser of these levels: restore it, or train them again"
        raise Damaged(path, f"{path} {text} (make train-levels ARGS=overwrite=true).")
    try:  # copied, because rounding depends on where a tensor begins in memory
        return GaussianDenoiser(**{name: value.clone() for name, value in load(path.read_bytes()).items()}).to(device)
    except Exception as error:  # damaged files raise nearly anything
        raise unreadable(error, path, "is not a saved Gaussian denoiser: fit it again") from error


def default_rank(d: int) -> int:
    """The largest rank that `fit_gaussian` chooses for D = d values of an image."""
    return max(1, min(256, d // 8))


def fit_gaussian(images: np.ndarray, rank: int | None = None) -> GaussianDenoiser:
    """Fit a Gaussian denoiser to images [N,C,H,W], uint8 or float in [-1, 1], and their mirror images, as in training.
    rank: number of principal directions. None: by held-out loss, for which every tenth image is left out: the fewest
    directions whose loss, mean over log-SNRs from -10 to 10, is within 0.5% of the best; at most `default_rank`.
    Up to 1024 dimensions the decomposition is exact. Above, it is randomised (Halko et al. 2011) and uses at most
    400 MB of images, which for a moment take twice that memory. Raises UserError for a rank outside 1..D."""
    shape, d = images.shape[1:], math.prod(images.shape[1:])
    if rank is not None and not 1 <= rank <= d:
        raise UserError(f"rank = {rank} is outside 1..{d}, the number of values of an image.")
    judged = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    chosen = np.arange(len(images)) if rank or not judged.any() else np.flatnonzero(~judged)
    most = rank or default_rank(d)
    mean, basis, variances, total = (_dense if d <= DENSE_LIMIT else _truncated)(images, chosen, most)
    if rank is None and judged.any():
        rows = torch.cat(list(_chunks(images, np.flatnonzero(judged)[:JUDGED]))) - mean.float()
        along, of_all = (rows @ basis.float()).double().square().mean(0), rows.double().square().sum(1).mean()
        losses = _losses(variances.double(), float(total), along, float(of_all), d)
        rank = int((losses > TOLERANCE * losses.min()).int().argmin()) + 1
        basis, variances = basis[:, :rank], variances[:rank]
    others = d - len(variances)
    residual = torch.tensor(max(0.0, float(total - variances.sum())) / others if others else 0.0)
    return GaussianDenoiser(mean.float().reshape(*shape), basis.float(), variances.float(), residual)


def _losses(variances: Tensor, total: float, along: Tensor, of_all: float, d: int) -> Tensor:
    """The mean squared denoising error [r] of each rank 1..r on images with mean squares `along` [r] in the basis's
    directions and `of_all` in all. A direction of gain g has the error (1 - alpha g)^2 of it, plus g^2 sigma^2."""
    u = torch.linspace(-10, 10, 41, dtype=torch.float64)[:, None]
    alpha2, sigma2 = torch.sigmoid(u), torch.sigmoid(-u)
    ranks = torch.arange(1, len(variances) + 1, dtype=torch.float64)

    def errors(variance: Tensor, square: Tensor, count: Any) -> Tensor:
        shrink = sigma2 / (alpha2 * variance + sigma2)  # 1 - alpha g
        return shrink**2 * square + count * alpha2 * variance**2 * sigma2 / (alpha2 * variance + sigma2) ** 2

    others = (d - ranks).clamp(min=1)
    rest = errors((total - variances.cumsum(0)).clamp(min=0) / others, of_all - along.cumsum(0), d - ranks)
    return (errors(variances, along, 1).cumsum(1) + rest).mean(0) / d


def _chunks(images: np.ndarray, chosen: np.ndarray) -> Iterator[Tensor]:
    """Yield the chosen images in chunks of float rows [n, D] in [-1, 1], followed by their mirror images."""
    for start in range(0, len(chosen), CHUNK):
        part = torch.as_tensor(images[chosen[start : start + CHUNK]])
        part = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float()
        yield torch.cat([part, part.flip(-1)]).flatten(1)


def _dense(images: np.ndarray, chosen: np.ndarray, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean [D], basis [D, r], variances [r] and total variance of the chosen images, exact, in float64."""
    d = math.prod(images.shape[1:])
    first, second = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for rows in _chunks(images, chosen):
        rows = rows.double()
        first += rows.sum(0)
        second.addmm_(rows.T, rows)
    mean = first / (2 * len(chosen))
    covariance = second / (2 * len(chosen)) - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, vectors[:, -rank:].flip(1), values[-rank:].flip(0).clamp(min=0), covariance.trace()


def _truncated(images: np.ndarray, chosen: np.ndarray, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `_dense`, by a randomised decomposition of a subset of the images."""
    limit = max(2, SUBSET_VALUES // (2 * math.prod(images.shape[1:])))
    chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:limit])
    rows = torch.cat(list(_chunks(images, chosen)))
    rank, mean = min(rank, len(rows) - 1), rows.mean(0)
    rows -= mean  # in place: the rows are large
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, basis = torch.svd_lowrank(rows, q=min(rank + 16, *rows.shape), niter=4)
    # in parts: the squares of all rows would double the memory
    total = sum((row.square().sum() for row in rows.split(256)), rows.new_zeros(())) / len(rows)
    return mean, basis[:, :rank], values[:rank].square() / len(rows), total
