"""Speed-ups of synthetic samplers whose true speed-up is known."""

import json
from typing import Any

import numpy as np
import pytest

from mlem_diffusion.comparison.features import FeatureMoments, fast_frechet
from mlem_diffusion.comparison.settings import Measurement
from mlem_diffusion.comparison.speedup import equal_error, errors_of, speedups, summary

N = 400
COSTS = [1.0, 2.0, 4.0, 8.0, 16.0]


def setting(estimator: str, cost: float, error: float, spread: float = 0.02, seed: int = 0, **row: Any) -> Measurement:
    """A setting whose per-image errors scatter around `error`; the scatter is common to all of one `seed`."""
    noise = 1 + spread * np.random.default_rng(seed).standard_normal(N)
    features = row.pop("features", None)
    defaults = {
        "dynamics": "ode", "estimator": estimator, "coins": "independent" if estimator == "ml_em" else "",
        "error": error, "gflops_realised": cost, "gflops_expected": cost, "seconds": cost / 10, "top_evaluations": 1000,
    }  # fmt: skip
    return Measurement(defaults | row, error * noise, features)


def em(costs: list[float], **row: Any) -> list[Measurement]:
    """EM with error = 1 / cost."""
    return [setting("single", c, 1 / c, **row) for c in costs]


def ml_em(costs: list[float], speedup: float, **row: Any) -> list[Measurement]:
    """ML-EM with the same error at 1 / speedup of the cost."""
    return [setting("ml_em", c / speedup, 1 / c, **row) for c in costs]


def flops(settings: list[Measurement], method: str = "any", **more: Any) -> dict[str, Any]:
    return speedups(settings, **more)["ode"][method]["error"]["flops"]


@pytest.mark.parametrize("true", [4.0, 1.0, 0.5])
def test_known_speedup_is_found_below_one_included(true: float) -> None:
    out = speedups(em(COSTS) + ml_em(COSTS, true))
    assert list(out) == ["ode"] and set(out["ode"]) == {"paper", "any"}
    for entry in (out["ode"][m]["error"][cost] for m in ("paper", "any") for cost in ("flops", "seconds")):
        assert entry["max"] == entry["lower95"] == pytest.approx(true, rel=1e-9)  # same scatter: no uncertainty
        assert len(entry["curve"]) == len(COSTS)
        ratio = entry["baseline"]["gflops_realised"] / entry["ours"]["gflops_realised"]
        assert ratio == pytest.approx(true, rel=1e-9)
        assert entry["at"] == entry["baseline"]["error"]
    assert f"ode, paper, FLOPs at equal error: {true:.3g}x (95% lower bound {true:.3g}x)" in summary(out)


def test_a_coarse_baseline_grid_does_not_flatter() -> None:
    """Targets are the baseline's own errors, although our errors are between them."""
    ours = [setting("ml_em", 2.0, 0.5), setting("ml_em", 50.0, 1 / 50.0), setting("ml_em", 100.0, 0.01)]
    entry = flops(em([1.0, 100.0]) + ours)  # not 100 / 50: EM has no setting at that error
    assert [p["speedup"] for p in entry["curve"]] == [pytest.approx(0.5), pytest.approx(1.0)]


def test_the_cheapest_baseline_counts_whatever_its_rule() -> None:
    entry = flops([*em(COSTS), setting("stitched", 2.0, 1 / 16), *ml_em([16.0], 4.0)])
    assert entry["max"] == pytest.approx(0.5) and entry["baseline"]["estimator"] == "stitched"
    assert len(entry["curve"]) == 2  # EM at 2, 4, 8 and 16 is beaten by the stitched setting


def test_unreached_errors_and_empty_sides_give_null() -> None:
    for some in (em(COSTS), ml_em(COSTS, 2.0), [*em(COSTS), setting("ml_em", 0.1, 5.0)]):
        out = speedups(some)
        entry = out["ode"]["any"]["error"]["flops"]
        assert [entry[key] for key in ("max", "lower95", "at", "baseline", "ours")] == [None] * 5
        assert all(p["speedup"] is None and p["lower95"] is None for p in entry["curve"])
        assert json.loads(json.dumps(out, allow_nan=False)) == out and "never reaches" in summary(out)
    assert speedups([]) == {}


def test_methods_and_dynamics_are_separate() -> None:
    others = [s for k, coins in ((4.0, "systematic"), (3.9, "nested")) for s in ml_em(COSTS, k, coins=coins)]
    fixed = [setting("quadrature", c / 5, 1 / c, top_evaluations=1) for c in COSTS]  # has no coins to count
    planned = ml_em(COSTS, 3.0, plan="abc")
    sde = em(COSTS, dynamics="sde") + ml_em(COSTS, 0.25, dynamics="sde")
    out = speedups(em(COSTS) + ml_em(COSTS, 2.0) + others + planned + fixed + sde)
    found = {(d, m): out[d][m]["error"]["flops"]["max"] for d in ("ode", "sde") for m in ("paper", "any")}
    assert list(found.values()) == [pytest.approx(x) for x in (3, 5, 0.25, 0.25)]
    assert out["ode"]["paper"]["error"]["flops"]["ours"]["plan"] == "abc"


def test_rarely_fired_rows_are_left_out() -> None:
    rare = ml_em(COSTS, 100.0, top_evaluations=99)
    entry = flops(em(COSTS, top_evaluations=1) + ml_em(COSTS, 2.0, top_evaluations=100) + rare)
    assert entry["max"] == pytest.approx(2)


def test_two_groups_are_compared_in_any_cost() -> None:
    ours = ml_em(COSTS, 4.0, gflops_expected=1.0)
    assert equal_error(em(COSTS), ours, "gflops_expected")["max"] == pytest.approx(16)
    assert equal_error(em(COSTS), ml_em(COSTS, 4.0), "seconds")["lower95"] == pytest.approx(4)
    assert equal_error(ml_em(COSTS, 4.0), em(COSTS), "seconds")["max"] == pytest.approx(0.25)


def test_error_ratio_at_equal_cost() -> None:
    ours = [setting("ml_em", 4.0, 1 / 40), setting("ml_em", 9.0, 1 / 20), setting("ml_em", 0.5, 3.0)]
    # At EM's cost 4: 1/4 against 1/40; at 8 and beyond EM is better. Ours at 0.5 and 9 lie between EM's costs.
    found = flops(em(COSTS) + ours)["error_ratio_at_equal_cost"]
    assert found == {"max": pytest.approx(10), "lower95": pytest.approx(10), "at": 4.0}


def test_lower_bound_covers_the_true_speedup() -> None:
    """At cost 1 our sampler misses the target in half of all draws; at cost 2 it always reaches it."""
    misses, trials = 0, 60
    for trial in range(trials):
        base = setting("single", 4.0, 1.0, spread=0.3, seed=3 * trial)
        misser = setting("ml_em", 1.0, 1.01, spread=0.3, seed=3 * trial + 1)
        sure = setting("ml_em", 2.0, 0.5, spread=0.3, seed=3 * trial + 2)
        entry = flops([base, misser, sure], replicates=100)
        assert entry["max"] in (pytest.approx(2), pytest.approx(4))
        misses += entry["lower95"] > 2.0 + 1e-9  # the true value, since 1.01 > 1, is 2
    assert misses <= 0.1 * trials


def scaled(one: Measurement, mean: float) -> Measurement:
    return Measurement(one.row, one.errors * (mean / one.errors.mean()))


def test_targets_and_errors_are_resampled() -> None:
    dear = setting("single", 4.0, 1.0, spread=0.3, seed=1)
    cheap = setting("single", 1.0, 1.0, spread=0.3, seed=2)
    barely = scaled(setting("ml_em", 1.0, 1.0, spread=0.3, seed=2), 0.999 * dear.errors.mean())
    entry = flops([dear, barely])  # half of the resamples do not reach the target
    assert entry["max"] == pytest.approx(4) and entry["lower95"] == 0
    # a cheap baseline reaches the target on half of the resamples
    entry = flops([scaled(cheap, 1.0001 * dear.errors.mean()), dear, setting("ml_em", 1.0, 0.5)])
    assert entry["max"] == pytest.approx(4) and entry["lower95"] == pytest.approx(1)
    values = errors_of([dear, Measurement({}, 2 * dear.errors)], replicates=50, seed=3)
    assert values.shape == (2, 51) and np.allclose(values[1], 2 * values[0])  # paired
    assert 0.3 < values[0, 1:].std() / (0.3 / np.sqrt(N)) < 1.6


def test_a_single_seed_bounds_nothing() -> None:
    base, ours = (Measurement(setting(kind, 1.0, 1.0).row, np.ones(1)) for kind in ("single", "ml_em"))
    found = flops([base, ours])
    assert found["max"] == pytest.approx(1) and found["lower95"] is None and found["curve"][0]["lower95"] is None
    assert found["error_ratio_at_equal_cost"]["lower95"] is None


def test_distance_is_compared_like_the_error() -> None:
    def features(stretch: float, seed: int) -> np.ndarray:
        return (stretch * np.random.default_rng(seed).standard_normal((N, 6))).astype(np.float32)

    def distance(features: Any) -> float:
        return fast_frechet(features, reference, np.ones(N), features @ reference.root)

    reference, stretches = FeatureMoments(np.zeros(6), np.eye(6)), [3.0, 2.5, 2.0, 1.5, 1.0]
    base = [setting("single", c, 1 / c, features=features(k, int(c))) for c, k in zip(COSTS, stretches, strict=True)]
    ours = [
        setting("ml_em", c / 5, 1 / c, features=features(k - 0.2, int(c)))
        for c, k in zip(COSTS, stretches, strict=True)
    ]
    out = speedups(base + ours[:-1], reference, distance_replicates=20)
    entry = out["ode"]["any"]["distance"]["flops"]
    assert entry["max"] == pytest.approx(5.0) and 0 < entry["lower95"] <= 5.0
    assert "error_ratio_at_equal_cost" not in entry and entry["at"] == entry["baseline"]["distance"]
    assert [p["at"] for p in entry["curve"]] == pytest.approx([distance(s.features) for s in base])
    assert out["ode"]["paper"]["distance"] == out["ode"]["any"]["distance"]
    assert "distance" not in speedups(base + ours)["ode"]["any"]  # no reference, no distances
