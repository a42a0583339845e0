"""Diagnostics: statistics of differences against known answers, broken contracts and telescopes, and findings."""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from toys import SHAPE, gaussian_level, nonlinear_denoise, process, toy_family

from mlem_diffusion.diffusion import sampler
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import plan_search
from mlem_diffusion.multilevel import estimators
from mlem_diffusion.multilevel.diagnostics import LevelStatistics, describe, diagnose, judge, measure, table
from mlem_diffusion.multilevel.gains import Effects, best_chain
from mlem_diffusion.multilevel.level_checks import check_contract, check_telescope

PATH, DDPM = BrownianPath(range(12), SHAPE), STEP_RULES["sde/ddpm"]
GOOD = ([1.0, 4e-3, 1e-3, 2.5e-4], [1, 16, 256, 4096])
STATES = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))


def run(family: Sequence[Level], path: BrownianPath = PATH, effects: Effects | None = None) -> dict[str, Any]:
    return diagnose(family, process(), DDPM, path, steps=8, batch=64, bar=max, effects=effects)


def statistics(pooled: Sequence[float], flops: Sequence[float], samples: int = 40) -> LevelStatistics:
    """A family of independent differences with these mean squares, equal at 6 noise levels, 5% noise over samples."""
    k, s = len(flops), 6
    noise = 1 + 0.05 * np.random.default_rng(0).standard_normal((k, samples, s))
    square, names = np.array(pooled)[:, None, None] * noise, [f"n{i}" for i in range(k)]
    logsnr, weights = np.linspace(-9, 9, s), np.full(s, 1 / s)
    sums = np.cumsum(square.mean(1), axis=0)  # of f^j, so that f^j - f^i has sums[j] - sums[i]
    apart = np.maximum(sums[None] - sums[:, None], 0)
    return LevelStatistics(names, np.array(flops, dtype=float), logsnr, weights, square, np.ones(s), apart)


def texts(found: LevelStatistics | dict[str, Any], severity: str = "warning") -> list[str]:
    findings = judge(found) if isinstance(found, LevelStatistics) else found["findings"]
    return [f["text"] for f in findings if f["severity"] == severity]


def test_differences_of_linear_levels_are_exact() -> None:
    """For f^k = c_k x every statistic follows from the states x of the largest level's sampler."""
    family = [Level(f"l{i}", lambda x, u, c=c: c * x, 4.0**i) for i, c in enumerate([0.5, 0.7, 0.8])]
    s, _ = measure(family, process(), DDPM, PATH, 8, 12, max)
    x2 = s.square[0] / 0.25
    np.testing.assert_allclose(s.square[1], 0.2**2 * x2, rtol=1e-5)
    np.testing.assert_allclose(s.square[2], 0.1**2 * x2, rtol=1e-4)
    assert np.all((s.spread > 0) & (s.spread <= 0.8**2 * x2.mean(0) * 12 / 11 + 1e-12))
    pooled = describe(s)["pooled"]
    np.testing.assert_allclose(pooled["variance_cost"], pooled["mean_square"] * [1, 4, 16 + 4])


@pytest.mark.parametrize(("key", "spent"), [("ode/heun", 12 * (8 * 21 + 7 * 16)), ("sde/ddpm", 12 * 8 * 21)])
def test_states_are_those_of_the_largest_level_alone_and_batches_do_not_matter(key: str, spent: float) -> None:
    """At the last noise level the largest level's output is the finished image."""
    family, rule = toy_family(), STEP_RULES[key]
    (whole, flops), (parts, again) = (measure(family, process(), rule, PATH, 8, batch, max) for batch in (12, 5))
    images, _ = sample(SingleLevel(family[-1]), rule, process().grid(8), PATH)
    np.testing.assert_allclose(whole.spread[-1], images.double().var(0).mean(), rtol=1e-4)
    np.testing.assert_allclose(whole.square, parts.square, rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose(whole.spread, parts.spread, rtol=1e-4, atol=1e-10)
    assert flops == again == spent and len(whole.logsnr) == 8


def test_kurtosis_is_that_of_random_projections() -> None:
    rng = np.random.default_rng(0)
    y = rng.choice([0.1, 2.0], 400, p=[0.95, 0.05])[:, None] * rng.standard_normal((400, 500))
    projected = y @ rng.standard_normal((500, 2000))
    direct = (projected**4).mean() / (projected**2).mean() ** 2
    s = statistics([1, 1], [1, 2], samples=400)
    s.square[0], s.square[1] = (y**2).mean(1)[:, None], 1.0
    assert describe(s)["pooled"]["kurtosis"] == pytest.approx([direct, 3], rel=0.05)


def test_a_sound_family_passes_and_its_table_shows_its_numbers() -> None:
    found = run(toy_family())
    json.dumps(found, allow_nan=False)
    assert not texts(found, "error")
    assert any("telescope holds" in text for text in texts(found, "ok"))
    row = next(line for line in table(found).splitlines() if line.startswith("w2")).split()
    assert float(row[2]) == pytest.approx(found["pooled"]["mean_square"][2], rel=0.01) and float(row[1]) == 16e-6
    assert all(f["text"] in table(found) for f in found["findings"])
    assert np.array(found["per_noise_level"]["mean_square_se"]).shape == (3, 8)
    same = run([gaussian_level(0.5, 1.0), Level("same", gaussian_level(0.5).denoise, 4.0)])
    assert not texts(same, "error") and any("same output" in text for text in texts(same))


# ------------------------------------------------------------------------------------------- contract, telescope
BROKEN = {
    "eval mode": lambda x, u: torch.nn.functional.dropout(nonlinear_denoise(x, u), 0.1),
    "keep their shape": lambda x, u: x[:, :1],
    "not torch.float32": lambda x, u: x.double(),
    "not finite at log-SNR -9.0": lambda x, u: x * float("nan"),
    "copy": lambda x, u: x.mul_(0.5),
    "another batch": lambda x, u: x - x.mean(0),
    "9.0": lambda x, u: nonlinear_denoise(x, u) * torch.where(u < 5, 1.0, float("nan")).reshape(-1, 1, 1, 1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_contracts_are_named(message: str) -> None:
    found = run([toy_family()[0], Level("mine", BROKEN[message], 4.0)])
    assert message in texts(found, "error")[0] and "mine" in texts(found, "error")[0] and "error" in table(found)
    assert ("pooled" in found) == (message == "9.0")
    json.dumps(found, allow_nan=False)


def test_rounding_between_batches_is_only_a_warning() -> None:
    rounded = Level("bf16", lambda x, u: nonlinear_denoise(x, u) * (1 + 5e-4 * len(x)), 1.0)
    (found,) = check_contract([rounded], torch.ones(4, *SHAPE), 0.0)
    assert found["severity"] == "warning" and "bf16" in found["text"]


def telescope(family: tuple[Level, ...] = toy_family()) -> tuple[str, float, float]:
    """Severity, and the deviations of mean and variance in standard errors."""
    found = check_telescope(family, STATES, 0.0, 64)
    bias, size = re.findall(r"(?:is|variance) ([\d.]+)", found["text"])
    return found["severity"], float(bias), float(size)


def test_levels_that_do_not_repay_their_cost_are_dropped() -> None:
    """n1 is no better than n0: n2 differs from n1 as much as from n0."""
    s = statistics([1.0, 1e-2, 1e-2], [1, 8, 64])
    s.apart[0, 2] = s.apart[1, 2]
    ratio = (np.sqrt(1e-2 * 64) / (np.sqrt(1e-2 * 8) + np.sqrt(1e-2 * 72))) ** 2
    assert s.chain == best_chain(s.apart.mean(axis=2), s.flops) == ([0, 2], pytest.approx(ratio, rel=0.02))
    (text,) = [t for t in texts(s) if t.startswith("Drop")]
    assert text.startswith("Drop n1: with n0 + n2") and f"{100 * (1 - ratio):.0f}%" in text


def test_findings_go_by_gains_where_they_are_known() -> None:
    """The middle level is far from both others at high noise, where an error is 1000 times less effective."""

    def level(name: str, noisy: float, clean: float, flops: float) -> Level:
        return Level(name, lambda x, u: nonlinear_denoise(x, u) + (noisy if u.max() < 0 else clean), flops)

    family = [level("l0", 0.1, 0.1, 1), level("l1", 1.0, 0.01, 4), level("l2", 0.0, 0.0, 16)]
    logsnr = np.linspace(-9, 9, 19)
    offsets = np.where(logsnr < 0, [[0.1], [1.0], [0.0]], [[0.1], [0.01], [0.0]])
    delta = np.diff(offsets, axis=0, prepend=0)
    values = np.tile(delta * np.where(logsnr < 0, 1e-3, 1.0), (2, 1, 1, 1))
    effects = Effects(("l0", "l1", "l2"), np.array([1.0, 4, 16]), "sde", "ddpm", logsnr, values, delta**2, 0.0)
    uniform, by_gains = run(family), run(family, effects=effects)
    assert any(t.startswith("Drop l1: with l0 + l2") for t in texts(uniform)) and uniform["pooling"] == "uniform"
    assert not any("Drop" in t for t in texts(by_gains)) and by_gains["pooling"] == "gains"
    assert uniform["pooled"]["mean_square"][2] > 0.3 and by_gains["pooled"]["mean_square"][2] < 0.01
    assert "pooled uniformly in log-SNR" in table(uniform) and "pooled by gains" in table(by_gains)


def test_gains_are_measured_before_diagnostics_but_after_the_contract(tmp_path: Path) -> None:
    """The diagnosed rule is the first with methods; a level of the wrong shape, which has no gains, is a finding."""
    rules = [{"dynamics": d, "step_rule": r, "methods": m, "steps": [6]} for d, r, m in (
        ("sde", "em", []), ("sde", "ddpm", ["nested"]), ("ode", "ddim", []))]  # fmt: skip
    numbers = {"seed": 0, "calibrate": 4, "calibrate_steps": [6], "probes": 1, "diagnose": {"seeds": 4, "steps": 6},
               "num_select": 4}  # fmt: skip
    path, bar = partial(BrownianPath, shape=SHAPE), lambda *a: nullcontext(max)
    exp: Any = SimpleNamespace(process=process(), shape=SHAPE, device="cpu", progress=bar, path=path)
    compare = {"batch": 8, "seed": 90, "num_samples": 4, "num_distance": 0, "paper": {"patterns": {"select": 2}}}
    exp.cfg = OmegaConf.create({"optimise": numbers | {"rules": rules, "methods": []}, "compare": compare})
    exp.cached = lambda stem, facts, read, make: (make(tmp_path / stem), read(tmp_path / stem))[1]
    found = plan_search.diagnostics(exp, {level.name: level for level in toy_family()}).values()
    assert [(f["step_rule"], f["pooling"]) for f in found] == [("ddpm", "gains"), ("ddim", "uniform")]
    mine = Level("mine", BROKEN["keep their shape"], 4.0)
    found = plan_search.diagnostics(exp, {"w0": toy_family()[0], "mine": mine})
    assert "keep their shape" in texts(found["sde"], "error")[0]


def test_the_telescope_check_detects_wrong_weights_and_a_wrong_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without 1/p give a biased mean; coins in pairs give a wrong variance with the right mean.
    With two levels and p = 1/2 the squared deviation is constant, up to rounding; this is no false alarm."""
    weights, coins = estimators.telescope_weights, estimators.draw_coins
    assert telescope()[0] == telescope(toy_family(2))[0] == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "telescope_weights", lambda p, c: weights(np.ones_like(p), c))
        assert telescope()[1] > 8

    def paired(p: np.ndarray, seeds: Sequence[int], kind: str) -> np.ndarray:
        drawn = coins(p, seeds, kind)
        drawn[..., 2] = drawn[..., 1]
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(estimators, "draw_coins", paired)
        severity, bias, size = telescope()
        assert severity == "error" and size > 8 and bias < 4
    right = sampler.WeightTable.__call__
    monkeypatch.setattr(sampler.WeightTable, "__call__", lambda *a: right(*a).roll(1, 0))
    assert telescope()[0] == "error"


# -------------------------------------------------------------------------------------------------- findings
def test_differences_that_grow_are_located() -> None:
    assert texts(statistics(*GOOD)) == [] and any("good hierarchy" in t for t in texts(statistics(*GOOD), "ok"))
    s = statistics(*GOOD)
    s.square[2, :, 2:4] *= 8  # n2 - n1 in the middle of the range
    (text,) = [t for t in texts(s) if "more than" in t]
    assert text.startswith("n2 differs from n1 more than n1 from n0 between log-SNR -1.8 and 1.8 (")
    one = statistics(*GOOD)
    one.square[2, :, 3] *= 8  # a single noise level
    assert not [t for t in texts(one) if "more than" in t]


@pytest.mark.parametrize(("last", "text"), [
    (1e-3, "do not measurably fall with cost"), (1e-3 / 4, "grows with level, harder than Monte Carlo"),
    (1e-3 / 64, "falls with level, easier than Monte Carlo"),
    (1e-3 / 4, "gamma about 4"),  # V falls 4 times per 16 times the cost
])  # fmt: skip
def test_growth_of_variance_with_cost(last: float, text: str) -> None:
    s = statistics([1.0, 1e-3, last], [1, 16, 256])
    assert any(text in found for found in [*texts(s), *texts(s, "ok")])


def test_growth_that_few_samples_cannot_decide() -> None:
    unsure = statistics([1.0, 1e-3, 6e-4], [1, 16, 256], samples=4)
    unsure.square[2] *= np.array([2.5, 0.1, 0.1, 0.1])[:, None]
    assert any("do not measurably fall" in t for t in texts(unsure))


@pytest.mark.parametrize(("family", "options", "message"), [
    (toy_family(1), {}, "at least two levels"), (toy_family(), {"path": BrownianPath([1], SHAPE)}, "two seeds"),
    (toy_family()[::-1], {}, "ordered by cost"),
])  # fmt: skip
def test_bad_input_is_reported(family: tuple[Level, ...], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(family, **options)
