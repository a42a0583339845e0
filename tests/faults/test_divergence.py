"""Numbers that are not finite are reported: training stops, and a diverging sampler is a row without an error."""

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pipeline import Place, outputs
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.models.family import load_state


def test_training_that_diverges_keeps_a_finite_state_and_can_begin_again(done, here, tmp_path):
    place = done[0].copy_to(tmp_path, "data")
    options = ("train.lr=1e30", "train.save_every=0", "train.log_every=64", "workers=1")
    assert re.search(r"not finite at step \d+", here("train_levels", place, *options, code=2).complaint)
    for path in place.checkpoints.rglob("state.pt"):
        numbers = [leaf for leaf in tree_leaves(load_state(path)) if isinstance(leaf, torch.Tensor | float)]
        assert numbers and all(torch.isfinite(torch.as_tensor(number)).all() for number in numbers)
    here("train_levels", place, "overwrite=true")  # as the sentence says
    assert outputs(place, "train_levels") == outputs(done[0], "train_levels")


def broken_family(broken: int = -1, above: float = 0.0, **settings: float) -> list[Level]:
    """The analytic family, except that level number `broken` returns NaN at log-SNRs above `above`."""
    levels = analytic_family(**settings)  # type: ignore[arg-type]
    level = levels[broken]

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        fails = (logsnr > above).reshape(-1, 1, 1, 1)  # one noise level for all, or one per sample
        return torch.where(fails, torch.full_like(x, float("nan")), level.denoise(x, logsnr))

    levels[broken] = replace(level, denoise=denoise)
    return levels


OPTIONS = (
    "process.base_steps=129", "timing={rounds:1,at_least:0}", "optimise.measured.steps=[9]", "metrics._target_=null",
    "compare.plans=none", "compare.gamma=2.5", "protocol=strict",
    "+family.callable.broken=1", "family.callable.levels=4", "family.callable._target_=test_divergence.broken_family",
    "compare.num_samples=12", "compare.batch=6", "compare.bootstrap=20",
    "compare.baselines=[{dynamics:sde,step_rule:ddpm,levels:all,steps:[9]}]",
    "compare.stitched=[{dynamics:sde,step_rule:ddpm,sequences:[[1,3],[3,0]],switch:[[0.5]],steps:[17]}]",
    "compare.ml_em=[{dynamics:sde,step_rule:ddpm,families:[all,[0,2,3]],coins:[systematic],c:[4],steps:[17]}]",
    "optimise.calibrate=8", "optimise.calibrate_steps=9", "optimise.num_select=8", "optimise.plans=2",
    "optimise.rules=[{dynamics:sde,step_rule:ddpm,steps:[9],learn:false}]", "workers=1",
)  # fmt: skip


@pytest.fixture
def analytic(tmp_path: Path) -> Place:
    """The closed-form family with one level that fails above a noise level."""
    return Place(tmp_path, "analytic", OPTIONS)


def test_samplers_that_diverge_are_rows_without_an_error(analytic, here):
    tables = []
    for above in (100, 0):  # no sampler reaches a log-SNR of 100
        run = here("sample_compare", analytic, f"+family.callable.above={above}")
        tables.append(pd.read_csv(analytic.results / "compare.csv", keep_default_na=False))
    assert "diverged" in run.out and (analytic.results / "compare.png").is_file()
    healthy, found = tables
    shared = ["dynamics", "step_rule", "estimator", "levels", "c", "steps"]
    assert found[shared].equals(healthy[shared])
    uses = found.levels.str.split("+").map(lambda levels: "f2" in levels)
    assert uses.any() and not uses.all()
    assert (found.error[uses & (found.estimator == "single")] == "").all()
    assert (found.error[~uses].astype(float) == healthy.error[~uses].astype(float)).all()


@pytest.mark.parametrize(("stage", "broken", "sentence"), [
    ("sample_compare", 3, "The reference of the SDE"), ("optimise", 1, "f2 returns values that are not finite"),
])  # fmt: skip
def test_a_reference_or_a_plan_that_needs_the_failing_level_is_refused(analytic, here, stage, broken, sentence):
    run = here(stage, analytic, "+family.callable.above=0", f"family.callable.broken={broken}", code=2)
    assert sentence in run.complaint
