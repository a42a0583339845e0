"""The comparison: each setting against one fine reference on the same seeds and Brownian paths.

Every batch of a reference and every finished setting is one npz file under a hash of all that it depends on, so a
stopped comparison can resume.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Ledger, Level, joined
from ..diffusion.process import Process, TimeGrid
from ..diffusion.sampler import Estimator, SingleLevel, sample
from ..diffusion.step_rules import REFERENCE_RULE
from ..errors import Interrupted, UserError
from ..files import cached, read_arrays, write_arrays
from ..multilevel.plan import Plan
from ..parallel import never
from ..statistics import squared_errors, standard_error
from .features import Extractor
from .settings import Measurement, SamplerSetting

ABSURD = 1e3  # size of a pixel value; pixels are in [-1, 1], and no working sampler comes near it
_PATHS = 2  # batches whose noise is kept for the next setting; each takes at most brownian.WINDOW_BYTES


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
    plans: dict[str, Plan] = field(default_factory=dict)
    reference_steps: int | None = None  # None: the base grid
    _paths: dict[int, BrownianPath] = field(default_factory=dict, init=False, repr=False)
    _references: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def reference_grid(self) -> TimeGrid:
        return self.process.grid(self.reference_steps)

    def build(self, setting: SamplerSetting) -> Estimator:
        return setting.build(self.levels, self.gamma, self.plans)

    def expected_flops(self, setting: SamplerSetting) -> float:
        """Expected FLOPs of a setting over all samples."""
        return self.build(setting).expected_flops(setting.evaluations(self.process)) * len(self.seeds)

    def reference_flops(self, dynamics: str) -> float:
        """FLOPs of a reference over all its samples."""
        evaluations = len(REFERENCE_RULE[dynamics].program(self.reference_grid))
        return list(self.levels.values())[-1].flops * evaluations * self.num_reference

    def warm_up(self) -> None:
        """Evaluate each level once, so that first-call overheads do not enter the seconds of any setting."""
        x = torch.zeros(min(self.batch, len(self.seeds)), *self.shape, device=self.device)
        with torch.no_grad():
            for level in self.levels.values():
                level.denoise(x, torch.zeros((), device=self.device))

    # ------------------------------------------------------------------------------------------ references

    def _reference_files(self, dynamics: str) -> list[Path]:
        """The file of each batch."""
        file = self._file("reference", {"dynamics": dynamics})
        return [file.with_stem(f"{file.stem}-{i}") for i in range(-(-self.num_reference // self.batch))]

    def reference_tasks(self, dynamics: str) -> list[tuple[str, int]]:
        """(dynamics, batch number) of each batch of a reference that is not done."""
        return [(dynamics, i) for i, file in enumerate(self._reference_files(dynamics)) if not file.is_file()]

    def measure_reference(self, dynamics: str, i: int) -> None:
        """Sample a batch of a reference: the largest level on the finest grid."""
        seeds = self.seeds[: self.num_reference][i * self.batch : (i + 1) * self.batch]
        estimator, path = SingleLevel(list(self.levels.values())[-1]), BrownianPath(seeds, self.shape, self.device)
        images, _ = sample(estimator, REFERENCE_RULE[dynamics], self.reference_grid, path)
        write_arrays(self._reference_files(dynamics)[i], {"images": images.cpu().numpy()})

    def reference(self, dynamics: str) -> Tensor:
        """The reference samples [num_reference, *shape], float32 on the CPU; UserError if they are not finite."""
        if dynamics not in self._references:
            parts = []
            for i, file in enumerate(self._reference_files(dynamics)):
                parts.append(cached(file, _read, lambda i=i: self.measure_reference(dynamics, i))["images"])
            images = torch.from_numpy(np.concatenate(parts))
            if not images.isfinite().all():
                raise UserError(
                    f"The reference of the {dynamics.upper()} is not finite: train its largest level longer."
                )
            self._references[dynamics] = images
        return self._references[dynamics]

    # -------------------------------------------------------------------------------------------- settings

    def is_done(self, setting: SamplerSetting) -> bool:
        return self._file("setting", setting.row).is_file()

    def measure(self, setting: SamplerSetting, should_stop: Callable[[], bool] = never) -> None:
        """Run all batches of a setting and write its file; raises Interrupted between batches."""
        estimator, parts, ledgers = self.build(setting), [], []
        for start in range(0, len(self.seeds), self.batch):
            if should_stop():
                raise Interrupted("stopped; finished settings are saved")
            arrays, ledger = self._batch(setting, estimator, start)
            parts.append(arrays)
            ledgers.append(ledger)
        total = joined(ledgers)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        errors, lost = arrays["errors"], int(arrays.pop("diverged").sum())
        spread = np.nan if lost else standard_error(errors, arrays["clusters"][: len(errors)])
        costs = {
            "error": None if lost else float(errors.mean()),  # undefined if a sample has diverged
            "error_se": spread if np.isfinite(spread) else None,  # not finite if all samples share one coin draw
            "network_calls": total.calls_per_image,
            "gflops_expected": estimator.expected_flops(setting.evaluations(self.process)) / 1e9,
            "gflops_realised": total.flops_per_image / 1e9,
            "seconds": total.seconds_per_image,
            # only in the samples that the error averages
            "top_evaluations": int(total.per_sample[: len(errors), -1].sum()),
        }
        costs |= {"diverged": lost} if lost else {}
        write_arrays(self._file("setting", setting.row), {"costs": json.dumps(costs), **arrays})

    def _batch(self, setting: SamplerSetting, estimator: Estimator, start: int) -> tuple[dict[str, Any], Ledger]:
        path = self._path(start)
        images, ledger = sample(estimator, setting.rule, self.process.grid(setting.steps), path)
        images, reference = images.cpu(), self.reference(setting.dynamics)[start : start + len(path.seeds)]
        out = {
            "diverged": diverged(images),
            "errors": squared_errors(images[: len(reference)], reference),
            "clusters": np.array(estimator.clusters(path.seeds)),
        }
        if self.extractor is not None:
            pixels = to_uint8(images.nan_to_num())
            out["features"] = self.extractor.features(pixels).numpy()
            out["images"] = pixels[: max(0, self.grid_images - start)].numpy()
        return out, ledger

    def read(self, setting: SamplerSetting) -> Measurement:
        """A finished setting; it is measured again if its file is missing or damaged."""
        arrays = cached(self._file("setting", setting.row), _read, lambda: self.measure(setting))
        return Measurement(setting.row | json.loads(str(arrays.pop("costs"))), **arrays)

    def _path(self, start: int) -> BrownianPath:
        """The randomness of the batch at this position. Neighbouring settings share its noise."""
        if start not in self._paths:
            while len(self._paths) >= _PATHS:
                self._paths.pop(next(iter(self._paths)))
            self._paths[start] = BrownianPath(self.seeds[start : start + self.batch], self.shape, self.device)
        return self._paths[start]

    def _file(self, kind: str, what: Any) -> Path:
        sizes = [self.seeds[0], len(self.seeds), self.num_reference]
        asked = [kind, what, self.key, *sizes, self.gamma, self.grid_images, self.batch, self.reference_steps]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return self.cache / f"{kind}-{digest[:20]}.npz"


def _read(path: Path) -> dict[str, Any]:
    return read_arrays(path, "remove it and run the same command again")


def diverged(images: Tensor) -> np.ndarray:
    """bool [N]: which images [N, C, H, W] have a value that is not finite or is at least ABSURD in size."""
    return ~(images.abs().flatten(1).amax(1) < ABSURD).numpy()
