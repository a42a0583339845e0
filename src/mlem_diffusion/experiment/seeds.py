"""The sample seeds of an experiment: which of them measure, which select, and which judge."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Seeds:
    """Sample seeds that measure gains and single levels, that select plans, and of the comparison; none is in two."""

    calibration: range
    selection: range
    judgement: range
    errors: range  # of `judgement`, the first
    distances: range  # of `judgement`
    patterns: range  # those that choose shared patterns, from the first of `selection`


def sample_seeds(cfg: Any) -> Seeds:
    """The seeds of a configuration; UserError if those of the comparison meet the others."""
    o, c = cfg.optimise, cfg.compare
    calibration = range(o.seed, o.seed + max(o.calibrate, o.diagnose.seeds))
    selection = range(calibration.stop, calibration.stop + o.num_select)
    errors, distances = (range(c.seed, c.seed + count) for count in (c.num_samples, c.num_distance))
    patterns = range(selection.start, selection.start + c.paper.patterns.select)
    judgement, last = range(c.seed, max(errors.stop, distances.stop)), max(selection.stop, patterns.stop)
    if judgement.start < last and calibration.start < judgement.stop:
        text = f"The comparison's sample seeds, {c.seed} to {judgement.stop - 1}, meet those that make and select plans"
        raise UserError(f"{text}, {o.seed} to {last - 1}: change compare.seed or optimise.seed.")
    return Seeds(calibration, selection, judgement, errors, distances, patterns)
