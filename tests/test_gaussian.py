"""Closed-form models: the Gaussian denoiser is the dense formula, and the analytic family has its stated errors."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlem_diffusion.diffusion.level import check_family
from mlem_diffusion.diffusion.process import alpha_sigma
from mlem_diffusion.errors import UserError
from mlem_diffusion.models import gaussian
from mlem_diffusion.models.analytic import GaussianMixture, analytic_family, smooth_field
from mlem_diffusion.models.gaussian import GaussianDenoiser, fit_gaussian, load_gaussian

SHAPE = (3, 4, 4)
D = 48


def correlated(count: int, seed: int = 0) -> np.ndarray:
    """Float images [count, *SHAPE] of a Gaussian with a steep spectrum and a mean that is not zero."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((D, D)) * 0.4 * 0.8 ** np.arange(D)
    return (0.2 + rng.standard_normal((count, D)) @ mixing.T).reshape(count, *SHAPE).astype(np.float32)


def mirrored(images: np.ndarray) -> np.ndarray:
    """The images and their mirror images, from which a fit is made, as rows [2 N, D] in float64."""
    return np.concatenate([images, images[..., ::-1]]).reshape(-1, D).astype(np.float64)


def dense_denoiser(model: GaussianDenoiser, x: torch.Tensor, logsnr: float) -> np.ndarray:
    """mu + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha mu) by a dense solve in float64; rows [B, D]."""
    u, mean = model.basis.double().numpy(), model.mean.double().numpy().ravel()
    c = u @ np.diag(model.variances.double().numpy()) @ u.T + float(model.residual) * (np.eye(D) - u @ u.T)
    alpha, sigma = alpha_sigma(logsnr)
    centred = x.double().numpy().reshape(len(x), D) - alpha * mean
    return mean + alpha * np.linalg.solve(alpha**2 * c + sigma**2 * np.eye(D), centred.T).T @ c


@pytest.mark.parametrize("logsnr", [-9.0, -1.0, 3.0, 9.0])
@pytest.mark.parametrize("rank", [5, D])
def test_the_denoiser_equals_the_dense_formula(logsnr: float, rank: int) -> None:
    model = fit_gaussian(correlated(300), rank)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    for noise_level in (torch.tensor(logsnr), torch.full((4,), logsnr)):
        got = model(x, noise_level).flatten(1)
        np.testing.assert_allclose(got, dense_denoiser(model, x, logsnr), rtol=2e-4, atol=2e-4)
    mixed = torch.tensor([-4.0, logsnr, 5.0, 0.0])
    alone = torch.cat([model(x[i : i + 1], mixed[i]) for i in range(4)])
    torch.testing.assert_close(model(x, mixed), alone)


@pytest.mark.parametrize("kind", ["floats", "bytes"])
def test_the_fit_has_the_mean_and_variances_of_the_images_and_their_mirror_images(kind: str) -> None:
    images = correlated(500)
    if kind == "bytes":
        images = (127.5 * images + 127.5).clip(0, 255).astype(np.uint8)
    flat = mirrored(images if kind == "floats" else images / 127.5 - 1)
    values = np.linalg.eigvalsh(np.cov(flat.T, bias=True))[::-1]
    model = fit_gaussian(images, 7)
    np.testing.assert_allclose(model.mean.numpy().ravel(), flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.variances, values[:7], rtol=1e-5)
    np.testing.assert_allclose(model.residual, values[7:].mean(), rtol=1e-5)
    np.testing.assert_allclose(model.basis.T @ model.basis, np.eye(7), atol=1e-5)


def test_large_images_give_the_same_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    images = correlated(400)
    exact = fit_gaussian(images, 6)
    monkeypatch.setattr(gaussian, "DENSE_LIMIT", 10)
    state = torch.get_rng_state()
    close = fit_gaussian(images, 6)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(close.variances, exact.variances, rtol=1e-3)
    np.testing.assert_allclose(close.residual, exact.residual, rtol=1e-3)
    overlap = torch.linalg.svdvals(exact.basis.T @ close.basis)
    assert float(overlap.min()) > 0.999


def held_out_loss(model: GaussianDenoiser, images: np.ndarray) -> float:
    """The mean denoising error over the log-SNRs that choose the rank, by 20 draws of the noise."""
    x0, generator, losses = torch.as_tensor(images), torch.Generator().manual_seed(2), []
    for u in torch.linspace(-10, 10, 41):
        alpha, sigma = torch.sigmoid(u).sqrt(), torch.sigmoid(-u).sqrt()
        noise = torch.randn(20, *x0.shape, generator=generator)
        error = model((alpha * x0 + sigma * noise).flatten(0, 1), u) - x0.repeat(20, 1, 1, 1)
        losses.append(float(error.square().mean()))
    return float(np.mean(losses))


def test_the_rank_is_the_smallest_with_nearly_the_least_held_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "default_rank", lambda d: 12)
    images = correlated(2000)
    kept = np.concatenate([images[9::10], images[9::10, ..., ::-1]])
    others = images[np.arange(2000) % 10 != 9]
    rank = len(fit_gaussian(images).variances)
    losses = {r: held_out_loss(fit_gaussian(others, r), kept) for r in (rank - 1, rank, 12)}
    assert 1 < rank < 12 and losses[rank] < 1.006 * losses[12] < losses[rank - 1] * 1.003
    white = np.random.default_rng(0).standard_normal((400, *SHAPE)).astype(np.float32)
    assert len(fit_gaussian(white).variances) == 1  # no direction is worth more than the others
    assert len(fit_gaussian(images[:5]).variances) == 12  # too few images to judge by


def test_the_mean_posterior_variance_is_the_error_on_data_with_this_covariance() -> None:
    images = correlated(4000)
    model = fit_gaussian(images, 5)
    x0, generator = torch.as_tensor(np.concatenate([images, images[..., ::-1]])), torch.Generator().manual_seed(3)
    for u in torch.tensor([-6.0, 0.0, 4.0]):
        noise = torch.randn(x0.shape, generator=generator)
        error = (model(torch.sigmoid(u).sqrt() * x0 + torch.sigmoid(-u).sqrt() * noise, u) - x0).square().mean()
        assert float(model.mean_variance(u)) == pytest.approx(float(error), rel=0.02)
        assert model.mean_variance(u.repeat(3)).tolist() == [float(model.mean_variance(u))] * 3


def test_cost_and_derivative_of_the_level() -> None:
    model = fit_gaussian(correlated(300), 5)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, *SHAPE), torch.zeros(2))
    assert model.as_level().flops == counter.get_total_flops() / 2 + 7 * D + 5  # two thin products, and vector work
    x = torch.ones(1, *SHAPE)
    tangent = torch.func.jvp(lambda v: model(v, torch.tensor(0.0)), (x,), (x,))[1]
    torch.testing.assert_close(tangent, model(x, torch.tensor(0.0)) - model(0 * x, torch.tensor(0.0)))


def test_saved_and_loaded_and_bad_input_is_reported(tmp_path: Path) -> None:
    model, path = fit_gaussian(correlated(300), 5), tmp_path / "gauss.safetensors"
    model.save(path)
    own, found = dict(model.named_buffers()), dict(load_gaussian(path).named_buffers())
    assert len(own) == 4 and own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    with pytest.raises(UserError, match="missing or not the Gaussian denoiser of these levels: restore"):
        load_gaussian(path, sha256="0")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a saved"):
        load_gaussian(path)
    with pytest.raises(UserError, match=r"outside 1\.\.48"):
        fit_gaussian(correlated(20), 0)


@pytest.mark.parametrize("logsnr", [-6.0, 0.0, 5.0])
def test_posterior_mean_is_bayes_formula(logsnr: float) -> None:
    mixture = GaussianMixture(4)
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.sigmoid(torch.tensor(logsnr)).sqrt(), torch.sigmoid(torch.tensor(-logsnr)).sqrt()
    total = alpha**2 * mixture.std**2 + sigma**2
    expected = []
    for row in x.flatten(1).double():
        weights = torch.exp(-((row - alpha * mixture.means.double()) ** 2).sum(1) / (2 * total))
        posterior = mixture.means + alpha * mixture.std**2 / total * (row - alpha * mixture.means)
        expected.append((weights[:, None] * posterior).sum(0) / weights.sum())
    for noise_level in (torch.tensor(logsnr), torch.full((5,), logsnr)):
        found = mixture.denoise(x, noise_level).flatten(1)
        assert torch.allclose(found.double(), torch.stack(expected), atol=1e-5)


def test_family_halves_its_error_at_2_to_gamma_times_the_cost() -> None:
    levels = analytic_family(levels=4, gamma=3.0)
    check_family(levels)
    assert levels[1].flops / levels[0].flops == pytest.approx(8)
    exact = GaussianMixture(16)
    x, logsnr = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor(0.0)
    errors = [((level.denoise(x, logsnr) - exact.denoise(x, logsnr)) ** 2).mean().sqrt() for level in levels]
    for a, b in pairwise(errors):
        assert float(a / b) == pytest.approx(2, rel=0.25)  # each field's own mean square varies
    squares = [(smooth_field(16, seed)(x.flatten(1), torch.zeros(2000)) ** 2).mean() for seed in range(20)]
    assert abs(torch.stack(squares).mean() - 1) < 0.2
    with pytest.raises(UserError):
        analytic_family(levels=0)
