"""Learned probabilities: the gradient against exact enumeration, memory, cost, and the benefit of learning."""

import gc
from itertools import count, product

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import grid_of, nonlinear_denoise, probabilities, process, toy_family

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import expand
from mlem_diffusion.diffusion.sampler import SingleLevel, advance, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.multilevel.estimators import Multilevel, constant_probabilities
from mlem_diffusion.multilevel.learned import LogOdds, Networks, follow_coins, gradient_estimate, learn_probabilities

SHAPE, CPU, FLOPS, DDPM = (2, 3, 3), torch.device("cpu"), np.array([1.0, 4.0, 16.0]), STEP_RULES["sde/ddpm"]


def outcomes(n: int, levels: int) -> list[np.ndarray]:
    coins = [np.array(c).reshape(n, levels - 1) for c in product([False, True], repeat=n * (levels - 1))]
    return [np.concatenate([np.ones((n, 1), dtype=bool), c], axis=1) for c in coins]


class Enumerated:
    """The exact E[L] over all coins of a short run with given starts and noise, differentiable in p [n, K]."""

    def __init__(self, key: str, n: int, paths: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.program = STEP_RULES[key].program(grid_of(np.linspace(-3, 3, n)))
        self.x = torch.randn(paths, *SHAPE, generator=generator, dtype=torch.float64)
        self.z = torch.randn(n, paths, *SHAPE, generator=generator, dtype=torch.float64)
        self.family = toy_family()
        self.networks = Networks(self.family, self.program, SHAPE, CPU)

    def run(self, weights: Tensor) -> Tensor:
        """The final images for weights [n, K], which are the same for all paths."""
        state: list[Tensor | None] = [self.x] + [None] * (len(self.program[0].update) - 1)
        for j, e in enumerate(self.program):
            x, u = state[0], torch.tensor(e.logsnr)
            estimate = sum(w * level.denoise(x, u) for w, level in zip(weights[j], self.family, strict=True))
            state = advance(e, state, estimate, None if e.noise is None else self.z[j])
        assert state[0] is not None
        return state[0]

    def loss(self, p: Tensor) -> Tensor:
        """E[L] of each path."""
        n, levels = p.shape
        reference, total = self.run(torch.eye(levels)[-1:].expand(n, levels)), torch.zeros(len(self.x))
        for coins in outcomes(n, levels):
            fired = torch.as_tensor(coins)
            chance, ratio = torch.where(fired, p, 1 - p)[:, 1:].prod(), fired / p
            weights = ratio - torch.cat([ratio[:, 1:], torch.zeros(n, 1)], dim=1)
            total = total + chance * (self.run(weights) - reference).square().flatten(1).mean(1)
        return total

    def gradient(self, p: np.ndarray) -> np.ndarray:
        """d mean(E[L]) / dp [n, K]; the column of the first level has no meaning."""
        leaf = torch.tensor(p, requires_grad=True)
        return torch.autograd.grad(self.loss(leaf).mean(), leaf)[0].numpy()


@pytest.mark.parametrize("key", ["ode/ddim", "sde/ddpm", "sde/dpmpp_2m"])
def test_one_coin_at_a_time_gives_the_exact_gradient(key: str) -> None:
    """-E[D_c] equals dE[L]/dp_c to 1e-6 for each of 6 coins, in float64 along 2 paths.
    E averages over every outcome of the other coins with its exact probability."""
    n, paths, exact = 3, 2, Enumerated(key, 3, paths=2)
    p, table = probabilities(n), np.stack(outcomes(n, 3))  # [64, n, K]
    chance = np.where(table, p, 1 - p)[..., 1:].reshape(len(table), -1).prod(axis=1)
    expected = exact.gradient(p)
    for step, level in product(range(n), (1, 2)):
        rows = np.full(paths * len(table), step), np.full(paths * len(table), level)
        divergence = follow_coins(
            exact.networks, p, *rows, exact.x, lambda j: exact.z[j], lambda j: np.tile(table[:, j], (paths, 1))
        )
        # probabilities of the other coins' outcomes; each occurs twice, once per value of the followed coin
        other = chance / np.where(table[:, step, level], p[step, level], 1 - p[step, level]) / 2
        assert -np.tile(other, paths) @ divergence / paths == pytest.approx(expected[step, level], rel=1e-6)


def test_batches_of_random_coins_estimate_the_gradient() -> None:
    """The mean of 40 independent batches is within 4.5 standard errors of the enumerated gradient at all 4 knots.
    The enumeration averages 400 other paths; the tolerance includes their error (2%)."""
    exact = Enumerated("sde/ddpm", 3, paths=400)
    odds = LogOdds([e.logsnr for e in exact.program], FLOPS, knots=2)
    phi = odds.fit(probabilities(3))
    expected = (exact.gradient(odds.table(phi))[:, 1:] * odds.slope(phi)).T @ odds.hats
    found = np.array([gradient_estimate(exact.networks, odds, phi, seed, 12, 8) for seed in range(40)])
    se = found.std(axis=0, ddof=1) / 40**0.5
    assert np.all(se < 0.08 * np.abs(expected))
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4.5 * np.hypot(se, 0.02 * np.abs(expected)))


def uneven(k: int) -> Level:
    """Levels with differences of size 0.4 and 0.1 around log-SNR 1, and 30 times smaller elsewhere."""

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        size = 0.03 + torch.exp(-((expand(logsnr, x) - 1) ** 2))
        return nonlinear_denoise(x, logsnr, 0.7) + 0.4 * 4.0**-k * size * torch.sin(3 * x + k)

    return Level(f"u{k}", denoise, 6.0**k)


def test_learned_probabilities_beat_constant_ones_at_the_same_cost() -> None:
    """On gains that vary strongly in time, the learned probabilities have less than 0.8 of the constant ones' error.
    On 400 other seeds the paired difference exceeds 4 standard errors. The expected cost agrees to 0.1%. Learning again
    gives the same probabilities, and so do other units of cost."""
    family, grid, n = tuple(map(uneven, range(3))), process(spacing="logsnr").grid(12), 12
    costs = np.array([f.flops for f in family])
    constant = constant_probabilities(costs, 2.5, 2.0)
    budget = Multilevel(family, constant).expected_flops(n)

    def learn(iterations: int, unit: float = 1.0, paths: int = 4) -> np.ndarray:
        p, flops = learn_probabilities(
            family, DDPM, grid, SHAPE, CPU, costs=unit * costs, wanted=unit * budget, start=constant,
            iterations=iterations, paths=paths, draws=16,
        )  # fmt: skip
        assert p.shape == (n, 3) and np.all(p[:, 0] == 1) and flops > 0
        assert Multilevel(family, p).expected_flops(n) == pytest.approx(budget, rel=1e-3)
        return p

    p, again = learn(8), learn(1, paths=1)
    assert np.array_equal(learn(1, paths=1), again) and np.allclose(learn(1, 1e-3, paths=1), again, rtol=1e-6)
    path = BrownianPath(range(10_000, 10_400), SHAPE)
    reference, _ = sample(SingleLevel(family[-1]), DDPM, grid, path)
    errors = []
    for table in (constant, p):
        images, _ = sample(Multilevel(family, table), DDPM, grid, path)
        errors.append((images - reference).square().flatten(1).mean(1).numpy())
    gain = errors[0] - errors[1]
    assert errors[1].mean() < 0.8 * errors[0].mean()
    assert gain.mean() > 4 * gain.std(ddof=1) / len(gain) ** 0.5


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """The peak bytes of live tensors for 32 steps are less than 1.2 times those for 8 steps.
    The peak is taken over about 4 network calls along a run. A stored trajectory would need 4 times the bytes."""

    def peak(steps: int) -> int:
        sizes, calls = [0], count()

        def watch(x: Tensor, logsnr: Tensor) -> Tensor:
            if next(calls) % (steps // 2) == 1:
                sizes.append(sum({t.data_ptr(): t.nbytes for t in gc.get_objects() if type(t) is Tensor}.values()))
            return nonlinear_denoise(x, logsnr)

        family = (*toy_family(2), Level("top", watch, 16.0))
        gc.collect()
        learn_probabilities(
            family, DDPM, process(256).grid(steps), (3, 8, 8), CPU, costs=FLOPS, wanted=4.0 * steps,
            start=np.array([1.0, 0.3, 0.1]), iterations=1, paths=2, draws=8,
        )  # fmt: skip
        return max(sizes)

    first, second = peak(8), peak(32)
    assert first > 4 * 16 * 3 * 8 * 8 * 4  # four images in each of 16 rows: the counter works
    assert second < 1.2 * first


@pytest.mark.parametrize(("change", "message"), [
    ({"wanted": 1.0}, "per image, not 1"), ({"wanted": 1e9}, r"per image, not 1e\+09"),
    ({"family": (*toy_family(2), Level("dead", lambda x, u: x.detach(), 16.0))}, "dead has no forward"),
])  # fmt: skip
def test_bad_input_gives_one_sentence(change: dict, message: str) -> None:
    options = {"family": toy_family(), "wanted": 40.0, "start": np.array([1.0, 0.3, 0.1]), "costs": FLOPS}
    options |= {"rule": DDPM, "grid": process().grid(8), "shape": SHAPE, "device": CPU}
    with pytest.raises(UserError, match=message):
        learn_probabilities(iterations=1, paths=2, draws=8, **(options | change))
