"""Frechet distance between sets of images, computed with torch-fidelity.

The Frechet distance between Gaussians fitted to features is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
(Dowson & Landau 1982; Heusel et al. 2017). Its value depends on n: report n and `distance_floor` with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..files import expect_content, read_arrays, write_arrays
from .features import Extractor

_DOUBLE = 512  # the largest number of features for which moments are stored in float64


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean [D] and unbiased covariance [D, D] of the features of n images, float64."""

    mean: np.ndarray
    cov: np.ndarray
    n: int

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, [D, D]."""
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _as_float64(features: Any) -> np.ndarray:
    """An array or CPU tensor [N, D] with N >= 2 finite rows; UserError for anything else."""
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise UserError(f"A Frechet distance needs features [N, D] of at least 2 images, but got {array.shape}.")
    if not np.isfinite(array).all():
        raise UserError("The features contain NaN or infinite values, so their distance is undefined.")
    return array


def feature_moments(features: Any) -> FeatureMoments:
    """Mean and covariance of features [N, D], by torch-fidelity in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics  # slow import

    array = _as_float64(features)
    out = fid_features_to_statistics(torch.from_numpy(array))
    return FeatureMoments(out["mu"], np.atleast_2d(out["sigma"]), len(array))


def frechet_distance(x: Any, y: Any) -> float:
    """Frechet distance of two sets of features [N, D] (or their FeatureMoments), by torch-fidelity in float64.

    Raises UserError for fewer than 2 images on a side, NaN features, or different feature sizes.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # slow import

    a, b = (s if isinstance(s, FeatureMoments) else feature_moments(s) for s in (x, y))
    _check_sizes(len(a.mean), len(b.mean))
    stats = [{"mu": s.mean.astype(np.float64), "sigma": s.cov.astype(np.float64)} for s in (a, b)]
    return float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID])


def _check_sizes(one: int, other: int) -> None:
    if one != other:
        raise UserError(f"Features of {one} and of {other} numbers cannot be compared.")


def fast_frechet(
    x: np.ndarray, reference: FeatureMoments, counts: np.ndarray | None = None, projected: np.ndarray | None = None
) -> float:
    """Frechet distance, faster for many bootstrap replicates: features [n, D], row i counted counts[i] times.

    With S2 the reference covariance, tr (S1 S2)^(1/2) is the sum of the singular values of the centred
    features times S2^(1/2), divided by sqrt(n - 1). This is an n x n or D x D symmetric eigenvalue problem,
    whichever is smaller. Pass `projected` = x @ reference.root [n, D] to share that product between replicates.
    """
    x = _as_float64(x)
    _check_sizes(x.shape[1], len(reference.mean))
    y = x @ reference.root if projected is None else projected
    weights = np.ones(len(x)) if counts is None else np.asarray(counts, dtype=np.float64)
    drawn = weights > 0
    x, y, weights = x[drawn], y[drawn], weights[drawn]
    n = weights.sum()
    mean = weights @ x / n
    square = np.sqrt(weights / (n - 1))[:, None]
    trace = float(((x - mean) ** 2 * square**2).sum())
    y = (y - weights @ y / n) * square
    gram = y.T @ y if len(y) > y.shape[1] else y @ y.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum()
    shift = mean - reference.mean
    return float(shift @ shift + trace + np.trace(reference.cov) - 2 * singular)


def distance_floor(features_of_real: Any, n: int, seed: int, repeats: int = 3) -> float:
    """Real against real: the mean distance of n random real images to the moments of all *other* real ones.

    `features_of_real` is [N, D] with N >= n + 2; the mean is over `repeats` draws. No sampler is expected to
    go below it with n images. Raises UserError for too few images or NaN features.
    """
    features = _as_float64(features_of_real)
    if len(features) < n + 2:
        raise UserError(
            f"The floor at n = {n} needs at least {n + 2} real images, but there are {len(features)}: "
            "lower compare.num_samples."
        )
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(features)) for _ in range(repeats)]
    return float(np.mean([frechet_distance(features[order[:n]], features[order[n:]]) for order in orders]))


# ------------------------------------------------------------------------------------------------ real images


class RealImages(NamedTuple):
    """What samples are compared with: the name of the distance, moments of real images, and `distance_floor`."""

    name: str
    moments: FeatureMoments
    floor: float | None

    @classmethod
    def of(cls, name: str, features: np.ndarray, n: int, seed: int) -> RealImages:
        """From features [N, D] of all real images, for comparisons of n samples."""
        return cls(name, feature_moments(features), distance_floor(features, n, seed))


def write_features(
    path: Path, extractor: Extractor, images: np.ndarray, rows: np.ndarray, progress: Callable[[int, int], object]
) -> None:
    """Write the features of rows of packed images, uint8 [N, 3, H, W]; Inception needs hours for them on a CPU."""
    parts, chunk = [], 1024
    for start in range(0, len(rows), chunk):
        parts.append(extractor.features(images[rows[start : start + chunk]]).numpy())
        progress(min(start + chunk, len(rows)), len(rows))
    write_arrays(path, {"features": np.concatenate(parts)}, compress=False)


def read_features(path: Path) -> np.ndarray:
    """The features [len(rows), D], float32, that `write_features` wrote."""
    arrays = read_arrays(path, "run the same command again")
    with expect_content(path, "run the same command again"):
        return arrays["features"]


def save_moments(path: Path, moments: FeatureMoments) -> None:
    """Write mean [D], upper triangle of the covariance and number of images as npz; float32 for many features."""
    kind = np.float64 if len(moments.mean) <= _DOUBLE else np.float32
    upper = moments.cov[np.triu_indices(len(moments.mean))]
    write_arrays(path, {"mean": moments.mean.astype(kind), "upper": upper.astype(kind), "n": moments.n})


def load_moments(path: Path) -> FeatureMoments:
    """The moments that `save_moments` wrote, in float64."""
    arrays = read_arrays(path, "restore it (git checkout), or publish the family again (make publish)")
    mean, upper, n = arrays["mean"].astype(np.float64), arrays["upper"].astype(np.float64), int(arrays["n"])
    cov = np.zeros((len(mean), len(mean)))
    cov[np.triu_indices(len(mean))] = upper
    return FeatureMoments(mean, cov + np.triu(cov, 1).T, n)


def published_images(
    index: Mapping[str, Any] | None, folder: Path, extractor: Extractor, n: int, seed: int
) -> RealImages | None:
    """The published moments of the training images' features; None if no moments by this extractor are published.

    index: content of the family.json in `folder`. The floor is None unless it was published for n images and this seed.
    """
    found = (index or {}).get("statistics")
    if found is None or (found["name"], found["identity"]) != (extractor.name, extractor.identity or extractor.key):
        return None
    same = (found["floor"]["num_samples"], found["floor"]["seed"]) == (n, seed)
    return RealImages(
        extractor.name, load_moments(folder / found["file"]), found["floor"]["distance"] if same else None
    )
