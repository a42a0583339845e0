"""Feature extractors for the Frechet distance: a light one without download, Inception, and any callable.

Only `inception` gives the distance that the literature calls FID (Heusel et al. 2017, arXiv:1706.08500). The others
have their own names.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..files import sha256_of

# Hash of the file that torch-fidelity downloads. It is a pickle, so only this exact content is ever loaded.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BATCH = 64  # images per call


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
        for start in range(0, len(images), BATCH):
            chunk = torch.as_tensor(images[start : start + BATCH])
            out = torch.as_tensor(self.compute(chunk)).to("cpu", torch.float32)
            if out.ndim != 2 or len(out) != len(chunk) or not bool(torch.isfinite(out).all()):
                raise UserError(f"{self.name}: the extractor must return finite features [N, D], not {out.shape}.")
            parts.append(out)
        return torch.cat(parts)


# ------------------------------------------------------------------------------------------------ light

_FIRST, _SECOND, _SCALES, _CELLS = 16, 32, 3, 4
_COLOURS = 3 * _CELLS
_FLOOR = 0.02  # in image units [-1, 1]: below about 2.5 grey levels, detail and rounding look alike


def light(dim: int = 64, seed: int = 0, device: str = "cpu") -> Extractor:
    """Extractor of `dim` random-convolution features: no download, the same weights on every machine.

    Two layers of random zero-mean 3x3 filters are rectified at three scales. A fixed random matrix projects the
    logarithm of the mean response and the mean colour, per quadrant, to `dim` numbers. Logarithms make a relative loss
    of fine detail (blur) as visible as a change of contrast.
    """
    if dim < 1:
        raise UserError(f"The light extractor needs dim >= 1, but dim is {dim}.")
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


# ------------------------------------------------------------------------------------ inception, custom


def inception(weights: str | None = None, device: str = "cpu") -> Extractor:
    """torch-fidelity's InceptionV3 (TF-2015 weights), 2048 pooled features: the distance is FID.

    `weights` is a local copy of weights-inception-2015-12-05-6726825d.pth; without it, the file is downloaded to the
    torch hub folder. UserError for a wrong file or a failed download. About 3 images per second on two CPU cores.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1])
    if not weights and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # to a temporary file, which is renamed if its hash is right
            torch.hub.download_url_to_file(URL, str(path), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            raise UserError(f"Download {URL} and give its path as metrics.weights, for it failed: {error}.") from error
    if not path.is_file() or sha256_of(path) != INCEPTION_SHA256:
        raise UserError(f"The Inception weights {path} do not exist, or their SHA-256 is not {INCEPTION_SHA256}.")
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    network = network.to(device).eval()
    return Extractor("FID", f"inception-{INCEPTION_SHA256}", lambda images: network(images.to(device))[0])


def custom(callable: Callable[[Tensor], Any], name: str, key: str = "") -> Extractor:
    """Extractor from any map of uint8 images [N, 3, H, W] to [N, D] features, with its own name.

    From Hydra: `callable: {_target_: package.Class, ...}`. Without a key, one is computed from the features of a few
    fixed images, so that changed weights never use an old cache. UserError for the name FID, which is Inception's.
    """
    name = name.strip()
    if name.upper() in ("", "FID"):
        raise UserError("A custom extractor needs a name for its distance, and this name must not be FID.")
    extractor = Extractor(name, key, callable)
    if key:
        return extractor
    images = np.random.RandomState(0).randint(0, 256, (4, 3, 64, 64)).astype(np.uint8)  # see _light_weights
    images[:2, :, :, 1:] = images[:2, :, :, :1]  # two have stripes
    # Five digits, so that the last bits of a convolution seldom matter; a needless cache miss costs only time.
    text = ",".join(f"{value:.5g}" for value in extractor.features(images).flatten().tolist())
    return replace(extractor, key=hashlib.sha256(f"{name}/{text}".encode()).hexdigest()[:16])
