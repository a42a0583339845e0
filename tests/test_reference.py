"""References: fine enough, better by extrapolation, and what refining them changes tells what is left."""

import numpy as np
import pytest
from toys import process

from mlem_diffusion.comparison.bias import bias_text
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.reference import reference_evaluations, reference_steps, sample_reference
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import step_rule
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


@pytest.mark.parametrize(("rule", "largest"), [("sde/ddpm", 0.03), ("sde/em", 0.03), ("ode/ddim", 1e-3)])
def test_a_reference_eight_times_finer_leaves_little_bias(rule, largest):
    """The analytic family, 17 steps, 24 seeds. DDPM itself as the reference would leave more than 10% (SDE)."""
    fine, level, path = process(1025, "logsnr"), analytic_family(4)[-1], BrownianPath(range(24), (1, 4, 4))
    dynamics = rule.split("/")[0]

    def run(by, steps):
        return sample(SingleLevel(level), step_rule(by), fine.grid(steps), path)[0]

    (whole, half), (finest, _) = (sample_reference(level, dynamics, fine, steps, path) for steps in (129, 1025))
    error, before, limit = (squared_errors(run(rule, 17), to).mean() for to in (whole, half, finest))
    assert abs(error / limit - 1) < largest and abs(before - error) / 3 < largest * error  # what is left, and stated
    if dynamics == "sde":
        assert abs(squared_errors(run(rule, 17), run("sde/ddpm", 129)).mean() / limit - 1) > 0.1
    else:  # Richardson extrapolation makes rms errors 15 times smaller
        plain, extrapolated = (squared_errors(images, finest).mean() for images in (run("ode/dpmpp_2m", 129), whole))
        assert 15**2 * extrapolated < plain < 1e-7


def test_a_large_bias_is_a_warning():
    entry = {"steps": 65, "finest": 9, "bias": 0.02, "setting": "DDPM, w8, 9 steps"}
    lines = bias_text({"sde": entry, "ode": entry | {"bias": 0.25}}).splitlines()
    assert "sde 2% (of 65 steps), ode 25%" in lines[0] and len(lines) == 2
    assert lines[1].startswith("warning: the ode reference") and "DDPM, w8, 9 steps by 25%" in lines[1]
