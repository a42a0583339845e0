"""Distances against an independent formula, torch-fidelity's own pipeline, and known distortions."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor

from mlem_diffusion import statistics
from mlem_diffusion.comparison import features as extractors
from mlem_diffusion.comparison import frechet
from mlem_diffusion.data.pixels import to_uint8
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import sha256_of


def gaussian_features(n: int, dim: int, seed: int, shift: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((dim, dim)) / np.sqrt(dim)
    return (stretch * rng.standard_normal((n, dim)) @ mix + shift).astype(np.float32)


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook formula, with scipy's matrix square root."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(s1 + s2 - 2 * np.real(np.asarray(sqrtm(s1 @ s2)))))


def textures(n: int, seed: int, size: int = 32) -> Tensor:
    """Soft coloured discs on gradients with a fine grating: enough structure for distortions to show; float
    0..255."""
    g = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, size)
    yy, xx = grid.view(1, 1, -1, 1), grid.view(1, 1, 1, -1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, 1, 1, generator=g)

    cx, cy, radius = draw(1) - 0.5, draw(1) - 0.5, 0.3 + 0.4 * draw(1)
    disc = torch.sigmoid(12 * (radius - ((xx - cx) ** 2 + (yy - cy) ** 2).sqrt()))
    grating = 0.15 * torch.sin(size * (0.6 + 0.4 * draw(1)) * xx) * torch.cos(size * 0.7 * draw(1) * yy)
    image = draw(3) * disc + draw(3) * (1 - disc) * (0.6 + 0.4 * (2 * draw(1) - 1) * yy) + grating
    return image.clip(0, 1) * 255


def u8(x: Tensor) -> Tensor:
    return x.round().clip(0, 255).to(torch.uint8)


def blur(x: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3)


# ------------------------------------------------------------------------------------------- errors


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
    assert statistics.squared_errors(samples, reference).dtype == np.float64
    with pytest.raises(UserError):
        statistics.squared_errors(samples, reference[:1])
    with pytest.raises(UserError):
        statistics.squared_errors(samples.byte(), reference.byte())


def test_standard_error_matches_its_sampling_spread() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 10)
    means, unclustered, clustered = [], [], []
    for _ in range(400):
        values = np.repeat(rng.standard_normal(40), 10) + 0.5 * rng.standard_normal(400)
        means.append(values.mean())
        unclustered.append(statistics.standard_error(values))
        clustered.append(statistics.standard_error(values, clusters))
    spread = np.std(means)
    assert np.mean(clustered) == pytest.approx(spread, rel=0.12)
    assert np.mean(unclustered) < 0.5 * spread  # ignoring the clusters is far too sure
    values = rng.standard_normal(50)
    textbook = values.std(ddof=1) / np.sqrt(50)
    assert statistics.standard_error(values) == pytest.approx(textbook, rel=1e-12)
    assert statistics.standard_error(values, np.arange(50)) == pytest.approx(textbook, rel=1e-12)
    assert np.isnan(statistics.standard_error(values[:1]))


# -------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.3, 1.0), (0.1, 1.4)])
def test_frechet_distance_agrees_with_matrix_square_root(shift: float, stretch: float) -> None:
    x, y = gaussian_features(300, 24, 1, shift, stretch), gaussian_features(500, 24, 2)
    assert frechet.frechet_distance(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-6)
    assert frechet.frechet_distance(torch.from_numpy(x), frechet.feature_moments(y)) == frechet.frechet_distance(x, y)
    shifted = x.astype(np.float64) + 0.5
    assert frechet.frechet_distance(shifted, x.astype(np.float64)) == pytest.approx(24 * 0.25, rel=1e-6)


def test_fast_frechet_equals_torch_fidelity() -> None:
    x, y = gaussian_features(200, 24, 4, 0.1), gaussian_features(500, 24, 5)
    reference = frechet.feature_moments(y)
    assert frechet.fast_frechet(x, reference) == pytest.approx(frechet.frechet_distance(x, y), rel=1e-6)
    # Taking images several times is the same as repeating them.
    counts = np.random.default_rng(6).multinomial(200, np.full(200, 1 / 200))
    repeated = np.repeat(x, counts, axis=0)
    fast = frechet.fast_frechet(x, reference, counts, x.astype(np.float64) @ reference.root)
    assert fast == pytest.approx(frechet.frechet_distance(repeated, y), rel=1e-6)
    # With fewer images than features a general eigenvalue solver loses half the digits.
    few = frechet.fast_frechet(x[:15], reference)
    assert few == pytest.approx(frechet.frechet_distance(x[:15], y), rel=1e-4)
    assert few > frechet.fast_frechet(x, reference)


def test_distance_floor_is_that_of_other_real_images() -> None:
    features = gaussian_features(600, 12, 9)
    floor = frechet.distance_floor(features, 100, seed=0)
    assert floor == frechet.distance_floor(features, 100, seed=0)
    assert 0 < floor < frechet.distance_floor(features, 30, seed=0)  # fewer images, higher floor
    # Drawn images are excluded from the statistics: inside, they would pull the distance down.
    order = np.random.default_rng(0).permutation(600)
    one = frechet.distance_floor(features, 300, seed=0, repeats=1)
    assert one == pytest.approx(frechet.frechet_distance(features[order[:300]], features[order[300:]]), rel=1e-9)
    assert one > 1.5 * frechet.frechet_distance(features[order[:300]], features)
    with pytest.raises(UserError, match="at least 602"):
        frechet.distance_floor(features, 600, seed=0)


def test_bad_input_gives_no_distance() -> None:
    good = gaussian_features(10, 4, 0)
    bad = good.copy()
    bad[3, 1] = np.nan
    with pytest.raises(UserError, match="at least 2"):
        frechet.frechet_distance(good[:1], good)
    with pytest.raises(UserError, match="NaN"):
        frechet.frechet_distance(bad, good)
    with pytest.raises(UserError, match="NaN"):
        frechet.fast_frechet(bad, frechet.feature_moments(good))
    with pytest.raises(UserError, match="compared"):
        frechet.frechet_distance(good[:, :3], good)
    with pytest.raises(UserError, match="uint8"):
        extractors.light().features(torch.zeros(4, 3, 16, 16))
    with pytest.raises(UserError, match="uint8"):
        extractors.light().features(torch.zeros(4, 1, 16, 16, dtype=torch.uint8))


def test_moments_of_real_images_are_read_back_and_published(tmp_path: Path) -> None:
    extractor, images = extractors.light(dim=8), u8(textures(60, 3, 8)).numpy()
    rows, calls = np.arange(5, 60), []
    frechet.write_features(tmp_path / "real.npz", extractor, images, rows, lambda *done: calls.append(done))
    features = frechet.read_features(tmp_path / "real.npz")
    assert np.array_equal(features, extractor.features(images[5:]).numpy()) and calls == [(55, 55)]
    real = frechet.RealImages.of("FD", features, 20, 0)
    for dim in (8, 600):  # many features are stored in float32
        moments = frechet.feature_moments(gaussian_features(30, dim, 1))
        frechet.save_moments(tmp_path / "statistics.npz", moments)
        again = frechet.load_moments(tmp_path / "statistics.npz")
        assert np.allclose(again.cov, moments.cov, atol=1e-6) and np.array_equal(again.cov, again.cov.T)
        assert (again.n, np.array_equal(again.mean, moments.mean)) == (30, dim == 8)
    frechet.save_moments(tmp_path / "statistics.npz", real.moments)
    floor = {"num_samples": 20, "seed": 0, "distance": real.floor}
    found = {"file": "statistics.npz", "name": extractor.name, "identity": extractor.identity, "floor": floor}
    for seed, expected in ((0, real.floor), (1, None)):
        published = frechet.published_images({"statistics": found}, tmp_path, extractor, 20, seed)
        assert published is not None and np.array_equal(published.moments.cov, real.moments.cov)
        assert published.floor == expected
    assert frechet.published_images({"statistics": found}, tmp_path, extractors.light(dim=9), 20, 0) is None
    assert frechet.published_images(None, tmp_path, extractor, 20, 0) is None


# ---------------------------------------------------------------------------------------- extractors


def test_light_extractor_orders_distortions() -> None:
    extractor = extractors.light()
    real, n = textures(1200, 4, 16), 200
    features = extractor.features(u8(real)).numpy()
    assert features.shape == (1200, 64) and features.dtype == np.float32
    floor = frechet.distance_floor(features, n, seed=0)
    reference = frechet.feature_moments(features[n:])
    fresh = real[:n]
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(5))

    def distance(x: Tensor) -> float:
        return frechet.frechet_distance(extractor.features(u8(x)), reference)

    assert distance(fresh) == pytest.approx(floor, rel=0.25)
    ladders = {
        "blur": [blur(fresh, s) for s in (0.6, 0.8, 1.5)],
        "noise": [fresh + s * noise for s in (12, 24, 48)],
        "colour": [fresh + torch.tensor([s, 0.0, -s]).view(1, 3, 1, 1) for s in (15, 30, 60)],
        "modes dropped": [fresh[torch.arange(n) % k] for k in (100, 40, 10)],
    }
    for name, ladder in ladders.items():
        values = [floor, *(distance(x) for x in ladder)]
        assert values == sorted(values) and values[1] > 1.1 * floor, (name, values)


def test_light_weights_are_the_same_everywhere() -> None:
    a, b = extractors.light(dim=8), extractors.light(dim=8)
    images = u8(textures(3, 6))
    assert a.key == b.key and torch.equal(a.features(images), b.features(images))
    keys = {extractors.light(dim=8, seed=1).key, extractors.light(dim=9).key, a.key}
    assert len(keys) == 3
    first = extractors._light_weights(8, 0)[0]  # numpy's legacy stream, frozen by its authors
    assert first[0, 0, 0, 0] == pytest.approx(FIRST_WEIGHT, abs=1e-6)
    # Features do not depend on the batch that an image is in.
    alone = torch.cat([a.features(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, a.features(images), rtol=1e-4, atol=1e-5)


FIRST_WEIGHT = 0.1867375671863556


class ChannelMeans:
    """A user's extractor, as Hydra would make it from a `_target_`."""

    dim = 3

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3)) * self.gain


def test_custom_extractor_is_named_and_keyed() -> None:
    one, same, other = (extractors.custom(ChannelMeans(gain), "FD-means") for gain in (1.0, 1.0, 1.1))
    assert one.name == "FD-means"
    assert one.key == same.key != other.key  # changed weights must not meet the old cache
    assert extractors.custom(ChannelMeans(), "FD-means", "v1").key == "v1"
    features = one.features(u8(textures(5, 7)))
    assert features.shape == (5, 3) and features.dtype == torch.float32
    for bad_name in ("FID", " fid ", ""):
        with pytest.raises(UserError):
            extractors.custom(ChannelMeans(), bad_name)
    with pytest.raises(UserError, match="NaN"):
        extractors.custom(ChannelMeans(float("nan")), "FD-nan")
    with pytest.raises(UserError, match="shape"):
        extractors.custom(lambda x: x.float(), "FD-wrong-shape")
    with pytest.raises(UserError, match="callable"):
        extractors.custom(3, "FD-three")  # type: ignore[arg-type]


def test_inception_refuses_other_files_and_reports_a_failed_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    wrong.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(UserError, match="SHA-256"):
        extractors.inception(str(wrong))
    with pytest.raises(UserError, match="no file instead of"):
        extractors.inception(str(tmp_path / "missing.pth"))

    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match="no route to host"):
        extractors.inception()


def test_inception_features_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path with random weights of the right layout, whose hash is declared to be the expected
    one."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    state = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256_of(path))
    extractor = extractors.inception(str(path))
    assert extractor.name == "FID"
    features = extractor.features(u8(textures(2, 8)))
    assert features.shape == (2, 2048) and features.dtype == torch.float32
