"""Guidance in levels: what one guide for all levels costs, where it rests, and how gains grow with its scale."""

import runpy
from dataclasses import replace

import pytest
import torch
from toys import SHAPE, nonlinear_denoise, process, toy_family

from mlem_diffusion import BrownianPath, Level, Multilevel, SingleLevel, calibrate, guided, sample, step_rule
from mlem_diffusion.diffusion.level import shared_costs
from mlem_diffusion.multilevel.gains import measure_effects

RULE, GRID, PATH = step_rule("sde/ddpm"), process().grid(16), BrownianPath(range(4), SHAPE)
GUIDE, INSIDE = Level("guide", lambda x, at: nonlinear_denoise(x, at, 0.3), 0.5), [(-3.0, 3.0, 2.0)]
AWAY = [(20.0, 30.0, 2.0)]


def family(scale, guide: Level = GUIDE, common: bool = True) -> list[Level]:
    return [guided(level, guide, scale, common=common) for level in toy_family()]


def alone(levels) -> torch.Tensor:
    return sample(SingleLevel(levels[-1]), RULE, GRID, PATH)[0]


@pytest.mark.parametrize("w", [1.5, 4.0])
def test_with_a_common_guide_differences_grow_as_w_and_gains_as_its_square(w: float) -> None:
    at = PATH.initial(), torch.tensor(0.5)
    before, after = (torch.stack([f.denoise(*at) for f in fs]).diff(dim=0) for fs in (toy_family(), family(w)))
    torch.testing.assert_close(after, w * before, rtol=0, atol=1e-5)
    same = family(w, replace(toy_family()[-1], name="same", flops=0.5))  # this guide leaves the largest level as it is
    before, after = (measure_effects(levels, RULE, GRID, PATH).gains()[0][1:] for levels in (toy_family(), same))
    assert after == pytest.approx(w**2 * before, rel=1e-4)


def test_the_guide_runs_once_per_step_and_only_inside_its_interval() -> None:
    seen: list[float] = []
    guide = replace(GUIDE, denoise=lambda x, at: (seen.append(float(at)), GUIDE.denoise(x, at))[1])
    for scale, expected in ((2.0, GRID.logsnr), (INSIDE, GRID.logsnr[abs(GRID.logsnr) <= 3]), (AWAY, [])):
        seen.clear()
        ledger = sample(Multilevel(family(scale, guide), [1.0, 0.5, 0.5]), RULE, GRID, PATH)[1]
        assert seen == pytest.approx(expected, rel=1e-6) and ledger.base_flops == len(expected) * GUIDE.flops
        assert torch.equal(alone(family(scale)), alone(family(scale, common=False)))  # one image, whosever the guide is
    assert torch.equal(alone(family(AWAY)), alone(toy_family()))


def test_plans_count_the_guide_inside_its_interval() -> None:
    finer, options = process(257, "logsnr"), {"steps": (16,), "seeds": range(4), "calibrate_steps": (16,)}
    planner = calibrate(family(INSIDE), finer, RULE, SHAPE, **options).planners("independent")[0]
    built = (plan := planner.plan(2, planner.prices()[8])).build(family(INSIDE))
    own, inside = built.expected_evaluations(16) @ shared_costs(built.levels)[0], abs(finer.grid(16).logsnr) <= 3
    assert len(plan.levels) > 1 and plan.cost == pytest.approx(own + inside.sum() * GUIDE.flops) and not inside.all()


def test_the_example_runs(tmp_path, monkeypatch, request) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr("sys.argv", ["-", "--quick", "--out", str(tmp_path), "--weights", str(tmp_path)])
    runpy.run_path(str(request.config.rootpath / "docs" / "guidance.py"), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} >= {"guidance.json", "guidance.csv", "guidance.png"}
