"""Denoising errors of a family: definitions, common noise, independence of the batch size."""

import numpy as np
import pytest
import torch
from toys import gaussian_level, gaussian_variance, process, toy_family

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import alpha_sigma, uniform_weights
from mlem_diffusion.gamma.measurement import family_pairs, noise_levels, squared_differences

IMAGES = 0.5 * torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOGSNR = np.array([-6.0, -1.0, 0.5, 7.0])


def denoising_errors(levels, *arguments, **named):
    """loss [K, M, S], to_previous and to_largest [K-1, M, S]."""
    found = squared_differences(levels, family_pairs(len(levels)), *arguments, **named)
    return np.split(found, [len(levels), 2 * len(levels) - 1])


def test_errors_do_not_depend_on_the_batch_size():
    runs = [denoising_errors(toy_family(), IMAGES, LOGSNR, seed=3, batch=batch) for batch in (1, 3, 128)]
    for run in runs[:-1]:
        for a, b in zip(run, runs[-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    other = denoising_errors(toy_family(), IMAGES, LOGSNR, seed=4)
    assert not np.allclose(other[0], runs[-1][0], rtol=1e-3)


def test_differences_follow_their_definitions():
    """The differences of constant denoisers, whose errors are known."""
    values = [0.1, 0.4, -0.2, 0.3]
    levels = [Level(str(v), lambda x, logsnr, v=v: torch.full_like(x, v), 1.0) for v in values]
    loss, previous, largest = denoising_errors(levels, IMAGES, LOGSNR)
    assert loss.shape == (4, 10, 4) and previous.shape == largest.shape == (3, 10, 4)
    for k, value in enumerate(values):
        expected = (IMAGES - value).square().mean((1, 2, 3)).numpy()
        np.testing.assert_allclose(loss[k], np.repeat(expected[:, None], 4, 1), rtol=1e-5)
    for k in range(3):
        np.testing.assert_allclose(previous[k], (values[k + 1] - values[k]) ** 2, rtol=1e-4)
        np.testing.assert_allclose(largest[k], (values[k] - values[-1]) ** 2, rtol=1e-4)


def test_noise_is_common_to_the_levels_and_fresh_elsewhere():
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def recorder(name: str) -> Level:
        return Level(name, lambda x, logsnr: seen[name].append(x) or x, 1.0)

    # images of zeros at one noise level, twice, so that the level sees the noise alone
    denoising_errors([recorder("a"), recorder("b")], torch.zeros(5, 3, 16, 16), np.array([0.0, 0.0]))
    a, b = torch.cat(seen["a"]).flatten(1), torch.cat(seen["b"]).flatten(1)
    assert torch.equal(a, b)
    correlation = np.corrcoef(a.numpy())  # 5 images at 2 noise levels
    assert np.abs(correlation - np.eye(10)).max() < 5 / np.sqrt(3 * 16 * 16)


def test_exact_denoiser_has_the_exact_error():
    """Gaussian data with s = 0.5: the error is s^2 sigma^2 / v per pixel; 48000 pixels, 4 standard errors of 0.65%."""
    images = 0.5 * torch.randn(250, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loss, _, _ = denoising_errors([gaussian_level(0.5)], images, LOGSNR)
    _, sigma = alpha_sigma(LOGSNR)
    np.testing.assert_allclose(loss[0].mean(0), 0.25 * sigma**2 / gaussian_variance(LOGSNR, 0.5), rtol=0.026)


def test_noise_levels_cover_the_path_and_its_ends():
    p, reported = process(), []
    values = noise_levels(p, 10)
    assert len(values) == 10 and np.all(np.diff(values) > 0)
    assert (values[0], values[-1]) == (p.logsnr_min, p.logsnr_max)
    np.testing.assert_allclose(values[1:-1], p.logsnr_at((np.arange(8) + 0.5) / 8))
    weights = uniform_weights(values)
    assert weights.sum() == pytest.approx(1) and weights.min() > 0
    denoising_errors(toy_family(1), IMAGES, values, progress=lambda done, of: reported.append((done, of)))
    assert reported == [(i, 10) for i in range(1, 11)]
