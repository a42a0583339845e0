"""The comparison: each configured setting against one fine reference on the same seeds and Brownian paths.

A setting is one row of compare.csv. Finished settings are cached on disk under a hash of everything that they depend
on, so a stopped comparison can resume.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import WINDOW_BYTES, path_increments
from ..diffusion.estimator import Estimator, SingleLevel
from ..diffusion.ledger import Ledger
from ..diffusion.level import Level
from ..diffusion.process import Process, TimeGrid
from ..diffusion.sampler import sample
from ..diffusion.step_rules import REFERENCE_RULE, step_rule_of
from ..errors import UserError
from ..files import read_arrays, write_arrays
from ..multilevel.plan import Plan
from ..parallel import Arrays, Job
from ..statistics import squared_errors, standard_error
from .features import Extractor
from .settings import SamplerSetting

_REMOVE = "remove it and run the same command again"  # advice for a damaged file of the cache


@dataclass(frozen=True)
class Runner:
    """The data that all settings of one comparison share."""

    levels: dict[str, Level]
    process: Process
    gamma: float
    shape: tuple[int, ...]
    seeds: list[int]
    num_reference: int
    batch: int
    device: torch.device
    extractor: Extractor | None  # None: no distances
    cache: Path
    key: str  # hash of the weights, process and extractor
    grid_images: int = 12
    plans: Mapping[str, Plan] = field(default_factory=dict)
    reference_steps: int | None = None  # None: the base grid
    made_with: Mapping[str, Any] | None = None  # family.identity_of the levels; artefacts record it

    @property
    def reference_grid(self) -> TimeGrid:
        return self.process.grid(self.reference_steps)

    def build(self, setting: SamplerSetting) -> Estimator:
        return setting.build(self.levels, self.gamma, self.plans)

    def _path(self, kind: str, what: dict[str, Any]) -> Path:
        asked = json.dumps(
            [
                kind,
                what,
                self.key,
                self.seeds[0],
                len(self.seeds),
                self.num_reference,
                self.gamma,
                self.grid_images,
                self.batch,
                self.reference_steps,
            ],
            sort_keys=True,
        )
        return self.cache / f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:20]}.npz"

    def warm_up(self) -> None:
        """Evaluate each level once, so that first-call overheads do not enter the seconds of any setting."""
        x = torch.zeros(min(self.batch, len(self.seeds)), *self.shape, device=self.device)
        for level in self.levels.values():
            level.denoise(x, torch.zeros(len(x), device=self.device))

    def reference_path(self, dynamics: str) -> Path:
        return self._path("reference", {"dynamics": dynamics})

    def reference_job(self, dynamics: str) -> Job:
        """The job that samples the reference of one dynamics, in batches."""
        path, grid = self.reference_path(dynamics), self.reference_grid
        estimator, rule = SingleLevel(list(self.levels.values())[-1]), REFERENCE_RULE[dynamics]

        def work(i: int) -> Arrays:
            seeds = self.seeds[: self.num_reference][i * self.batch : (i + 1) * self.batch]
            images, _ = sample(estimator, grid, dynamics, rule, seeds, self.shape, self.device)
            return {"images": images.cpu().numpy()}

        return Job(path, -(-self.num_reference // self.batch), work, lambda arrays: write_arrays(path, arrays))

    def read_reference(self, dynamics: str) -> Tensor:
        """The stored reference samples of one dynamics. Raises UserError if they are not finite."""
        images = read_arrays(self.reference_path(dynamics), _REMOVE)["images"]
        if not np.isfinite(images).all():
            raise UserError(
                f"The reference of the {dynamics.upper()}, the largest level on the finest grid, is not finite, so "
                "nothing can be compared with it: train the largest level longer or with a lower train.lr."
            )
        return torch.from_numpy(images)

    def reference(
        self,
        dynamics: str,
        should_stop: Callable[[], bool] = parallel.never,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Samples [num_reference, *shape] of the largest level on the finest grid, in float32 on the CPU.

        Collective: all processes call it, share the batches and get all samples. Raises Interrupted between batches."""
        parallel.run_jobs([self.reference_job(dynamics)], should_stop, progress)
        return parallel.from_main(lambda: self.read_reference(dynamics))

    def is_done(self, setting: SamplerSetting) -> bool:
        return self._path("setting", asdict(setting)).is_file()

    def setting_job(self, setting: SamplerSetting, reference: Tensor, noise: NoiseCache) -> Job:
        """The job that runs one setting, in batches.

        Its seconds per image are device seconds: summed over the batches, divided by the number of images. They do not
        depend on how many devices share the work."""
        path, estimator, grid = (
            self._path("setting", asdict(setting)),
            self.build(setting),
            self.process.grid(setting.steps),
        )
        clock = step_rule_of(setting.dynamics, setting.step_rule).clock

        def work(i: int) -> Arrays:
            start, seeds = i * self.batch, self.seeds[i * self.batch : (i + 1) * self.batch]
            increments = noise.get(self, setting.steps, clock, seeds)
            images, ledger = sample(
                estimator, grid, setting.dynamics, setting.step_rule, seeds, self.shape, self.device, increments
            )
            images = images.cpu()
            compared = reference[start : start + len(seeds)]
            out = {
                "diverged": diverged(images),
                "errors": squared_errors(images[: len(compared)], compared) if len(compared) else np.empty(0),
                "clusters": np.array(estimator.clusters(seeds)),
                "evaluations": ledger.per_sample,
                "seconds": np.array([ledger.seconds]),
            }
            if self.extractor is not None:
                pixels = to_uint8(images.nan_to_num())
                out["features"] = self.extractor.features(pixels).numpy()
                out["images"] = pixels[: max(0, self.grid_images - start)].numpy()
            return out

        def write(arrays: Arrays) -> None:
            error, lost = arrays["errors"], int(arrays["diverged"].sum())
            total = Ledger([level.flops for level in estimator.levels], len(self.seeds), float(arrays["seconds"].sum()))
            total.per_sample = arrays["evaluations"]
            costs = {
                # the mean is undefined if a sample has diverged
                "error": None if lost else float(error.mean()),
                "error_se": None if lost else finite(standard_error(error, arrays["clusters"][: len(error)])),
                "network_calls": total.calls_per_image,
                "gflops_expected": estimator.expected_flops(setting.evaluations(self.process)) / 1e9,
                "gflops_realised": total.flops_per_image / 1e9,
                "seconds": total.seconds_per_image,
                # only in the samples that the error averages
                "top_evaluations": int(total.per_sample[: len(error), -1].sum()),
            }
            if lost:
                costs["diverged"] = lost
            stored = {name: arrays[name] for name in ("errors", "clusters", "features", "images") if name in arrays}
            write_arrays(path, {"costs": json.dumps(costs), **stored})

        return Job(path, -(-len(self.seeds) // self.batch), work, write)

    def read(self, setting: SamplerSetting) -> dict[str, Any]:
        """Row values, errors [num_reference], clusters, features [n, D] and the first images of a finished setting."""
        stored: dict[str, Any] = read_arrays(self._path("setting", asdict(setting)), _REMOVE)
        return stored | {"costs": json.loads(str(stored["costs"]))}

    def run(
        self,
        setting: SamplerSetting,
        reference: Tensor,
        noise: NoiseCache,
        should_stop: Callable[[], bool] = parallel.never,
    ) -> dict[str, Any]:
        """Run a setting unless it is finished, and return its `read`. Collective and interruptible like `reference`."""
        parallel.run_jobs([self.setting_job(setting, reference, noise)], should_stop)
        return parallel.from_main(lambda: self.read(setting))


ABSURD = 1e3  # size of a pixel value; pixels are in [-1, 1], and no working sampler comes near it


def diverged(images: Tensor) -> np.ndarray:
    """bool [N]: which images [N, C, H, W] have a value that is not finite or is at least ABSURD in size."""
    return ~(images.abs().flatten(1).amax(1) < ABSURD).numpy()


def finite(value: float) -> float | None:
    """The value, or None if JSON cannot hold it (e.g. the standard error if all samples share one coin draw)."""
    return value if np.isfinite(value) else None


class NoiseCache:
    """Caches the increments of the last few (steps, clock, seeds), because neighbouring settings share them."""

    def __init__(self, entries: int = 2):
        self.entries, self.cached = entries, {}

    def get(self, runner: Runner, steps: int, clock: str | None, seeds: Sequence[int]) -> Tensor | None:
        if clock is None or 4 * (steps - 1) * len(seeds) * math.prod(runner.shape) > WINDOW_BYTES:
            return None  # no increments, or too many to cache: the sampler draws them step by step
        key = (steps, clock, seeds[0], len(seeds))
        if key not in self.cached:
            while len(self.cached) >= self.entries:
                self.cached.pop(next(iter(self.cached)))
            self.cached[key] = path_increments(seeds, runner.shape, runner.process.grid(steps), clock, runner.device)
        return self.cached[key]
