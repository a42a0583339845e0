from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toys import SHAPE, gaussian_level, nonlinear_denoise, process, toy_family

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.diagnostics import plot_diagnostics
from mlem_diffusion.multilevel.diagnostics import Diagnostics, diagnose, table
from mlem_diffusion.multilevel.findings import best_chain, judge
from mlem_diffusion.multilevel.level_checks import check_contract, check_telescope
from mlem_diffusion.multilevel.level_statistics import LevelStatistics, kurtosis


def run(family: Sequence[Level], **changes) -> Diagnostics:
    options = {"dynamics": "sde", "step_rule": "ddpm", "seeds": range(12), "shape": SHAPE, "steps": 8} | changes
    return diagnose(family, process(), **options)


def statistics(
    pooled: Sequence[float], flops: Sequence[float], samples: int = 40, spread_of: float = 0.05, **changes
) -> LevelStatistics:
    """A family of independent differences with these mean squares, equal at 6 noise levels, 5% noise over samples."""
    k, s = len(flops), 6
    noise = 1 + 0.05 * np.random.default_rng(0).standard_normal((k, samples, s))
    square = np.array(pooled)[:, None, None] * noise
    pairs = np.zeros((k + 1, k, samples, s))
    for low in range(k):
        for high in range(low, k):
            pairs[low, high] = square[low : high + 1].sum(0)
    made = LevelStatistics(
        names=[f"n{i}" for i in range(k)],
        flops=np.array(flops, dtype=float),
        seconds=np.array(flops, dtype=float),
        logsnr=np.linspace(-9, 9, s),
        weights=np.full(s, 1 / s),
        pairs=pairs,
        signed=np.zeros((k, samples, s)),
        spread=square.mean(1),
        top_spread=np.full(s, 1.0),
    )
    return replace(made, **changes)


def texts(s: LevelStatistics, severity: str = "warning") -> list[str]:
    return [finding.text for finding in judge(s) if finding.severity == severity]


def errors(found: Diagnostics) -> list[str]:
    return [finding.text for finding in found.findings if finding.severity == "error"]


# ------------------------------------------------------------------------------------------------- statistics


def test_differences_of_linear_levels_are_exact() -> None:
    """For f^k = c_k x every statistic follows from the states x of the largest level's sampler."""
    scales = [0.5, 0.7, 0.8]
    family = [Level(f"l{i}", lambda x, u, c=c: c * x, 4.0**i) for i, c in enumerate(scales)]
    s = run(family).statistics
    assert s is not None
    x2 = s.square[0] / 0.25
    np.testing.assert_allclose(s.square[1], 0.2**2 * x2, rtol=1e-5)
    np.testing.assert_allclose(s.square[2], 0.1**2 * x2, rtol=1e-4)
    np.testing.assert_allclose(s.pairs[1, 2], 0.3**2 * x2, rtol=1e-5)
    np.testing.assert_allclose(s.signed[1], 0.4 * s.signed[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(s.top_spread, s.spread[0] * (0.8 / 0.5) ** 2, rtol=1e-5)
    assert np.all(s.spread[0] <= s.mean_square[0] * 12 / 11 + 1e-12)
    np.testing.assert_allclose(s.firing_costs, [1, 4, 16 + 4])


def test_states_are_those_of_the_largest_level_alone() -> None:
    """At the last noise level the largest level's output is the finished image."""
    from mlem_diffusion.diffusion.estimator import SingleLevel
    from mlem_diffusion.diffusion.sampler import sample

    family = toy_family()
    for rule in (("ode", "heun"), ("sde", "ddpm")):
        found = run(family, dynamics=rule[0], step_rule=rule[1])
        images, _ = sample(SingleLevel(family[-1]), process().grid(8), *rule, range(12), SHAPE)
        assert found.statistics is not None
        np.testing.assert_allclose(found.statistics.pairs[0, -1, :, -1], images.square().flatten(1).mean(1), rtol=1e-5)
        assert len(found.statistics.logsnr) == 8


def test_batches_do_not_matter_and_cost_is_counted() -> None:
    whole, parts = run(toy_family(), batch=12), run(toy_family(), batch=5)
    assert whole.statistics is not None and parts.statistics is not None
    np.testing.assert_allclose(whole.statistics.pairs, parts.statistics.pairs, rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose(whole.statistics.spread, parts.statistics.spread, rtol=1e-4, atol=1e-10)
    assert whole.flops_spent == parts.flops_spent == 12 * 8 * (1 + 4 + 16)
    assert run(toy_family(), dynamics="ode", step_rule="heun").flops_spent == 12 * (8 * 21 + 7 * 16)


def test_kurtosis_is_that_of_random_projections() -> None:
    rng = np.random.default_rng(0)
    size = rng.choice([0.1, 2.0], 400, p=[0.95, 0.05])
    y = size[:, None] * rng.standard_normal((400, 2000))
    projected = y @ rng.standard_normal((2000, 4000))
    direct = (projected**4).mean() / (projected**2).mean() ** 2
    ours = float(kurtosis((y**2).mean(1)[None])[0])
    assert ours == pytest.approx(direct, rel=0.05)
    assert float(kurtosis(np.ones((1, 9)))[0]) == 3


def test_firings_and_evaluations_with_given_probabilities() -> None:
    p = np.array([1.0, 0.5, 0.25])
    found = run(toy_family(), p=p)
    assert found.firings == pytest.approx([8, 4, 2])
    assert found.evaluations == pytest.approx([8, 8 * (0.75 - 0.125), 2])
    assert run(toy_family(), p=np.broadcast_to(p, (20, 3))).firings == pytest.approx([20, 10, 5])
    assert run(toy_family()).firings is None


# ------------------------------------------------------------------------------------------- contract, telescope


def test_a_sound_family_passes() -> None:
    found = run(toy_family())
    assert not found.failed and found.telescope is not None and found.telescope.holds
    assert max(abs(z) for z in found.telescope.bias_z) < 4 and found.telescope.gather < 1e-6
    assert any(finding.severity == "ok" and "telescope holds" in finding.text for finding in found.findings)


def test_identical_levels_pass_the_check() -> None:
    family = [gaussian_level(0.5, 1.0), Level("same", gaussian_level(0.5).denoise, 4.0)]
    found = run(family)
    assert not found.failed
    assert any("same output" in finding.text for finding in found.findings)


def test_two_equal_coins_raise_no_false_alarm() -> None:
    """With two levels and p = 1/2 the squared deviation is constant, up to rounding."""
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert check_telescope(toy_family(2), x, 0.0).holds


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Dropout(0.1)

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        return self.layer(nonlinear_denoise(x, logsnr))


def nan_at_the_clean_end(x: Tensor, logsnr: Tensor) -> Tensor:
    return nonlinear_denoise(x, logsnr) * torch.where(logsnr < 5, 1.0, float("nan"))[:, None, None, None]


def in_place(x: Tensor, logsnr: Tensor) -> Tensor:
    return x.mul_(0.5)


BROKEN = {
    "eval mode": Dropping().train(),
    "keep their shape": lambda x, u: x[:, :1],
    "not torch.float32": lambda x, u: x.double(),
    "not finite at log-SNR -9.0": lambda x, u: x * float("nan"),
    "copy": in_place,
    "another batch": lambda x, u: x - x.mean(0),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_contracts_are_named(message: str) -> None:
    found = run([toy_family()[0], Level("mine", BROKEN[message], 4.0)])
    assert found.failed and found.statistics is None
    assert len(errors(found)) == 1 and message in errors(found)[0] and "mine" in errors(found)[0]
    assert "error" in table(found)
    json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(UserError, match="mine"):
        plot_diagnostics(found, Path("never.png"))


def test_values_that_are_not_finite_on_the_way_are_named() -> None:
    found = run([toy_family()[0], Level("mine", nan_at_the_clean_end, 4.0)])
    assert found.failed and "mine" in errors(found)[0] and "9.0" in errors(found)[0]
    assert found.best_levels is None
    json.dumps(found.to_json(), allow_nan=False)
    table(found)


def test_rounding_between_batches_is_only_a_warning() -> None:
    def rounded(x: Tensor, logsnr: Tensor) -> Tensor:
        return nonlinear_denoise(x, logsnr) * (1 + 5e-4 * len(x))

    found = check_contract([Level("bf16", rounded, 1.0)], torch.ones(4, *SHAPE), 0.0)
    assert [finding.severity for finding in found] == ["warning"] and "bf16" in found[0].text


def test_the_telescope_check_detects_wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without 1/p give a biased mean; coins in pairs give a wrong variance with the right mean."""
    from mlem_diffusion.multilevel import estimators

    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    right, coins = estimators.telescope_weights, estimators.draw_coins
    assert check_telescope(toy_family(), x, 0.0).holds
    monkeypatch.setattr(estimators, "telescope_weights", lambda p, c: right(np.ones_like(p), c))
    assert max(abs(z) for z in check_telescope(toy_family(), x, 0.0).bias_z) > 8
    monkeypatch.setattr(estimators, "telescope_weights", right)

    def paired(p: np.ndarray, seeds: Sequence[int], kind: str) -> np.ndarray:
        drawn = coins(p, seeds, kind)
        drawn[..., 2] = drawn[..., 1]
        return drawn

    monkeypatch.setattr(estimators, "draw_coins", paired)
    wrong = check_telescope(toy_family(), x, 0.0)
    assert not wrong.holds and abs(wrong.size_z) > 8 and max(abs(z) for z in wrong.bias_z) < 4


def test_the_telescope_check_detects_a_wrong_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlem_diffusion.diffusion import estimator

    right = estimator.WeightTable.__call__
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(estimator.WeightTable, "__call__", lambda *a: right(*a).roll(1, 0))
    assert not check_telescope(toy_family(), x, 0.0).holds


# -------------------------------------------------------------------------------------------------- findings


def test_a_good_hierarchy_gives_no_warnings() -> None:
    s = statistics([1.0, 4e-3, 1e-3, 2.5e-4], [1, 16, 256, 4096])
    assert texts(s) == []
    assert any("good hierarchy" in text for text in texts(s, "ok"))


def test_differences_that_grow_are_located() -> None:
    s = statistics([1.0, 4e-3, 1e-3, 2.5e-4], [1, 16, 256, 4096])
    s.pairs[2, 2, :, 2:4] *= 8  # n2 - n1 in the middle of the range
    (text,) = [t for t in texts(s) if "more than" in t]
    assert text.startswith("n2 differs from n1 more than n1 from n0 at log-SNR -1.8 to 1.8 (")
    one = statistics([1.0, 4e-3, 1e-3, 2.5e-4], [1, 16, 256, 4096])
    one.pairs[2, 2, :, 3] *= 8  # a single noise level
    assert not [t for t in texts(one) if "more than" in t]


def test_levels_that_do_not_repay_their_cost_are_dropped() -> None:
    """n1 is no better than n0: n2 differs from n1 as much as from n0."""
    s = statistics([1.0, 1e-2, 1e-2], [1, 8, 64])
    s.pairs[1, 2] = s.pairs[2, 2]
    chain, change, se = best_chain(s)
    assert chain == [0, 2] and change < -5 * se
    before, after = np.sqrt(1e-2 * 8) + np.sqrt(1e-2 * 72), np.sqrt(1e-2 * 64)
    assert change == pytest.approx(after - before, rel=0.02)
    (text,) = [t for t in texts(s) if t.startswith("Drop")]
    assert text.startswith("Drop n1: with n0 + n2") and f"{100 * (1 - (after / before) ** 2):.0f}%" in text
    assert best_chain(statistics([1.0, 4e-3, 1e-3, 2.5e-4], [1, 16, 256, 4096]))[0] == [0, 1, 2, 3]


def test_the_chain_is_the_best_of_all_subsets() -> None:
    rng = np.random.default_rng(3)
    for trial in range(20):
        s = statistics(rng.uniform(0.1, 1, 5), 1.8 ** np.arange(5) + rng.uniform(0, 0.3, 5))
        v = (s.pairs @ s.weights).mean(-1)

        def product(chain: Sequence[int], s: LevelStatistics = s, v: np.ndarray = v) -> float:
            return sum(np.sqrt(v[a + 1, b] * (s.flops[b] + (s.flops[a] if a else 0))) for a, b in pairwise(chain))

        subsets = [(0, *middle, 4) for r in range(4) for middle in combinations((1, 2, 3), r)]
        assert tuple(best_chain(s)[0]) == min(subsets, key=product), trial


def test_costs_tails_base_and_growth() -> None:
    near = texts(statistics([1.0, 4e-3, 1e-3], [1, 16, 20]))
    assert any(t.startswith("n2 costs 1.25 times the FLOPs of n1: too close") for t in near)
    far = texts(statistics([1.0, 4e-3, 1e-3], [1, 16, 1600]))
    assert any(t.startswith("n2 costs 100 times the FLOPs of n1: a wide gap") for t in far)
    assert not [t for t in texts(statistics([1.0, 4e-3, 1e-3], [1, 1600, 25600])) if "gap" in t]  # a nearly free base
    slow = statistics([1.0, 4e-3, 1e-3], [1, 16, 256], seconds=np.array([1.0, 1.1, 9.0]))
    assert any("n0 saves nothing against n1 (1.1 times the seconds, 16 the FLOPs)." in t for t in texts(slow))
    base = texts(statistics([1.0, 4e-3, 1e-3], [1, 2, 4]))
    assert any("n0 runs at every step and costs 25% of n2" in t for t in base)
    heavy = statistics([1.0, 4e-3, 1e-3], [1, 16, 256])
    heavy.pairs[2, 2, 0, 4] *= 1000
    (text,) = [t for t in texts(heavy) if "kurtosis" in t]
    assert "n2 - n1 at log-SNR 5.4" in text
    unsure = statistics([1.0, 1e-3, 6e-4], [1, 16, 256], samples=4)
    unsure.pairs[2, 2] *= np.array([2.5, 0.1, 0.1, 0.1])[:, None]
    assert any("cannot be decided" in t for t in texts(unsure))
    flat = texts(statistics([1.0, 1e-3, 1e-3], [1, 16, 256]))
    assert any("hardly fall with cost" in t for t in flat)
    for fall, message in ((0.25, "harder than Monte Carlo: "), (1 / 64, "easier than Monte Carlo: ")):
        grown = texts(statistics([1.0, 1e-3, 1e-3 * fall], [1, 16, 256]), "ok")
        assert any(message in t for t in grown)
    (text,) = [t for t in texts(statistics([1.0, 1e-3, 2.5e-4], [1, 16, 256]), "ok") if "gamma" in t]
    assert "gamma about 4" in text  # V falls 4 times per 16 times the cost


def test_levels_that_do_not_agree_at_high_noise() -> None:
    s = statistics([1.0, 4e-3, 1e-3], [1, 16, 256])
    s.top_spread[:2] = 1e-3
    (text,) = [t for t in texts(s) if "noise is highest" in t]
    assert "log-SNR -9.0 to -5.4 n2 and n1 differ by 0.03" in text and "vary by 0.032" in text
    converging = statistics([1.0, 4e-3, 1e-3, 2.5e-4], [1, 16, 256, 4096])
    converging.top_spread[:2] = 2.5e-4
    assert not [t for t in texts(converging) if "noise is highest" in t]


# --------------------------------------------------------------------------------------------- table, JSON, figure


def test_table_and_json_hold_the_same_numbers(tmp_path: Path) -> None:
    found = run(toy_family(), p=np.array([1.0, 0.5, 0.25]))
    text, values = table(found), found.to_json()
    json.dumps(values, allow_nan=False)
    row = next(line for line in text.splitlines() if line.split()[:1] == ["w2"]).split()
    assert float(row[5]) == pytest.approx(values["pooled"]["mean_square"][2], rel=0.01)
    assert row[-2:] == ["2.00", "2.00"]
    assert all(finding.text in text for finding in found.findings)
    assert values["pooled"]["pair_mean_square"][0][2] == pytest.approx(
        float((found.statistics.pairs[1, 2] @ found.statistics.weights).mean())  # type: ignore[union-attr]
    )
    assert np.array(values["per_noise_level"]["kurtosis"]).shape == (3, 8)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    plot_diagnostics(run(toy_family()), tmp_path / "diagnostics.png", "Toy")
    with Image.open(tmp_path / "diagnostics.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_bad_input_is_reported() -> None:
    family = toy_family()
    for bad, changes, message in (
        (family[:1], {}, "at least two levels"),
        (family, {"seeds": [1]}, "two seeds"),
        (family[::-1], {}, "ordered by cost"),
        (family, {"p": np.array([1.0, 0.5])}, "do not fit"),
        (family, {"step_rule": "magic"}, "unknown"),
    ):
        with pytest.raises(UserError, match=message):
            run(bad, **changes)
