"""Learned probabilities: the gradient against exact enumeration, memory, cost, and the benefit of learning."""

from __future__ import annotations

import gc
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import grid_of, nonlinear_denoise, process, toy_family

from mlem_diffusion.diffusion.estimator import SingleLevel
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import expand
from mlem_diffusion.diffusion.sampler import combine, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import Multilevel
from mlem_diffusion.multilevel.learned import (
    LogOdds,
    Networks,
    _Randomness,
    follow_coins,
    gradient_estimate,
    learn_probabilities,
)
from mlem_diffusion.multilevel.probabilities import constant_probabilities

SHAPE, CPU = (2, 3, 3), torch.device("cpu")
FLOPS = [1.0, 4.0, 16.0]


def toy_p(n: int) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.stack([np.ones(n), 0.6 - 0.2 * t, 0.2 + 0.3 * t], axis=1)


class Enumerated:
    """The exact E[L] over all coins of a short run with given starts and noise, differentiable in p [n, K]."""

    def __init__(self, dynamics: str, rule: str, n: int, paths: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.program = STEP_RULES[dynamics, rule].program(grid_of(np.linspace(-3, 3, n)))
        self.x = torch.randn(paths, *SHAPE, generator=generator, dtype=torch.float64)
        self.z = torch.randn(n, paths, *SHAPE, generator=generator, dtype=torch.float64)
        self.family = toy_family()

    def run(self, weights: Tensor) -> Tensor:
        """The final images for weights [n, K], which are the same for all paths."""
        state: list[Tensor | None] = [self.x] + [None] * (len(self.program[0].update) - 1)
        for j, e in enumerate(self.program):
            x, noise_level = state[0], torch.full((len(self.x),), e.logsnr)
            assert x is not None
            estimate = sum(
                (w * level.denoise(x, noise_level) for w, level in zip(weights[j], self.family, strict=True))
            )
            z = None if e.noise is None else self.z[j]
            state = [combine(row, [*state, estimate, z]) for row in e.update]  # type: ignore[list-item]
        assert state[0] is not None
        return state[0]

    def loss(self, p: Tensor) -> Tensor:
        """E[L] of each path."""
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
        """d mean(E[L]) / dp [n, K]; the column of the first level has no meaning."""
        leaf = torch.tensor(p, requires_grad=True)
        return torch.autograd.grad(self.loss(leaf).mean(), leaf)[0].numpy()


def outcomes(n: int, levels: int) -> list[np.ndarray]:
    coins = [np.array(c).reshape(n, levels - 1) for c in product([False, True], repeat=n * (levels - 1))]
    return [np.concatenate([np.ones((n, 1), dtype=bool), c], axis=1) for c in coins]


@pytest.mark.parametrize(("dynamics", "rule"), [("ode", "ddim"), ("sde", "ddpm"), ("sde", "dpmpp_2m")])
def test_one_coin_at_a_time_gives_the_exact_gradient(dynamics: str, rule: str) -> None:
    """-E[D_c] equals dE[L]/dp_c to 1e-6 for each of 6 coins, in float64 along 3 paths.

    E averages over every outcome of the other coins with its exact probability. Also p l(1/p) + (1 - p) l(0) averages
    to E[L].
    """
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
        # probabilities of the other coins' outcomes; each occurs twice, once per value of the followed coin
        other = chance / np.where(table[:, step, level], p[step, level], 1 - p[step, level]) / 2
        means = [np.tile(other, 3) @ values / 3 for values in (out.divergence, out.fired, out.unfired)]
        assert -means[0] == pytest.approx(expected[step, level], rel=1e-6)
        assert p[step, level] * means[1] + (1 - p[step, level]) * means[2] == pytest.approx(loss, rel=1e-6)


def test_batches_of_random_coins_estimate_the_gradient_and_the_loss() -> None:
    """The mean of 120 independent batches is within 4.5 standard errors of the enumerated gradient and loss.

    The gradient is by the log-odds at all 4 knots. The enumeration averages 400 other paths; the tolerance includes
    their error (2%).
    """
    exact = Enumerated("sde", "ddpm", 3, paths=400)
    odds = LogOdds([e.logsnr for e in exact.program], FLOPS, knots=2, p_min=1e-3)
    phi = odds.fit(toy_p(3))
    p = odds.table(phi)
    expected = (exact.gradient(p)[:, 1:] * odds.slope(phi)).T @ odds.hats
    networks = Networks(exact.family, SHAPE, CPU)
    batches = [
        gradient_estimate(networks, exact.program, odds, phi, _Randomness(i, SHAPE, CPU), 4, 8) for i in range(120)
    ]
    found = np.array([b.gradient for b in batches])
    se = found.std(axis=0, ddof=1) / 120**0.5
    assert np.all(se < 0.08 * np.abs(expected))
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4.5 * np.hypot(se, 0.02 * np.abs(expected)))
    losses = np.array([b.loss for b in batches])
    loss = float(exact.loss(torch.tensor(p)).mean())
    assert abs(losses.mean() - loss) < 4.5 * np.hypot(losses.std(ddof=1) / 120**0.5, 0.02 * loss)
    # the stated standard error is that of a batch
    assert np.mean([b.loss_se**2 for b in batches]) ** 0.5 == pytest.approx(losses.std(ddof=1), rel=0.25)


def test_finite_differences_replace_a_missing_forward_mode() -> None:
    """Levels that leave torch or run under inference mode are detected; derivatives agree with forward mode to 1e-3."""

    def through_numpy(x: Tensor, logsnr: Tensor) -> Tensor:
        return torch.as_tensor(nonlinear_denoise(x.detach(), logsnr, 0.8).numpy())

    @torch.inference_mode()
    def inference(x: Tensor, logsnr: Tensor) -> Tensor:
        return nonlinear_denoise(x, logsnr, 0.8)

    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 5, *SHAPE, generator=generator)
    weights = np.tile([-0.5, 1.5], (5, 1))
    rest = (Level("b", lambda x, s: nonlinear_denoise(x, s, 1.0), 4.0),)
    forward = Networks((Level("a", lambda x, s: nonlinear_denoise(x, s, 0.8), 1.0), *rest), SHAPE, CPU)
    assert forward.forward_mode
    value, derivative = forward.derivative(weights, x, v, 0.5)
    for denoise in (through_numpy, inference):
        other = Networks((Level("a", denoise, 1.0), *rest), SHAPE, CPU)
        assert not other.forward_mode
        value_2, derivative_2 = other.derivative(weights, x, v, 0.5)
        assert torch.allclose(value_2, value)
        assert float((derivative_2 - derivative).norm() / derivative.norm()) < 1e-3
        assert forward.flops == 2 * 5 * 5 and other.flops == 3 * 5 * 5


def uneven_family() -> tuple[Level, ...]:
    """Level differences of size 0.4 and 0.1 around log-SNR 1, and 30 times smaller elsewhere."""

    def make(k: int) -> Level:
        def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
            size = 0.03 + torch.exp(-((expand(logsnr, x) - 1) ** 2))
            return nonlinear_denoise(x, logsnr, 0.7) + 0.4 * 4.0**-k * size * torch.sin(3 * x + k)

        return Level(f"u{k}", denoise, 6.0**k)

    return tuple(make(k) for k in range(3))


def test_learned_probabilities_beat_constant_ones_at_the_same_cost() -> None:
    """On gains that vary strongly in time, the learned probabilities have less than 0.8 of the constant ones' error.

    On 1000 other seeds the paired difference exceeds 4 standard errors. The expected cost agrees to 0.1% at every
    iteration. Learning again from the same seed gives the same probabilities.
    """
    family, grid, n = uneven_family(), process(spacing="logsnr").grid(16), 16
    constant = constant_probabilities([f.flops for f in family], 2.5, 2.0)
    budget = Multilevel(family, constant).expected_flops(n)
    seen: list[tuple[int, int]] = []

    def learn(iterations: int) -> np.ndarray:
        learned = learn_probabilities(
            family,
            grid,
            "sde",
            "ddpm",
            SHAPE,
            expected_flops=budget,
            start=constant,
            iterations=iterations,
            paths=4,
            knots=7,
            progress=lambda *at: seen.append(at),
        )
        assert learned.p.shape == (n, 3) and np.all(learned.p[:, 0] == 1)
        assert learned.cost == pytest.approx(np.full(iterations, budget), rel=1e-3)
        assert len(learned.loss) == len(learned.loss_se) == iterations and learned.flops > 0
        return learned.p

    # other units change the costs and nothing else: a thousandth of the FLOPs
    in_kiloflops = learn_probabilities(
        family, grid, "sde", "ddpm", SHAPE, expected_flops=1e-3 * budget, start=constant, iterations=2, paths=4,
        knots=7, costs=[1e-3 * f.flops for f in family],
    )  # fmt: skip
    assert np.allclose(in_kiloflops.p, learn(2), rtol=1e-6) and in_kiloflops.cost == pytest.approx(1e-3 * budget)
    seen.clear()

    p = learn(25)
    assert seen == [(i + 1, 25) for i in range(25)]
    assert np.array_equal(learn(2), learn(2))
    assert Multilevel(family, p).expected_flops(n) == pytest.approx(budget, rel=1e-3)

    seeds = range(10_000, 11_000)
    reference, _ = sample(SingleLevel(family[-1]), grid, "sde", "ddpm", seeds, SHAPE)
    errors = []
    for table in (constant, p):
        images, _ = sample(Multilevel(family, table), grid, "sde", "ddpm", seeds, SHAPE)
        errors.append((images - reference).square().flatten(1).mean(1).numpy())
    gain = errors[0] - errors[1]
    assert errors[1].mean() < 0.8 * errors[0].mean()
    assert gain.mean() > 4 * gain.std(ddof=1) / len(gain) ** 0.5


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """The peak bytes of live tensors for 256 steps are less than 1.2 times those for 16 steps.

    The peak is taken over about 16 network calls along a run. A stored trajectory would need 16 times the bytes.
    """

    def peak(steps: int) -> int:
        most, calls = 0, 0

        def watch(x: Tensor, logsnr: Tensor) -> Tensor:
            nonlocal most, calls
            calls += 1
            if calls % (steps // 8) == 0:
                alive = {t.data_ptr(): t.numel() * t.element_size() for t in gc.get_objects() if type(t) is Tensor}
                most = max(most, sum(alive.values()))
            return nonlinear_denoise(x, logsnr)

        family = (*toy_family(2), Level("top", watch, 16.0))
        gc.collect()
        learn_probabilities(
            family,
            process(256).grid(steps),
            "sde",
            "ddpm",
            (3, 8, 8),
            expected_flops=4.0 * steps,
            start=np.array([1.0, 0.3, 0.1]),
            iterations=1,
            paths=2,
            draws=8,
        )
        return most

    first, second = peak(16), peak(256)
    assert first > 4 * 16 * 3 * 8 * 8 * 4  # four images in each of 16 rows: the counter works
    assert second < 1.2 * first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected_flops": 1.0}, "FLOPs per image"),
        ({"expected_flops": 1e9}, "FLOPs per image"),
        ({"start": np.array([1.0, 0.5])}, "start from"),
        ({"start": np.array([1.0, 0.5, 0.0])}, "start from"),
        ({"knots": 1}, "knots"),
    ],
)
def test_bad_input_gives_one_sentence(change: dict, message: str) -> None:
    settings = {"expected_flops": 40.0, "start": np.array([1.0, 0.3, 0.1]), "iterations": 1} | change
    with pytest.raises(UserError, match=message):
        learn_probabilities(toy_family(), process().grid(8), "sde", "ddpm", SHAPE, **settings)
    with pytest.raises(UserError, match="two levels"):
        learn_probabilities(
            toy_family(1), process().grid(8), "sde", "ddpm", SHAPE, expected_flops=8.0, start=np.ones(1)
        )
