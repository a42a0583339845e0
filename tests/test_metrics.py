"""Distances against an independent formula and torch-fidelity, and features on known distortions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor

from mlem_diffusion import statistics
from mlem_diffusion.comparison import features as frechet
from mlem_diffusion.data.pixels import to_uint8
from mlem_diffusion.errors import UserError


def gaussian_features(n: int, dim: int, seed: int, shift: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((dim, dim)) / np.sqrt(dim)
    return (stretch * rng.standard_normal((n, dim)) @ mix + shift).astype(np.float32)


def textures(n: int, seed: int) -> Tensor:
    """Smooth random colours, float [n, 3, 16, 16] in 0..255."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return 255 * F.interpolate(coarse, size=16, mode="bilinear")


def u8(x: Tensor) -> Tensor:
    return x.round().clip(0, 255).to(torch.uint8)


def test_to_uint8_rounds_clips_and_inverts() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(UserError):
        to_uint8(torch.tensor([float("nan")]))


def test_squared_errors_are_means_before_clipping() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    samples = reference.clone()
    samples[0] += 3.0  # beyond the range of images: not clipped
    samples[1, 0] += 1.0  # one channel of three
    assert statistics.squared_errors(samples, reference) == pytest.approx([9.0, 1 / 3], rel=1e-12)


def distance(x: Any, y: Any) -> float:
    return frechet.frechet_distance(x, y if isinstance(y, frechet.FeatureMoments) else frechet.feature_moments(y))


def fast(x: np.ndarray, reference: frechet.FeatureMoments, counts: Any = None) -> float:
    x = x.astype(np.float64)
    return frechet.fast_frechet(x, reference, np.ones(len(x)) if counts is None else counts, x @ reference.root)


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.3, 1.0), (0.1, 1.4)])
def test_frechet_distance_agrees_with_matrix_square_root(shift: float, stretch: float) -> None:
    x, y = gaussian_features(300, 24, 1, shift, stretch), gaussian_features(500, 24, 2)
    s1, s2 = (np.cov(features.astype(np.float64), rowvar=False) for features in (x, y))
    between = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    textbook = between @ between + np.trace(s1 + s2 - 2 * np.real(np.asarray(sqrtm(s1 @ s2))))
    assert distance(x, y) == pytest.approx(textbook, rel=1e-6)


def test_fast_frechet_equals_torch_fidelity() -> None:
    x, y = gaussian_features(200, 24, 4, 0.1), gaussian_features(500, 24, 5)
    reference = frechet.feature_moments(y)
    assert fast(x, reference) == pytest.approx(distance(x, y), rel=1e-6)
    # Taking images several times is the same as repeating them.
    counts = np.random.default_rng(6).multinomial(200, np.full(200, 1 / 200)).astype(float)
    repeated = np.repeat(x, counts.astype(int), axis=0)
    assert fast(x, reference, counts) == pytest.approx(distance(repeated, y), rel=1e-6)
    # With fewer images than features a general eigenvalue solver loses half the digits.
    assert fast(x[:15], reference) == pytest.approx(distance(x[:15], y), rel=1e-4)


def test_a_distance_has_an_interval_that_covers_fresh_samples() -> None:
    reference = frechet.feature_moments(gaussian_features(5000, 6, 5))
    samples = [gaussian_features(300, 6, seed, 0.5) for seed in range(100, 160)]
    drawn = np.array([fast(x, reference) for x in samples])
    found, low, high = np.transpose([frechet.distance_interval(x, reference, 30, 1) for x in samples])
    assert found == pytest.approx(drawn) and (low < found).all()
    # the standard deviation of 60 samples is known to 9%; the bootstrap's is somewhat too large with few images
    assert 0.8 < ((high - low) / 2).mean() / (1.96 * drawn.std()) < 1.4
    assert np.mean((low < drawn.mean()) & (drawn.mean() < high)) >= 0.88


def test_distance_floor_is_that_of_other_real_images() -> None:
    features = gaussian_features(600, 12, 9)
    assert 0 < frechet.distance_floor(features, 100, seed=0) < frechet.distance_floor(features, 30, seed=0)
    # Drawn images are excluded from the statistics: inside, they would pull the distance down.
    rng = np.random.default_rng(0)
    orders, floor = [rng.permutation(600) for _ in range(3)], frechet.distance_floor(features, 300, seed=0)
    assert floor == pytest.approx(np.mean([distance(features[o[:300]], features[o[300:]]) for o in orders]), rel=1e-9)
    assert floor > 1.5 * distance(features[orders[0][:300]], features)
    with pytest.raises(UserError, match="602 real images"):
        frechet.distance_floor(features, 600, seed=0)


def test_moments_of_real_images_are_read_back_and_published(tmp_path: Path) -> None:
    extractor, images = frechet.light(dim=8), u8(textures(60, 3)).numpy()
    frechet.write_features(tmp_path / "real.npz", extractor, images, np.arange(5, 60), lambda *done: None)
    features = np.load(tmp_path / "real.npz")["features"]
    assert np.array_equal(features, extractor.features(images[5:]).numpy())
    floor, moments = frechet.distance_floor(features, 20, 0), frechet.feature_moments(features)
    frechet.save_moments(tmp_path / "statistics.npz", moments)
    statistics = {"file": "statistics.npz", "name": extractor.name, "identity": extractor.key}
    index = {"statistics": statistics | {"floor": {"num_samples": 20, "seed": 0, "distance": floor}}}
    for seed, expected in ((0, floor), (1, None)):
        published = frechet.published_images(index, tmp_path, extractor, 20, seed)
        assert published is not None and np.array_equal(published.moments.cov, moments.cov)
        assert published.floor == expected
    assert frechet.published_images(index, tmp_path, frechet.light(dim=9), 20, 0) is None


def test_light_extractor_orders_distortions() -> None:
    extractor, real, n = frechet.light(), textures(1200, 4), 200
    features = extractor.features(u8(real))
    assert features.shape == (1200, 64) and features.dtype == torch.float32
    floor, reference = frechet.distance_floor(features, n, seed=0), frechet.feature_moments(features[n:])
    fresh = real[:n]
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(5))
    blurred = F.avg_pool2d(F.pad(fresh, (1, 1, 1, 1), mode="reflect"), 3, 1)
    ladders = {
        "blur": [fresh.lerp(blurred, s) for s in (0.4, 0.7, 1.0)],
        "noise": [fresh + s * noise for s in (12, 24, 48)],
        "colour": [fresh + torch.tensor([s, 0.0, -s]).view(1, 3, 1, 1) for s in (15, 30, 60)],
        "modes dropped": [fresh[torch.arange(n) % k] for k in (100, 40, 10)],
    }
    assert distance(extractor.features(u8(fresh)), reference) == pytest.approx(floor, rel=0.25)
    for name, ladder in ladders.items():
        values = [floor, *(distance(extractor.features(u8(x)), reference) for x in ladder)]
        assert values == sorted(values) and values[1] > 1.1 * floor, (name, values)


def test_light_weights_are_the_same_everywhere() -> None:
    one, again, images = frechet.light(dim=8), frechet.light(dim=8), u8(textures(3, 6))
    assert one.key == again.key and torch.equal(one.features(images), again.features(images))
    assert len({frechet.light(dim=8, seed=1).key, frechet.light(dim=9).key, one.key}) == 3
    first = frechet._light_weights(8, 0)[0]  # numpy's legacy stream, frozen by its authors
    assert first[0, 0, 0, 0] == pytest.approx(0.1867375671863556, abs=1e-6)
    # Features do not depend on the batch that an image is in.
    alone = torch.cat([one.features(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, one.features(images), rtol=1e-4, atol=1e-5)


def test_custom_extractor_is_keyed_and_checked() -> None:
    def means(gain: float) -> Any:
        return lambda images: images.double().mean((2, 3)) * gain

    one, same, other = (frechet.custom(means(gain), "FD-means") for gain in (1.0, 1.0, 1.1))
    assert one.key == same.key != other.key  # changed weights must not meet the old cache
    for function, name in ((means(1), "FID"), (means(np.nan), "FD-nan"), (lambda x: x.float(), "FD-4d")):
        with pytest.raises(UserError):
            frechet.custom(function, name)


def test_inception_refuses_other_files(tmp_path: Path) -> None:
    wrong = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    wrong.write_bytes(b"<html>quota exceeded</html>")
    for path in (wrong, tmp_path / "missing.pth"):
        with pytest.raises(UserError, match="do not exist, or their SHA-256"):
            frechet.inception(str(path))
