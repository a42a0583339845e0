"""The sample seeds of an experiment: calibration, selection and judgement never share one."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Seeds:
    """Those that measure gains and errors of single levels, that select among plans, and those of the comparison."""

    calibration: range
    selection: range
    judgement: range


def sample_seeds(cfg: Any) -> Seeds:
    """The seeds of a configuration; UserError if those of the comparison meet the others."""
    o, c = cfg.optimise, cfg.compare
    calibration = range(o.seed, o.seed + max(o.calibrate, o.diagnose.seeds))
    selection = range(calibration.stop, calibration.stop + o.num_select)
    judgement = range(c.seed, c.seed + c.num_samples)
    if judgement.start < selection.stop and calibration.start < judgement.stop:
        text = f"The comparison's sample seeds, {c.seed} to {judgement.stop - 1}, meet those that make and select plans"
        raise UserError(f"{text}, {o.seed} to {selection.stop - 1}: change compare.seed or optimise.seed.")
    return Seeds(calibration, selection, judgement)
