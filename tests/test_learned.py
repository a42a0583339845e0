"""Learned probabilities: the gradient against exact enumeration, memory, cost, and whether learning helps."""

from __future__ import annotations

import gc
from itertools import product

import numpy as np
import pytest
import torch
from toys import grid_of, nonlinear_denoise, process, toy_family
from torch import Tensor

from mlem_diffusion.drift import Multilevel, SingleLevel
from mlem_diffusion.errors import UserError
from mlem_diffusion.learned import LogOdds, Networks, _Randomness, follow_coins, gradient_estimate, learn_probabilities
from mlem_diffusion.levels import Level
from mlem_diffusion.probabilities import constant_probabilities, telescope_weights
from mlem_diffusion.process import expand
from mlem_diffusion.samplers import combine, sample
from mlem_diffusion.step_rules import STEP_RULES

SHAPE, CPU = (2, 3, 3), torch.device("cpu")
FLOPS = [1.0, 4.0, 16.0]


def toy_p(n: int) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.stack([np.ones(n), 0.6 - 0.2 * t, 0.2 + 0.3 * t], axis=1)


class Enumerated:
    """E[L] over all coins of a short run, exactly, as a differentiable function of p [n, K], for given starts and noise."""

    def __init__(self, dynamics: str, rule: str, n: int, paths: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.program = STEP_RULES[dynamics, rule].program(grid_of(np.linspace(-3, 3, n)))
        self.x = torch.randn(paths, *SHAPE, generator=generator, dtype=torch.float64)
        self.z = torch.randn(n, paths, *SHAPE, generator=generator, dtype=torch.float64)
        self.family = toy_family()

    def run(self, weights: Tensor) -> Tensor:
        """Final images for weights [n, K], the same for all paths."""
        state: list[Tensor | None] = [self.x] + [None] * (len(self.program[0].update) - 1)
        for j, e in enumerate(self.program):
            x, noise_level = state[0], torch.full((len(self.x),), e.logsnr)
            assert x is not None
            estimate = sum((w * level.denoise(x, noise_level) for w, level in zip(weights[j], self.family, strict=True)))
            z = None if e.noise is None else self.z[j]
            state = [combine(row, [*state, estimate, z]) for row in e.update]  # type: ignore[list-item]
        assert state[0] is not None
        return state[0]

    def loss(self, p: Tensor) -> Tensor:
        """[paths]"""
        n, levels = p.shape
        reference, total = self.run(torch.eye(levels)[-1:].expand(n, levels)), torch.zeros(len(self.x))
        for coins in outcomes(n, levels):
            fired = torch.as_tensor(coins)
            chance = torch.where(fired, p, 1 - p)[:, 1:].prod()
            ratio = fired / p
            weights = ratio - torch.cat([ratio[:, 1:], torch.zeros(n, 1)], dim=1)
            total = total + chance * (self.run(weights) - reference).square().flatten(1).mean(1)
        return total

    def gradient(self, p: np.ndarray) -> np.ndarray:
        """d mean(E[L]) / dp [n, K]; the column of the first level means nothing."""
        leaf = torch.tensor(p, requires_grad=True)
        return torch.autograd.grad(self.loss(leaf).mean(), leaf)[0].numpy()


def outcomes(n: int, levels: int) -> list[np.ndarray]:
    coins = [np.array(c).reshape(n, levels - 1) for c in product([False, True], repeat=n * (levels - 1))]
    return [np.concatenate([np.ones((n, 1), dtype=bool), c], axis=1) for c in coins]


@pytest.mark.parametrize(("dynamics", "rule"), [("ode", "ddim"), ("sde", "ddpm"), ("sde", "dpmpp_2m")])
def test_one_coin_at_a_time_gives_the_exact_gradient(dynamics: str, rule: str) -> None:
    """-E[D_c], averaged over every outcome of the other coins with its exact chance, is dE[L]/dp_c to 1e-6 for each of 6
    coins, and p l(1/p) + (1 - p) l(0) averages to E[L]; in float64, along 3 paths."""
    n, exact = 3, Enumerated(dynamics, rule, 3, paths=3)
    p = toy_p(n)
    networks = Networks(exact.family, SHAPE, CPU)
    assert networks.forward_mode
    table = np.stack(outcomes(n, 3))  # [64, n, K]
    chance = np.where(table, p, 1 - p)[..., 1:].reshape(len(table), -1).prod(axis=1)
    expected, loss = exact.gradient(p), float(exact.loss(torch.tensor(p)).mean())
    for step, level in product(range(n), (1, 2)):
        rows = np.full(3 * len(table), step), np.full(3 * len(table), level)
        out = follow_coins(
            networks, exact.program, p, *rows, exact.x, lambda j: exact.z[j], lambda j: np.tile(table[:, j], (3, 1))
        )
        # chances of the other coins: each outcome of theirs is met twice, with the followed coin either way
        other = chance / np.where(table[:, step, level], p[step, level], 1 - p[step, level]) / 2
        means = [np.tile(other, 3) @ values / 3 for values in (out.divergence, out.fired, out.unfired)]
        assert -means[0] == pytest.approx(expected[step, level], rel=1e-6)
        assert p[step, level] * means[1] + (1 - p[step, level]) * means[2] == pytest.approx(loss, rel=1e-6)
