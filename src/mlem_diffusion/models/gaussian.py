"""A linear Gaussian denoiser from the data's covariance: a nearly free first level.

For data N(mu, C), E[x0 | x] at x = alpha x0 + sigma eps is mu + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha mu), the
best linear denoiser of any data with that mean and covariance. C = U diag(l) U^T + rho (1 - U U^T) has r principal
directions and one variance for all others (probabilistic PCA, Tipping and Bishop 1999): two thin matrix products."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from ..diffusion.level import Level
from ..diffusion.process import expand
from ..errors import UserError
from .family import explained, save_weights

CHUNK = 1024  # images at a time
DENSE_LIMIT = 1024  # up to this many dimensions the covariance of all images is diagonalised exactly
SUBSET_VALUES = 100_000_000  # above DENSE_LIMIT: float32 values in the images that are decomposed (400 MB)
# share of the variance at the default rank; for the 16x16 portraits this is rank 58, and rank 192 is hardly better
SHARE = 0.95


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
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis.contiguous())
        self.register_buffer("variances", variances)
        self.register_buffer("residual", residual)

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

    def as_level(self, name: str = "gauss") -> Level:
        """A level; its FLOPs are those into the basis and out of it, and of vector arithmetic."""
        d, r = self.basis.shape
        return Level(name, self, float(4 * r * d + 7 * d + r))

    def save(self, path: Path) -> None:
        save_weights(path, self)


def load_gaussian(path: Path, device: torch.device | str = "cpu") -> GaussianDenoiser:
    """Load a denoiser that `save` wrote; Damaged if it cannot be read."""
    try:  # copied, because rounding depends on where a tensor begins in memory
        return GaussianDenoiser(**{name: value.clone() for name, value in load(path.read_bytes()).items()}).to(device)
    except Exception as error:  # damaged files raise nearly anything
        raise explained(error, path, "is not a saved Gaussian denoiser: fit it again") from error


def fit_gaussian(images: np.ndarray, rank: int | None = None) -> GaussianDenoiser:
    """Fit a Gaussian denoiser to images [N,C,H,W], uint8 or float in [-1, 1], and their mirror images, as in training.

    rank: number of principal directions; None: the fewest that explain 95% of the variance, at most 256 and D / 8.
    Up to 1024 dimensions the decomposition is exact. Above, it is randomised (Halko et al. 2011) and uses at most
    400 MB of images, which for a moment take twice that memory. Raises UserError for a rank outside 1..D."""
    shape, d = images.shape[1:], math.prod(images.shape[1:])
    if rank is not None and not 1 <= rank <= d:
        raise UserError(f"rank = {rank} is outside 1..{d}, the number of values of an image.")
    most = rank or max(1, min(256, d // 8))
    mean, basis, variances, total = (_dense if d <= DENSE_LIMIT else _truncated)(images, most)
    if rank is None:
        needed = int((variances.cumsum(0) < SHARE * total).sum()) + 1
        basis, variances = basis[:, :needed], variances[:needed]
    others = d - len(variances)
    residual = torch.tensor(max(0.0, float(total - variances.sum())) / others if others else 0.0)
    return GaussianDenoiser(mean.float().reshape(*shape), basis.float(), variances.float(), residual)


def _chunks(images: np.ndarray, chosen: np.ndarray) -> Iterator[Tensor]:
    """Yield the chosen images in chunks of float rows [n, D] in [-1, 1], followed by their mirror images."""
    for start in range(0, len(chosen), CHUNK):
        part = torch.as_tensor(images[chosen[start : start + CHUNK]])
        part = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float()
        yield torch.cat([part, part.flip(-1)]).flatten(1)


def _dense(images: np.ndarray, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean [D], basis [D, r], variances [r] and total variance, exact, in float64."""
    d = math.prod(images.shape[1:])
    first, second = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for rows in _chunks(images, np.arange(len(images))):
        rows = rows.double()
        first += rows.sum(0)
        second.addmm_(rows.T, rows)
    mean = first / (2 * len(images))
    covariance = second / (2 * len(images)) - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, vectors[:, -rank:].flip(1), values[-rank:].flip(0).clamp(min=0), covariance.trace()


def _truncated(images: np.ndarray, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `_dense`, by a randomised decomposition of a subset of the images."""
    limit = max(2, SUBSET_VALUES // (2 * math.prod(images.shape[1:])))
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:limit])
    rows = torch.cat(list(_chunks(images, chosen)))
    rank, mean = min(rank, len(rows) - 1), rows.mean(0)
    rows -= mean  # in place: the rows are large
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, basis = torch.svd_lowrank(rows, q=min(rank + 16, *rows.shape), niter=4)
    # in parts: the squares of all rows would double the memory
    total = sum((row.square().sum() for row in rows.split(256)), rows.new_zeros(())) / len(rows)
    return mean, basis[:, :rank], values[:rank].square() / len(rows), total
