"""Seconds per image of the parts of a sampler, each timed apart and repeatedly on an otherwise idle machine.

The seconds of a sampler setting are the sum of (how often each part occurs) times (the seconds of that part). So all
settings are timed under the same conditions, and the spread of each timing enters the bounds of speed-ups."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Work = Mapping[str, float]  # how often each part occurs per image


@dataclass(frozen=True)
class Timing:
    """parts: {name: (median seconds per image and occurrence, standard deviation of its logarithm over repetitions)}.

    A level's part has its name; other parts are the sampler's own work, see `measure_timing`."""

    parts: Mapping[str, tuple[float, float]]

    def seconds(self, work: Work) -> float:
        """Seconds per image."""
        return sum(count * self.parts[name][0] for name, count in work.items())

    def draws(self, works: list[Work], replicates: int, seed: int) -> np.ndarray:
        """Seconds per image [S, 1 + R] of S settings: first by the medians, then by R random draws of all timings, each
        shared by all settings."""
        names = list(self.parts)
        median, spread = np.array([self.parts[name] for name in names]).T
        normal = np.random.default_rng(seed).standard_normal((len(names), replicates))
        normal = np.concatenate([np.zeros((len(names), 1)), normal], axis=1)
        counts = np.array([[work.get(name, 0.0) for name in names] for work in works]).reshape(len(works), len(names))
        return counts @ (median[:, None] * np.exp(spread[:, None] * normal))
