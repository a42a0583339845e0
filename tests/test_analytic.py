"""The analytic family: its posterior mean is exact, and its levels have the stated errors and costs."""

from itertools import pairwise

import pytest
import torch

from mlem_diffusion.diffusion.level import check_family
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import GaussianMixture, analytic_family, smooth_field


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
