"""References: fine enough, better by extrapolation, and with a bias that is bounded by what refining them changes."""

import numpy as np
import pytest
from toys import process

from mlem_diffusion.comparison.bias import bias_text
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.reference import reference_evaluations, reference_steps, sample_reference
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.statistics import squared_errors

PROCESS, TOP = Process(LinearSchedule(), base_steps=1025), analytic_family(4)[-1]
PATH = BrownianPath(range(24), (1, 4, 4))


@pytest.mark.parametrize(("steps", "found"), [([64, 8], 513), ([65], 513), ([32], 257), ([2], 9), ([9], 65)])
def test_the_reference_has_eight_times_as_many_intervals_as_the_finest_grid(steps, found):
    assert reference_steps(process(513), steps) == found
    assert np.isin(process(513).grid(found // 2 + 1).index, process(513).grid(found).index).all()  # the half is nested


def test_a_base_grid_that_is_too_coarse_is_refused():
    with pytest.raises(UserError, match=r"grid of 66 steps needs process.base_steps = 521 or more"):
        reference_steps(process(513), [8, 66])
    assert reference_steps(process(100), [8]) == 100  # 99 intervals have no half
    assert (reference_evaluations("sde", 513), reference_evaluations("ode", 513)) == (513 + 257, 513 + 257 + 129)


def test_extrapolation_makes_the_ode_reference_better():
    """On the analytic family, against a reference with 8 times as many intervals: RMS errors 15 times smaller."""
    (whole, half), fine = (sample_reference(TOP, "ode", PROCESS, n, PATH) for n in (129, 1025))
    plain = sample(SingleLevel(TOP), REFERENCE_RULE["ode"], PROCESS.grid(129), PATH)[0]
    errors = [float(squared_errors(images, fine[0]).mean()) for images in (plain, whole, half)]
    assert 15**2 * errors[1] < errors[0] < 1e-7 and errors[1] < errors[2] < errors[0]


@pytest.mark.parametrize("dynamics", ["sde", "ode"])
def test_the_change_of_an_error_by_refining_is_as_large_as_what_is_left(dynamics):
    """Grids 8 and 16 times coarser than a reference that is itself 8 times coarser than the finest: terms of the order
    1/N^2 (a quarter) and rounding (a thousandth of the error) aside."""
    (whole, half), (finest, _) = (sample_reference(TOP, dynamics, PROCESS, n, PATH) for n in (129, 1025))
    for steps in (9, 17):
        images = sample(SingleLevel(TOP), REFERENCE_RULE[dynamics], PROCESS.grid(steps), PATH)[0]
        here, before, limit = (squared_errors(images, to).mean() for to in (whole, half, finest))
        assert abs(here - limit) < 1.25 * abs(before - here) + 1e-3 * here < 0.3 * here


def test_a_large_bias_is_a_warning():
    entry = {"steps": 65, "finest": 9, "bias": 0.02, "setting": "DDPM, w8, 9 steps"}
    lines = bias_text({"sde": entry, "ode": entry | {"bias": 0.25}}).splitlines()
    assert "sde 2% (of 65 steps), ode 25%" in lines[0] and len(lines) == 2
    assert lines[1].startswith("warning: the ode reference") and "DDPM, w8, 9 steps by 25%" in lines[1]
    assert bias_text({"sde": {"steps": 65, "finest": 9}}) == ""
