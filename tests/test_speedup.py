"""Speed-ups of synthetic samplers whose true speed-up is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlem_diffusion.comparison.frechet import FeatureMoments, fast_frechet, feature_moments
from mlem_diffusion.comparison.speedup import Measurement, equal_error, resampled_errors, speedups
from mlem_diffusion.errors import UserError

N = 400


def setting(estimator: str, cost: float, error: float, spread: float = 0.02, seed: int = 0, **row: Any) -> Measurement:
    """A setting whose per-image errors scatter around `error`; the scatter is common to all of one `seed`."""
    noise = 1 + spread * np.random.default_rng(seed).standard_normal(N)
    defaults = {
        "dynamics": "ode", "step_rule": "em", "estimator": estimator, "levels": "w4+w8", "steps": 16,
        "probabilities": "constant" if estimator == "ml_em" else "",
        "coins": "independent" if estimator == "ml_em" else "",
        "c": 1.0, "switch": None, "error": error, "distance": "",
        "gflops_realised": cost, "gflops_expected": cost, "seconds": cost / 10, "top_evaluations": 1000.0,
    }  # fmt: skip
    return Measurement({**defaults, **row}, error * noise)


def em(costs: list[float], **row: Any) -> list[Measurement]:
    """EM with error = 1 / cost."""
    return [setting("single", c, 1 / c, **row) for c in costs]


def ml_em(costs: list[float], speedup: float, **row: Any) -> list[Measurement]:
    """ML-EM with the same error at 1 / speedup of the cost."""
    return [setting("ml_em", c / speedup, 1 / c, **row) for c in costs]


COSTS = [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("true", [4.0, 1.0, 0.5])
def test_known_speedup_is_found_below_one_included(true: float) -> None:
    out = speedups(em(COSTS) + ml_em(COSTS, true))
    assert list(out) == ["ode"] and set(out["ode"]) == {"paper", "any", "left_out"}
    for method in ("paper", "any"):
        assert set(out["ode"][method]) == {"error"}
        for cost in ("flops", "seconds"):
            entry = out["ode"][method]["error"][cost]
            assert entry["max"] == pytest.approx(true, rel=1e-9)
            assert entry["lower95"] == pytest.approx(true, rel=1e-9)  # same scatter: no uncertainty
            assert len(entry["curve"]) == len(COSTS)
            assert entry["baseline"]["estimator"] == "single" and entry["ours"]["estimator"] == "ml_em"
            ratio = entry["baseline"]["gflops_realised"] / entry["ours"]["gflops_realised"]
            assert ratio == pytest.approx(true, rel=1e-9)
            assert entry["at"] == pytest.approx(entry["baseline"]["error"], rel=1e-9)


def test_flops_and_seconds_can_disagree() -> None:
    ours = [setting("ml_em", c / 4, 1 / c, seconds=c / 5) for c in COSTS]
    out = speedups(em(COSTS) + ours)["ode"]["any"]["error"]
    assert out["flops"]["max"] == pytest.approx(4) and out["seconds"]["max"] == pytest.approx(0.5)


def test_a_coarse_baseline_grid_does_not_flatter() -> None:
    """Targets are the baseline's own errors, although our errors are between them."""
    base = em([1.0, 100.0])
    ours = [setting("ml_em", 2.0, 0.5), setting("ml_em", 50.0, 1 / 50.0), setting("ml_em", 100.0, 0.01)]
    entry = speedups(base + ours)["ode"]["any"]["error"]["flops"]
    assert entry["max"] == pytest.approx(1.0)  # not 100 / 50: EM has no setting at that error
    assert [p["speedup"] for p in entry["curve"]] == [pytest.approx(0.5), pytest.approx(1.0)]


def test_the_cheapest_baseline_counts_whatever_its_rule() -> None:
    other = [setting("stitched", 2.0, 1 / 16, step_rule="dpmpp_2m")]
    entry = speedups(em(COSTS) + other + ml_em([16.0], 4.0))["ode"]["any"]["error"]["flops"]
    assert entry["max"] == pytest.approx(0.5) and entry["baseline"]["estimator"] == "stitched"
    # EM at 2, 4, 8 and 16 is beaten by the stitched setting and leaves the frontier.
    assert len(entry["curve"]) == 2


def test_unreached_errors_give_null() -> None:
    ours = [setting("ml_em", 0.1, 5.0)]
    out = speedups(em(COSTS) + ours)
    entry = out["ode"]["any"]["error"]["flops"]
    keys = ("max", "lower95", "at", "baseline", "ours")
    assert [entry[key] for key in keys] == [None] * 5
    assert all(p["speedup"] is None and p["lower95"] is None for p in entry["curve"])
    assert json.loads(json.dumps(out, allow_nan=False)) == out


def test_methods_and_dynamics_are_separate() -> None:
    learned = ml_em(COSTS, 4.0, probabilities="measured", coins="systematic")
    systematic = ml_em(COSTS, 3.0, coins="systematic") + ml_em(COSTS, 3.9, coins="nested")
    shared = ml_em(COSTS, 3.5, coins="independent-shared")
    ode = em(COSTS) + ml_em(COSTS, 2.0) + learned + systematic + shared
    sde = em(COSTS, dynamics="sde") + ml_em(COSTS, 0.25, dynamics="sde")
    out = speedups(ode + sde)
    found = {(d, m): out[d][m]["error"]["flops"]["max"] for d in ("ode", "sde") for m in ("paper", "any")}
    assert found == {
        ("ode", "paper"): pytest.approx(2), ("ode", "any"): pytest.approx(4),
        ("sde", "paper"): pytest.approx(0.25), ("sde", "any"): pytest.approx(0.25),
    }  # fmt: skip
    assert out["ode"]["any"]["error"]["flops"]["ours"]["coins"] == "systematic"
    renamed = speedups(ode, paper=lambda row: row["coins"] == "systematic")
    assert renamed["ode"]["paper"]["error"]["flops"]["max"] == pytest.approx(4)


def test_paper_covers_all_probabilities_with_independent_coins() -> None:
    planned = ml_em(COSTS, 3.0, probabilities="optimal", c=None, plan="abc")
    weights = [Measurement({**s.row, "estimator": "quadrature", "coins": ""}, s.errors) for s in ml_em(COSTS, 5.0)]
    out = speedups(em(COSTS) + ml_em(COSTS, 2.0) + planned + weights)["ode"]
    assert out["paper"]["error"]["flops"]["max"] == pytest.approx(3)
    assert out["paper"]["error"]["flops"]["ours"]["plan"] == "abc"
    assert out["any"]["error"]["flops"]["max"] == pytest.approx(5)
    assert out["any"]["error"]["flops"]["ours"]["estimator"] == "quadrature"
    few = [
        Measurement({**s.row, "top_evaluations": 1}, s.errors) for s in weights
    ]  # fixed weights need no count of fires
    assert speedups(em(COSTS) + few)["ode"]["left_out"] == 0


def test_two_groups_at_equal_error_and_at_equal_cost() -> None:
    ours, theirs = ml_em(COSTS, 4.0), em(COSTS)
    entry = equal_error(theirs, ours)
    assert entry["max"] == pytest.approx(4) and entry["lower95"] == pytest.approx(4)
    # at our costs c / 4 = 0.25 .. 4 EM has nothing, nothing, then the errors 1, 1/2, 1/4 over ours of 1/4, 1/8, 1/16
    points = entry["errors_at_cost"]
    assert [p["gflops"] for p in points] == [c / 4 for c in COSTS]
    assert [p["ratio"] for p in points] == [None, None, *[pytest.approx(4)] * 3]
    assert [p["lower95"] for p in points] == [None, None, *[pytest.approx(4)] * 3]
    json.dumps(entry, allow_nan=False)
    # the same the other way round: EM as ours is 4 times dearer
    back = equal_error(ours, theirs)
    assert back["max"] == pytest.approx(0.25)
    assert [p["ratio"] for p in back["errors_at_cost"]] == [pytest.approx(r) for r in (1 / 4, 1 / 4, 1 / 4, 1 / 2, 1)]


def test_equal_error_goes_by_expected_cost_to_a_thousandth() -> None:
    ours = [setting("ml_em", 2.0, 0.5, gflops_expected=4.0)]
    assert equal_error(em(COSTS), ours)["errors_at_cost"] == [
        {"gflops": 4.0, "ratio": pytest.approx(0.5), "lower95": pytest.approx(0.5)}
    ]
    near = [setting("ml_em", 4.0, 0.5, gflops_expected=3.999)]
    assert equal_error(em(COSTS), near)["errors_at_cost"][0]["ratio"] == pytest.approx(0.5)
    below = [setting("ml_em", 4.0, 0.5, gflops_expected=3.9)]
    assert equal_error(em(COSTS), below)["errors_at_cost"][0]["ratio"] == pytest.approx(1.0)
    slow = [setting("ml_em", 1.0, 0.5, seconds=9.0)]
    assert equal_error(em(COSTS), slow, cost="seconds")["errors_at_cost"][0]["seconds"] == 9.0
    assert equal_error([], ours)["max"] is None and equal_error(ours, [])["errors_at_cost"] == []


def test_resampled_errors_are_paired() -> None:
    values = resampled_errors([setting("single", 1, 1.0, 0.5), setting("single", 1, 2.0, 0.5)], replicates=50, seed=3)
    assert values.shape == (2, 51) and np.allclose(values[1], 2 * values[0])
    assert 0.3 < values[0, 1:].std() / (0.5 / np.sqrt(N)) < 1.6


def test_rarely_fired_and_broken_rows_are_left_out_and_counted() -> None:
    rare = ml_em(COSTS, 100.0, top_evaluations=99.0)
    broken = [setting("single", 1.0, float("nan")), setting("ml_em", 0.001, float("inf"))]
    out = speedups(em(COSTS) + ml_em(COSTS, 2.0) + rare + broken)["ode"]
    assert out["any"]["error"]["flops"]["max"] == pytest.approx(2) and out["left_out"] == len(COSTS) + 2
    enough = ml_em(COSTS, 3.0, top_evaluations=100.0)
    assert speedups(em(COSTS) + enough)["ode"]["left_out"] == 0
    few_but_single = em(COSTS, top_evaluations=1.0)
    assert speedups(few_but_single + enough)["ode"]["left_out"] == 0


def test_error_ratio_at_equal_cost() -> None:
    ours = [setting("ml_em", 4.0, 1 / 40), setting("ml_em", 9.0, 1 / 20), setting("ml_em", 0.5, 3.0)]
    entry = speedups(em(COSTS) + ours)["ode"]["any"]["error"]["flops"]["error_ratio_at_equal_cost"]
    # At EM's cost 4: 1/4 against 1/40; at 8 and beyond EM is better. Ours at 0.5 and 9 lie between EM's costs.
    assert entry == {"max": pytest.approx(10), "lower95": pytest.approx(10), "at": 4.0}


def test_lower_bound_covers_the_true_speedup() -> None:
    """At cost 1 our sampler misses the target in half of all draws; at cost 2 it always reaches it."""
    misses, trials = 0, 60
    for trial in range(trials):
        base = [setting("single", 4.0, 1.0, spread=0.3, seed=3 * trial)]
        ours = [
            setting("ml_em", 1.0, 1.01, spread=0.3, seed=3 * trial + 1),
            setting("ml_em", 2.0, 0.5, spread=0.3, seed=3 * trial + 2),
        ]
        entry = speedups(base + ours, replicates=100)["ode"]["any"]["error"]["flops"]
        assert entry["max"] in (pytest.approx(2), pytest.approx(4))
        misses += entry["lower95"] > 2.0 + 1e-9  # the true value, since 1.01 > 1, is 2
    assert misses <= 0.1 * trials


def test_a_speedup_that_is_not_always_reached_has_a_zero_bound() -> None:
    base = [setting("single", 4.0, 1.0, spread=0.3, seed=1)]
    mean = base[0].errors.mean()
    ours = setting("ml_em", 1.0, 1.0, spread=0.3, seed=2)
    barely = Measurement(ours.row, ours.errors * (0.999 * mean / ours.errors.mean()))
    entry = speedups([*base, barely])["ode"]["any"]["error"]["flops"]
    assert entry["max"] == pytest.approx(4) and entry["lower95"] == 0


def test_a_resample_may_give_the_target_to_a_cheaper_baseline() -> None:
    """Two baselines of nearly equal error: the cheap one reaches the target on half of the resamples."""
    cheap, dear = (setting("single", c, 1.0, spread=0.3, seed=s) for c, s in ((1.0, 1), (4.0, 2)))
    cheap = Measurement(cheap.row, cheap.errors * (1.0001 * dear.errors.mean() / cheap.errors.mean()))
    entry = speedups([cheap, dear, setting("ml_em", 1.0, 0.5)])["ode"]["any"]["error"]["flops"]
    assert entry["max"] == pytest.approx(4) and entry["lower95"] == pytest.approx(1)


def test_shared_coins_widen_the_bound() -> None:
    """Seeds that share coins have correlated errors: resampling by draw must give more uncertainty than by seed."""
    rng = np.random.default_rng(0)
    draws = np.repeat(np.arange(20), N // 20)
    row = setting("ml_em", 1.0, 1.0).row
    errors = 0.93 * (1 + 0.4 * rng.permutation(np.linspace(-1, 1, 20))[draws])
    base = [setting("single", 4.0, 1.0)]
    alone = speedups([*base, Measurement(row, errors)])["ode"]["any"]["error"]["flops"]
    shared = speedups([*base, Measurement(row, errors, clusters=draws)])["ode"]["any"]["error"]["flops"]
    assert alone["max"] == shared["max"] == pytest.approx(4)
    assert alone["lower95"] == pytest.approx(4) and shared["lower95"] == 0
    with pytest.raises(UserError, match="coin draw"):
        speedups([*base, Measurement(row, errors, clusters=draws[:-1])])


def test_one_shared_coin_draw_bounds_nothing() -> None:
    ours = [Measurement(s.row, s.errors, clusters=np.zeros(N, dtype=int)) for s in ml_em(COSTS, 4.0)]
    features = np.random.default_rng(0).standard_normal((N, 3)).astype(np.float32)
    everyone = [Measurement(s.row, s.errors, s.clusters, features) for s in em(COSTS) + ours]
    out = speedups(everyone, reference=FeatureMoments(np.zeros(3), np.eye(3), 1000))["ode"]["any"]
    for measure in ("error", "distance"):
        entry = out[measure]["flops"]
        assert entry["max"] == pytest.approx(4) and entry["lower95"] is None
        assert entry["curve"] and all(p["lower95"] is None for p in entry["curve"])
    assert out["error"]["flops"]["error_ratio_at_equal_cost"]["lower95"] is None
    two = [Measurement(s.row, s.errors, clusters=np.arange(N) % 2) for s in ours]
    assert speedups(em(COSTS) + two)["ode"]["any"]["error"]["flops"]["lower95"] is not None


def with_features(measurement: Measurement, stretch: float, seed: int) -> Measurement:
    features = stretch * np.random.default_rng(seed).standard_normal((N, 6))
    return Measurement(measurement.row, measurement.errors, measurement.clusters, features.astype(np.float32))


def test_distance_is_compared_like_the_error() -> None:
    reference = FeatureMoments(np.zeros(6), np.eye(6), 10_000)
    stretches = [3.0, 2.5, 2.0, 1.5, 1.0]
    base = [with_features(s, k, i) for i, (s, k) in enumerate(zip(em(COSTS), stretches, strict=True))]
    ours = [
        with_features(s, k - 0.2, 10 + i)
        for i, (s, k) in enumerate(zip(ml_em(COSTS, 5.0), [*stretches[:-1], 1.2], strict=True))
    ]
    out = speedups(base + ours, reference=reference, distance_replicates=20)
    entry = out["ode"]["any"]["distance"]["flops"]
    assert entry["max"] == pytest.approx(5.0) and 0 < entry["lower95"] <= 5.0
    assert "error_ratio_at_equal_cost" not in entry
    assert entry["at"] == pytest.approx(entry["baseline"]["distance"])
    distances = [fast_frechet(np.asarray(s.features), reference) for s in base]
    assert [p["at"] for p in entry["curve"]] == pytest.approx(distances)
    assert out["ode"]["paper"]["distance"] == out["ode"]["any"]["distance"]
    assert "distance" not in speedups(base + ours)["ode"]["any"]  # no reference, no distances
    assert json.loads(json.dumps(out, allow_nan=False)) == out
    assert np.allclose(feature_moments(np.asarray(base[4].features)).cov, np.eye(6), atol=0.2)


def test_empty_sides_give_nulls_and_bad_lengths_are_refused() -> None:
    for some in (em(COSTS), ml_em(COSTS, 2.0)):
        out = speedups(some)
        assert out["ode"]["any"]["error"]["seconds"]["max"] is None
        assert json.loads(json.dumps(out, allow_nan=False)) == out
    reference = FeatureMoments(np.zeros(6), np.eye(6), 10_000)
    for some in (em(COSTS), ml_em(COSTS, 2.0)):
        featured = [with_features(s, 1.0, i) for i, s in enumerate(some)]
        out = speedups(featured, reference=reference, distance_replicates=5)
        for method in ("paper", "any"):
            for cost in ("flops", "seconds"):
                entry = out["ode"][method]["distance"][cost]
                assert [entry[key] for key in ("max", "lower95", "at", "baseline", "ours")] == [None] * 5
        assert json.loads(json.dumps(out, allow_nan=False)) == out
    assert speedups([]) == {}
    short = Measurement(em([3.0])[0].row, np.ones(N - 1))
    with pytest.raises(UserError, match="same seeds"):
        speedups([*em(COSTS), short])


def test_rows_read_back_from_a_table_and_missing_costs_are_fine() -> None:
    ours = ml_em(COSTS, 2.0, c=np.float64(0.5), seconds="", distance=float("nan"))
    out = speedups(em(COSTS) + ours)
    json.dumps(out, allow_nan=False)
    assert out["ode"]["any"]["error"]["seconds"]["max"] is None  # ours has no seconds
    assert out["ode"]["any"]["error"]["flops"]["max"] == pytest.approx(2)
    assert out == speedups(em(COSTS) + ours)  # the bootstrap is seeded
