"""Gains: the adjoint sweep against forward derivatives, perturbations and real changes of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.multilevel.gains import Effects, forward_gains, measure_effects

SHAPE, PROCESS, FAMILY = (1, 4, 4), Process(LinearSchedule(), base_steps=257), analytic_family(levels=3)
RULES = sorted(STEP_RULES)


def effects(
    steps: int = 9, rule: tuple[str, str] = ("sde", "ddpm"), seeds: range = range(6), probes: int = 2
) -> Effects:
    return measure_effects(FAMILY, PROCESS.grid(steps), *rule, seeds, SHAPE, probes=probes, batch=4)


@pytest.mark.parametrize("rule", RULES)
def test_adjoint_agrees_with_forward_derivatives(rule: tuple[str, str]) -> None:
    """For few seeds, the mean over 400 directions is within 5 of its standard errors, for all pairs."""
    measured = effects(7, rule, range(3), probes=400).values.astype(np.float64) ** 2
    at = [(k, j) for k in range(3) for j in (0, 3, measured.shape[-1] - 1)]
    exact = forward_gains(FAMILY, PROCESS.grid(7), *rule, range(3), SHAPE, at)
    for column, (k, j) in enumerate(at):
        per_direction = measured[:, :, k, j]
        error = per_direction.std(axis=1) / 20
        assert np.all(np.abs(per_direction.mean(axis=1) - exact[:, column]) < 5 * error + 1e-7 * exact[:, column])


@pytest.mark.parametrize("rule", RULES)
def test_small_perturbations_agree_with_derivatives(rule: tuple[str, str]) -> None:
    """Agreement to 3%, because the differences of images are in float32."""
    at = [(0, 2), (1, 4), (2, 6)]
    exact = forward_gains(FAMILY, PROCESS.grid(7), *rule, range(3), SHAPE, at)
    found = forward_gains(FAMILY, PROCESS.grid(7), *rule, range(3), SHAPE, at, method="perturbation", size=0.02)
    assert np.allclose(found, exact, rtol=0.03)


@pytest.mark.parametrize("rule", RULES)
def test_the_summed_effects_predict_the_change_by_a_smaller_level(rule: tuple[str, str]) -> None:
    """For close levels f^2 and f^3, the images' mean squared difference over 64 seeds agrees to 25%.

    The 25% cover the sampling error and the terms of second order.
    """
    family, seeds, grid = analytic_family(levels=3, amplitude=0.02), range(64), PROCESS.grid(17)
    predicted = (measure_effects(family, grid, *rule, seeds, SHAPE, probes=4).difference(1, 2).sum(axis=1) ** 2).mean()
    images = [sample(SingleLevel(level), grid, *rule, seeds, SHAPE)[0] for level in family]
    assert predicted == pytest.approx(float(((images[2] - images[1]) ** 2).mean()), rel=0.25)


def test_levels_merge_and_seeds_do_not_depend_on_the_batch() -> None:
    one, other = effects(), measure_effects(FAMILY, PROCESS.grid(9), "sde", "ddpm", range(6), SHAPE, batch=6)
    assert np.allclose(one.values, other.values, rtol=1e-4, atol=1e-7)
    assert np.allclose(one.difference(-1, 0) + one.difference(0, 2), one.difference(-1, 2), rtol=1e-6)
    gains, error = one.gains()
    assert gains.shape == error.shape == (3, 9) and np.all(gains[1:, 1:-1] > 0)


def test_effects_transfer_to_other_grids() -> None:
    """From 33 to 65 points, the summed effect of a difference agrees to 15%, each gain to 30% of the largest."""
    coarse, fine = (effects(steps, seeds=range(24), probes=4) for steps in (33, 65))
    moved = coarse.on(fine.logsnr)
    for k in (1, 2):
        sums = [np.sqrt((e.difference(k - 1, k).sum(axis=1) ** 2).mean()) for e in (moved, fine)]
        assert sums[0] == pytest.approx(sums[1], rel=0.15)
        a, b = moved.gains()[0][k], fine.gains()[0][k]
        assert np.abs(a - b).max() < 0.3 * b.max()
    with pytest.raises(UserError):
        effects(9, ("ode", "heun")).on(fine.logsnr)


def test_effects_round_trip_through_files(tmp_path: Path) -> None:
    one = effects()
    one.save(tmp_path / "effects.npz")
    again = Effects.load(tmp_path / "effects.npz")
    assert again.names == one.names and again.flops_spent == one.flops_spent
    assert np.array_equal(again.values, one.values) and np.array_equal(again.squares, one.squares)


def test_a_level_without_derivatives_is_refused() -> None:
    dead = Level("dead", torch.no_grad()(FAMILY[0].denoise), 1.0)
    with pytest.raises(UserError, match="differentiated"):
        measure_effects([dead], PROCESS.grid(5), "ode", "ddim", range(2), SHAPE)
    with pytest.raises(UserError, match="method"):
        forward_gains(FAMILY, PROCESS.grid(5), "ode", "ddim", range(2), SHAPE, [(0, 0)], method="guess")
