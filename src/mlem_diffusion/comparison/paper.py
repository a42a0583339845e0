"""The paper's protocol (arXiv:2603.24594): EM and ML-EM by DDPM and DDIM on grids even in t, with constant or learned
probabilities and three uses of coins: fresh coins for each image; one pattern of coins shared by all images, at random;
and the best of several shared patterns. The best is chosen on other samples than it is judged on. A chosen pattern is a
fixed quadrature, so its estimate is no longer unbiased."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import sem

from ..diffusion.level import Level
from .settings import Measurement, SamplerSetting, settings_of

_SUMS = ("top_evaluations", "diverged")
_MEANS = ("error", "error_to_half", "network_calls", "gflops_expected", "gflops_realised", "seconds")


def fresh_settings(config: Any, levels: Mapping[str, Level], base_steps: int) -> list[SamplerSetting]:
    """EM with each level, and ML-EM with constant probabilities and fresh coins, of a `compare.paper` configuration."""
    sweeps = {"baselines": config["baselines"], "stitched": []}
    sweeps["ml_em"] = [{**sweep, "coins": ["independent"]} for sweep in config["ml_em"]]
    return [replace(setting, protocol="paper") for setting in settings_of(sweeps, levels, base_steps)]


@dataclass(frozen=True)
class Patterns:
    """Shared patterns of the coins of one setting: all that are tried, and the best on other samples."""

    trials: Sequence[SamplerSetting]
    best: SamplerSetting

    def pooled(self, found: Mapping[SamplerSetting, Measurement]) -> tuple[SamplerSetting, Measurement]:
        """A pattern at random: the mean over all trials, with errors [P, m] of P patterns and m samples.
        "error_spread" is the standard deviation of the error over patterns."""
        parts = [found[trial] for trial in self.trials]
        errors, rows = np.stack([part.errors for part in parts]), [part.row for part in parts]
        row = {key: value for key, value in rows[0].items() if key not in ("pattern", "diverged")}
        row |= {key: sum(r.get(key, 0) for r in rows) for key in _SUMS if any(key in r for r in rows)}
        sound = "diverged" not in row
        row |= {key: _mean([r[key] for r in rows]) for key in _MEANS if key in row}
        spread, over_samples = float(errors.mean(axis=1).std(ddof=1)), float(sem(errors.mean(axis=0)))
        row["error_spread"] = spread if sound else None
        row["error_se"] = float(np.hypot(spread / np.sqrt(len(parts)), over_samples)) if sound else None
        keys = dict.fromkeys(key for part in parts for key in part.work)  # in some patterns a level never fires
        work = {key: float(np.mean([part.work.get(key, 0.0) for part in parts])) for key in keys}
        return replace(self.trials[0], pattern=None), Measurement(row, errors, parts[0].images, work)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(np.array(values, dtype=np.float64)))


def trials_of(setting: SamplerSetting, count: int) -> list[SamplerSetting]:
    """The setting with each of the first `count` patterns of its coins shared by all samples."""
    return [replace(setting, coins="shared", pattern=i) for i in range(count)]


def choose(trials: Sequence[SamplerSetting], found: Mapping[SamplerSetting, Measurement]) -> Patterns:
    """The patterns of one setting; found: measured on the samples that choose, where the best has the least error."""
    errors = [np.inf if (e := found[trial].row["error"]) is None else e for trial in trials]
    best = replace(trials[int(np.argmin(errors))], coins=f"best of {len(trials)}")
    return Patterns(trials, best)
