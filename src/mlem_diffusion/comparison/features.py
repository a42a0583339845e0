"""Feature extractors, and Frechet distances between sets of images by their features.
The Frechet distance between Gaussians fitted to features is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
(Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500). Its value depends on n: report n and `distance_floor` with
it. Only with `inception` is it the distance that the literature calls FID; the others have their own names."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..files import read_arrays, sha256_of, write_arrays

# Hash of the file that torch-fidelity downloads. It is a pickle, so only this exact content is ever loaded.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
Progress = Callable[[int, int], object]
BATCH = 64  # images per call
MIN_IMAGES = 1000  # with fewer, a distance says more about their number than about the sampler
_SUBSETS = 100  # of MIN_IMAGES images each, whose mean is the kernel distance


@dataclass(frozen=True)
class Extractor:
    """A map from images to features."""

    name: str  # of the distance, in tables and figures
    key: str  # of weights and settings, in caches and for published moments
    compute: Callable[[Tensor], Any]  # uint8 [N, 3, H, W] on the CPU to [N, D] on any device

    @torch.no_grad()
    def features(self, images: Tensor | np.ndarray) -> Tensor:
        """Float32 features [N, D] on the CPU of uint8 images [N, 3, H, W]; UserError if they are not finite [N, D]."""
        parts = []
        for chunk in torch.as_tensor(images).split(BATCH):
            out = torch.as_tensor(self.compute(chunk)).to("cpu", torch.float32)
            if out.ndim != 2 or len(out) != len(chunk) or not bool(torch.isfinite(out).all()):
                raise UserError(f"{self.name}: the extractor must return finite features [N, D], not {out.shape}.")
            parts.append(out)
        return torch.cat(parts)


def custom(callable: Callable[[Tensor], Any], name: str) -> Extractor:
    """Extractor from any map of uint8 images [N, 3, H, W] to [N, D] features, with its own name.
    Its key is computed from the features of a few fixed images, so that changed weights never use an old cache.
    UserError for the name FID, which is Inception's."""
    name = name.strip()
    if name.upper() in ("", "FID"):
        raise UserError("A custom extractor needs a name for its distance, and this name must not be FID.")
    images = np.random.RandomState(0).randint(0, 256, (4, 3, 64, 64)).astype(np.uint8)  # see _light_weights
    images[:2, :, :, 1:] = images[:2, :, :, :1]  # two have stripes
    extractor = Extractor(name, "", callable)
    # Five digits, so that the last bits of a convolution seldom matter; a needless cache miss costs only time.
    text = ",".join(f"{value:.5g}" for value in extractor.features(images).flatten().tolist())
    return replace(extractor, key=hashlib.sha256(f"{name}/{text}".encode()).hexdigest()[:16])


_FIRST, _SECOND, _SCALES, _CELLS = 16, 32, 3, 4
_COLOURS = 3 * _CELLS
_FLOOR = 0.02  # in image units [-1, 1]: below about 2.5 grey levels, detail and rounding look alike


def light(dim: int = 64, seed: int = 0, device: str = "cpu") -> Extractor:
    """Extractor of `dim` random-convolution features: no download, the same weights on every machine.
    Two layers of random zero-mean 3x3 filters are rectified at three scales. A fixed random matrix projects the
    logarithm (blur counts like contrast) of the mean response and the mean colour, per quadrant, to `dim` numbers."""
    weights = [torch.from_numpy(array).to(device) for array in _light_weights(dim, seed)]
    return Extractor("FD-random-conv", f"random-conv-1/{dim}/{seed}", lambda images: _light_features(images, *weights))


def _light_weights(dim: int, seed: int) -> list[np.ndarray]:
    """Filters [16,3,3,3] and [32,16,3,3] with zero mean and unit norm, and the projection [raw, dim]; float32."""
    rng = np.random.RandomState(seed)  # numpy never changes the legacy stream, but may change default_rng's
    arrays = []
    for shape in ((_FIRST, 3, 3, 3), (_SECOND, _FIRST, 3, 3)):
        kernel = rng.standard_normal(shape)
        kernel -= kernel.mean(axis=(2, 3), keepdims=True)  # no response to a flat patch
        kernel /= np.sqrt((kernel**2).sum(axis=(1, 2, 3), keepdims=True))
        arrays.append(kernel.astype(np.float32))
    raw = _SCALES * _CELLS * (_FIRST + _SECOND) + _COLOURS
    projection = rng.standard_normal((raw, dim)) / np.sqrt(raw)
    # There are few colour features and many responses: give the two groups comparable total variance.
    projection[-_COLOURS:] *= np.sqrt((raw - _COLOURS) / _COLOURS)
    return [*arrays, projection.astype(np.float32)]


def _light_features(images: Tensor, first: Tensor, second: Tensor, projection: Tensor) -> Tensor:
    x = images.to(first.device).float() / 127.5 - 1
    colour = F.adaptive_avg_pool2d(x, 2).flatten(1)
    columns = []
    for scale in range(_SCALES):
        if scale:
            x = F.avg_pool2d(x, 2)
        a = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), first).abs()
        # Divide by the local response, so that the second layer measures arrangement and not contrast again.
        local = a.mean(1, keepdim=True) + _FLOOR
        b = F.conv2d(F.pad(a / local, (1, 1, 1, 1), mode="replicate"), second).abs()
        columns += [torch.log(F.adaptive_avg_pool2d(response, 2) + _FLOOR).flatten(1) for response in (a, b)]
    return torch.cat([*columns, colour], 1) @ projection


def inception(weights: str | None = None, device: str = "cpu") -> Extractor:
    """torch-fidelity's InceptionV3 (TF-2015 weights), 2048 pooled features: the distance is FID.
    `weights` is a local copy of weights-inception-2015-12-05-6726825d.pth; without it, the file is downloaded to the
    torch hub folder. UserError for a wrong file or a failed download. About 3 images per second on two CPU cores."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL).name))
    if not weights and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # to a temporary file, which is renamed if its hash is right
            torch.hub.download_url_to_file(URL, str(path), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            text = "give its path as metrics.weights, or leave distances out with metrics=none"
            raise UserError(f"{URL} could not be downloaded ({error}): {text}.") from error
    if not path.is_file() or sha256_of(path) != INCEPTION_SHA256:
        raise UserError(f"The Inception weights {path} do not exist, or their SHA-256 is not {INCEPTION_SHA256}.")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    network = network.to(device).eval()
    return Extractor("FID", f"inception-{INCEPTION_SHA256}", lambda images: network(images.to(device))[0])


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


def feature_moments(features: Any) -> FeatureMoments:
    """Mean and covariance of features [N, D]."""
    x = np.asarray(features, dtype=np.float64)
    return FeatureMoments(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(features: Any, reference: FeatureMoments) -> float:
    """Frechet distance of features [N, D] to the reference, by torch-fidelity in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # slow import

    stats = [{"mu": s.mean, "sigma": s.cov} for s in (feature_moments(features), reference)]
    return float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID])


def kernel_distance(features: Any, real: Any) -> float:
    """The mean unbiased squared MMD with a cubic kernel over subsets, by torch-fidelity (Binkowski et al. 2018); of
    Inception's features it is KID. features, real: [N, D], N >= MIN_IMAGES. Unlike a Frechet distance it has no bias by
    N, and is 0 on average for real images."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # slow import

    both = (torch.as_tensor(np.asarray(part, dtype=np.float32)) for part in (features, real))
    options: dict[str, Any] = dict(kid_subsets=_SUBSETS, kid_subset_size=MIN_IMAGES, rng_seed=0, verbose=False)
    return float(kid_features_to_metric(*both, **options)[KEY_METRIC_KID_MEAN])


def distance_interval(features: Any, reference: FeatureMoments, replicates: int, seed: int) -> tuple[float, ...]:
    """`frechet_distance` of features [N, D], and the ends of its 95% interval at this N.
    Only the standard deviation is that of bootstrap resamples: they have fewer images, so their distance is larger."""
    x, distance = np.asarray(features, dtype=np.float64), frechet_distance(features, reference)
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=replicates)
    projected = x @ reference.root
    half = 1.96 * np.std([fast_frechet(x, reference, c.astype(np.float64), projected) for c in counts], ddof=1)
    return distance, max(0.0, distance - half), distance + half


def fast_frechet(x: np.ndarray, reference: FeatureMoments, counts: np.ndarray, projected: np.ndarray) -> float:
    """Frechet distance for bootstrap replicates: features [n, D], float64, row i counted counts[i] times.
    With S2 the reference covariance, tr (S1 S2)^(1/2) is the sum of the singular values of the centred features times
    S2^(1/2) / sqrt(n - 1): the smaller of an n x n and a D x D problem. projected: x @ reference.root [n, D]."""
    drawn = counts > 0
    x, y, weights = x[drawn], projected[drawn], counts[drawn]
    n = weights.sum()
    mean = weights @ x / n
    square = np.sqrt(weights / (n - 1))[:, None]
    trace = float(((x - mean) ** 2 * square**2).sum())
    y = (y - weights @ y / n) * square
    gram, shift = y.T @ y if len(y) > y.shape[1] else y @ y.T, mean - reference.mean
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum()
    return float(shift @ shift + trace + np.trace(reference.cov) - 2 * singular)


def distance_floor(features: np.ndarray, n: int, seed: int) -> float:
    """Real against real: the mean distance of n random real images to the moments of all *other* real ones.
    features: [N, D]. No sampler is expected to go below it with n images. Raises UserError unless N >= n + 2."""
    if len(features) < n + 2:
        raise UserError(f"compare.num_distance={n} needs {n + 2} real images, but there are {len(features)}.")
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(features)) for _ in range(3)]
    return float(np.mean([frechet_distance(features[o[:n]], feature_moments(features[o[n:]])) for o in orders]))


class RealImages(NamedTuple):
    """What samples are compared with: the name of the distance, moments of real images, `distance_floor`, and some of
    their features [N, D] if the images are there."""

    name: str
    moments: FeatureMoments
    floor: float | None
    features: np.ndarray | None = None


def write_features(path: Path, extractor: Extractor, images: np.ndarray, rows: np.ndarray, progress: Progress) -> None:
    """Write the features of rows of packed images, uint8 [N, 3, H, W]."""
    parts = []
    for chunk in np.array_split(rows, range(1024, len(rows), 1024)):
        parts.append(extractor.features(images[chunk]).numpy())
        progress(sum(map(len, parts)), len(rows))
    write_arrays(path, {"features": np.concatenate(parts)}, compress=False)


def save_moments(path: Path, moments: FeatureMoments) -> None:
    """Write the mean [D] and the upper triangle of the covariance as npz."""
    write_arrays(path, {"mean": moments.mean, "upper": moments.cov[np.triu_indices(len(moments.mean))]})


def published_images(index: dict | None, folder: Path, extractor: Extractor, n: int, seed: int) -> RealImages | None:
    """The moments by this extractor that a family.json (`index`) names, if any; without a floor for other n or seed."""
    found = (index or {}).get("statistics")
    if found is None or (found["name"], found["identity"]) != (extractor.name, extractor.key):
        return None
    arrays = read_arrays(folder / found["file"], "publish the family again (make publish)")
    mean = arrays["mean"].astype(np.float64)
    cov = np.zeros((len(mean), len(mean)))
    cov[np.triu_indices(len(mean))] = arrays["upper"]
    same = (found["floor"]["num_samples"], found["floor"]["seed"]) == (n, seed)
    moments = FeatureMoments(mean, cov + np.triu(cov, 1).T)
    return RealImages(extractor.name, moments, found["floor"]["distance"] if same else None)
