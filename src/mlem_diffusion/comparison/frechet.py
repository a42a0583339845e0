"""Frechet distance between sets of images, computed with torch-fidelity.

The Frechet distance between Gaussians fitted to features is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
(Dowson & Landau 1982; Heusel et al. 2017). Its value depends on n: report n and `distance_floor` with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..files import read_arrays, write_arrays
from .features import Extractor

_DOUBLE = 512  # the largest number of features for which moments are stored in float64


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean [D] and unbiased covariance [D, D] of features, float64."""

    mean: np.ndarray
    cov: np.ndarray

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, [D, D]."""
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


class RealImages(NamedTuple):
    """What samples are compared with: the name of the distance, moments of real images, and `distance_floor`."""

    name: str
    moments: FeatureMoments
    floor: float | None


def feature_moments(features: Any) -> FeatureMoments:
    """Mean and covariance of features [N, D], by torch-fidelity in float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics  # slow import

    out = fid_features_to_statistics(torch.from_numpy(np.asarray(features, dtype=np.float64)))
    return FeatureMoments(out["mu"], np.atleast_2d(out["sigma"]))


def frechet_distance(features: Any, reference: FeatureMoments) -> float:
    """Frechet distance of features [N, D] to the reference, by torch-fidelity in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # slow import

    stats = [{"mu": s.mean, "sigma": s.cov} for s in (feature_moments(features), reference)]
    return float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID])


def fast_frechet(x: np.ndarray, reference: FeatureMoments, counts: np.ndarray, projected: np.ndarray) -> float:
    """Frechet distance for bootstrap replicates: features [n, D], float64, row i counted counts[i] times.

    With S2 the reference covariance, tr (S1 S2)^(1/2) is the sum of the singular values of the centred
    features times S2^(1/2), divided by sqrt(n - 1). This is an n x n or D x D symmetric eigenvalue problem,
    whichever is smaller. `projected` = x @ reference.root [n, D] is shared by the replicates.
    """
    drawn = counts > 0
    x, y, weights = x[drawn], projected[drawn], counts[drawn]
    n = weights.sum()
    mean = weights @ x / n
    square = np.sqrt(weights / (n - 1))[:, None]
    trace = float(((x - mean) ** 2 * square**2).sum())
    y = (y - weights @ y / n) * square
    gram = y.T @ y if len(y) > y.shape[1] else y @ y.T
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum()
    shift = mean - reference.mean
    return float(shift @ shift + trace + np.trace(reference.cov) - 2 * singular)


def distance_floor(features: np.ndarray, n: int, seed: int, repeats: int = 3) -> float:
    """Real against real: the mean distance of n random real images to the moments of all *other* real ones.

    features: [N, D]. No sampler is expected to go below it with n images. Raises UserError unless N >= n + 2.
    """
    if len(features) < n + 2:
        raise UserError(f"compare.num_samples={n} needs {n + 2} real images, but there are {len(features)}.")
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(features)) for _ in range(repeats)]
    found = [frechet_distance(features[order[:n]], feature_moments(features[order[n:]])) for order in orders]
    return float(np.mean(found))


# ------------------------------------------------------------------------------------------------ files


def write_features(
    path: Path, extractor: Extractor, images: np.ndarray, rows: np.ndarray, progress: Callable[[int, int], object]
) -> None:
    """Write the features of rows of packed images, uint8 [N, 3, H, W]."""
    parts = []
    for chunk in np.array_split(rows, range(1024, len(rows), 1024)):
        parts.append(extractor.features(images[chunk]).numpy())
        progress(sum(map(len, parts)), len(rows))
    write_arrays(path, {"features": np.concatenate(parts)}, compress=False)


def save_moments(path: Path, moments: FeatureMoments) -> None:
    """Write the mean [D] and the upper triangle of the covariance as npz; float32 for many features."""
    kind = np.float64 if len(moments.mean) <= _DOUBLE else np.float32
    upper = moments.cov[np.triu_indices(len(moments.mean))]
    write_arrays(path, {"mean": moments.mean.astype(kind), "upper": upper.astype(kind)})


def load_moments(path: Path) -> FeatureMoments:
    """The moments that `save_moments` wrote, in float64."""
    arrays = read_arrays(path, "publish the family again (make publish)")
    mean, upper = arrays["mean"].astype(np.float64), arrays["upper"].astype(np.float64)
    cov = np.zeros((len(mean), len(mean)))
    cov[np.triu_indices(len(mean))] = upper
    return FeatureMoments(mean, cov + np.triu(cov, 1).T)


def published_images(
    index: Mapping[str, Any] | None, folder: Path, extractor: Extractor, n: int, seed: int
) -> RealImages | None:
    """The moments by this extractor that a family.json (`index`) names, if any; without a floor for other n or seed."""
    found = (index or {}).get("statistics")
    if found is None or (found["name"], found["identity"]) != (extractor.name, extractor.key):
        return None
    same = (found["floor"]["num_samples"], found["floor"]["seed"]) == (n, seed)
    floor = found["floor"]["distance"] if same else None
    return RealImages(extractor.name, load_moments(folder / found["file"]), floor)
