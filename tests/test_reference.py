"""References: fine enough, better by extrapolation, and what refining them changes tells what is left."""

import numpy as np
import pytest
from toys import process

from mlem_diffusion.comparison.bias import bias_text
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.reference import reference_evaluations, reference_steps, sample_reference
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import REFERENCE_RULE
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.analytic import analytic_family
from mlem_diffusion.statistics import squared_errors


def test_the_reference_has_eight_times_as_many_intervals_as_the_finest_grid():
    fine = process(513)
    assert [reference_steps(fine, steps) for steps in ([64, 8], [65], [32], [9], [2])] == [513, 513, 257, 65, 9]
    assert np.array_equal(fine.grid(257).index, fine.grid(513).index[::2])  # the half of a grid is nested in it
    with pytest.raises(UserError, match=r"grid of 66 steps needs process.base_steps = 521 or more"):
        reference_steps(fine, [8, 66])
    assert (reference_evaluations("sde", 513), reference_evaluations("ode", 513)) == (513 + 257, 513 + 257 + 129)


@pytest.mark.parametrize("dynamics", ["sde", "ode"])
def test_extrapolation_helps_and_the_last_change_of_an_error_is_as_large_as_what_is_left(dynamics):
    """The analytic family; a reference 8 to 16 times finer than the grids, against one 8 times finer still.

    Terms of the order 1/N^2 (a quarter) and rounding (a thousandth of the error) aside. RMS errors of the extrapolated
    ODE are 15 times smaller than without."""
    fine, level, path = process(1025, "logsnr"), analytic_family(4)[-1], BrownianPath(range(24), (1, 4, 4))

    def run(steps):
        return sample(SingleLevel(level), REFERENCE_RULE[dynamics], fine.grid(steps), path)[0]

    (whole, half), (finest, _) = (sample_reference(level, dynamics, fine, steps, path) for steps in (129, 1025))
    for steps in (9, 17):
        here, before, limit = (squared_errors(run(steps), to).mean() for to in (whole, half, finest))
        assert abs(here - limit) < 1.25 * abs(before - here) + 1e-3 * here < 0.3 * here
    plain, extrapolated = (squared_errors(images, finest).mean() for images in (run(129), whole))
    assert plain == extrapolated if dynamics == "sde" else 15**2 * extrapolated < plain < 1e-7


def test_a_large_bias_is_a_warning():
    entry = {"steps": 65, "finest": 9, "bias": 0.02, "setting": "DDPM, w8, 9 steps"}
    lines = bias_text({"sde": entry, "ode": entry | {"bias": 0.25}}).splitlines()
    assert "sde 2% (of 65 steps), ode 25%" in lines[0] and len(lines) == 2
    assert lines[1].startswith("warning: the ode reference") and "DDPM, w8, 9 steps by 25%" in lines[1]
