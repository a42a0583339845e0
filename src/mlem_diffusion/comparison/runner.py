"""The comparison: each setting against one fine reference on the same seeds and Brownian paths.
To resume, every batch of a reference and every finished setting is one npz file under a hash of all it depends on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import sem
from torch import Tensor

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.conditions import ConditionsOf
from ..diffusion.level import Ledger, Level, joined
from ..diffusion.process import Process
from ..diffusion.reference import reference_evaluations, sample_reference
from ..diffusion.sampler import Estimator, sample
from ..errors import Interrupted, UserError
from ..files import cached, read_arrays, write_arrays
from ..multilevel.plan import Plan
from ..multilevel.timing import Timing, random_work, work_of
from ..statistics import squared_errors
from .features import Extractor
from .settings import Measurement, SamplerSetting

ABSURD = 1e3  # size of a pixel value; pixels are in [-1, 1], and no working sampler comes near it
_KINDS = ("images", "half")  # the reference, and that on half of its grid
_read = partial(read_arrays, hint="remove it and run the same command again")


@dataclass(frozen=True)
class Runner:
    """The data that all settings of one comparison share."""

    levels: dict[str, Level]
    process: Process
    gamma: float
    shape: tuple[int, ...]
    seeds: list[int]
    batch: int
    device: torch.device
    extractor: Extractor | None  # None: no distances
    distance_seeds: Sequence[int]  # those of distances
    num_shared: int  # the first of the seeds, on which each of several shared patterns runs
    cache: Path
    key: str  # hash of the weights and process
    grid_images: int = 12
    plans: dict[str, Plan] = field(default_factory=dict)
    reference_steps: Mapping[str, int] = field(default_factory=dict)  # {dynamics: noise levels of its reference}
    timing: Timing | None = None  # without it, rows have no seconds
    conditions: ConditionsOf = None  # of the samples, by seeds
    decode: Callable[[Tensor], Tensor] | None = None  # latents to images, for grids and distances
    _references: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def path(self, seeds: Sequence[int]) -> BrownianPath:
        return BrownianPath(seeds, self.shape, self.device, self.conditions)

    def build(self, setting: SamplerSetting) -> Estimator:
        return setting.build(self.levels, self.gamma, self.plans)

    def expected_flops(self, setting: SamplerSetting) -> float:
        """Expected FLOPs of a setting over all samples."""
        return self._flops(self.build(setting), setting) * len(self.seeds_of(setting))

    def _flops(self, estimator: Estimator, setting: SamplerSetting) -> float:
        """Expected FLOPs per image."""
        visits = setting.visits(self.process)
        return estimator.expected_flops(len(visits), visits)

    def seeds_of(self, setting: SamplerSetting) -> list[int]:
        return self.seeds[: self.num_shared] if setting.coins == "shared" else self.seeds

    def reference_flops(self, dynamics: str) -> float:
        """FLOPs of a reference over all its samples."""
        evaluations = reference_evaluations(dynamics, self.reference_steps[dynamics])
        return list(self.levels.values())[-1].flops * evaluations * len(self.seeds)

    def _reference_files(self, dynamics: str) -> list[Path]:
        file = self._file("reference", dynamics, len(self.seeds))
        return [file.with_stem(f"{file.stem}-{i}") for i in range(-(-len(self.seeds) // self.batch))]

    def reference_tasks(self, dynamics: str) -> list[tuple[str, int]]:
        """(dynamics, batch number) of each batch of a reference that is not done."""
        return [(dynamics, i) for i, file in enumerate(self._reference_files(dynamics)) if not file.is_file()]

    def measure_reference(self, dynamics: str, i: int) -> None:
        """Sample a batch of a reference and of its check on half of the grid."""
        seeds = self.seeds[i * self.batch : (i + 1) * self.batch]
        top, steps = list(self.levels.values())[-1], self.reference_steps[dynamics]
        found = sample_reference(top, dynamics, self.process, steps, self.path(seeds))
        arrays = (part.cpu().numpy() for part in found)
        write_arrays(self._reference_files(dynamics)[i], dict(zip(_KINDS, arrays, strict=True)))

    def reference(self, dynamics: str) -> Tensor:
        """The reference samples [n, *shape], float32 on the CPU; UserError if they are not finite."""
        return self.references(dynamics)[0]

    def references(self, dynamics: str) -> tuple[Tensor, Tensor]:
        """The reference samples, and those on half of its grid."""
        if dynamics not in self._references:
            files = enumerate(self._reference_files(dynamics))
            parts = [cached(file, _read, partial(self.measure_reference, dynamics, i)) for i, file in files]
            whole, half = (torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in _KINDS)
            if not (whole.isfinite().all() and half.isfinite().all()):
                raise UserError(f"The reference of the {dynamics.upper()} is not finite: train its top level longer.")
            self._references[dynamics] = whole, half
        return self._references[dynamics]

    def is_done(self, setting: SamplerSetting) -> bool:
        return self._setting_file(setting).is_file()

    def measure(self, setting: SamplerSetting, should_stop: Callable[[], bool] = parallel.never) -> None:
        """Run all batches of a setting and write its file; raises Interrupted between batches."""
        estimator, parts, ledgers = self.build(setting), [], []
        for start, images, ledger in self._batches(setting, self.seeds_of(setting), should_stop):
            parts.append(self._compared(images, setting.dynamics, start))
            ledgers.append(ledger)
        total = joined(ledgers)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        errors, lost, to_half = arrays["errors"], int(arrays.pop("diverged").sum()), arrays.pop("to_half").mean()
        costs = {
            "error": None if lost else float(errors.mean()),  # undefined if a sample has diverged
            "error_se": float(sem(errors)) if not lost and len(errors) > 1 else None,
            "error_to_half": None if lost else float(to_half),  # to the reference on half of its grid
            "network_calls": sum(total.evaluations) / len(total.per_sample),
            "gflops_expected": self._flops(estimator, setting) / 1e9,
            "gflops_realised": total.flops_per_image / 1e9,
            "top_evaluations": int(total.per_sample[:, -1].sum()),
        }
        costs |= {"diverged": lost} if lost else {}
        texts = {"costs": json.dumps(costs), "work": json.dumps(self.work(setting))}
        write_arrays(self._setting_file(setting), {**texts, **arrays})

    def _batches(
        self, setting: SamplerSetting, seeds: Sequence[int], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Tensor, Ledger]]:
        """The number of its first sample, images on the CPU and ledger of every batch of a setting."""
        estimator = self.build(setting)
        for start in range(0, len(seeds), self.batch):
            if should_stop():
                raise Interrupted("stopped; finished settings are saved")
            path = self.path(seeds[start : start + self.batch])
            images, ledger = sample(estimator, setting.rule, setting.grid(self.process), path)
            yield start, images.cpu(), ledger

    def measure_features(self, setting: SamplerSetting, should_stop: Callable[[], bool] = parallel.never) -> None:
        """Write the samples of a setting for a distance, uint8 [N, 3, H, W], and their features, float32 [N, D].
        The samples are kept, so that another extractor needs no new ones."""
        assert self.extractor is not None

        def draw() -> None:
            parts = [self.pictures(part) for _, part, _ in self._batches(setting, seeds, should_stop)]
            write_arrays(file, {"images": torch.cat(parts).numpy()})

        seeds, file = self.distance_seeds, self._file_of_samples("samples", setting)
        images = cached(file, _read, draw)["images"]
        found = self.extractor.features(images).numpy()
        write_arrays(self.features_file(setting), {"features": found}, compress=False)

    def _file_of_samples(self, kind: str, setting: SamplerSetting, *facts: str) -> Path:
        seeds = self.distance_seeds
        return self._hashed(kind, [setting.row, self.key, self.gamma, seeds[0], len(seeds), self.batch, *facts])

    def features_file(self, setting: SamplerSetting) -> Path:
        assert self.extractor is not None
        return self._file_of_samples("features", setting, self.extractor.key)

    def features(self, setting: SamplerSetting) -> np.ndarray:
        """The features of a setting's samples [N, D], which are made if their file is missing or damaged."""
        return cached(self.features_file(setting), _read, lambda: self.measure_features(setting))["features"]

    def work(self, setting: SamplerSetting) -> dict[str, float]:
        """How often each part of the sampler's work occurs per image, for `Timing.seconds`."""
        estimator, visits = self.build(setting), setting.visits(self.process)
        seeds = self.seeds_of(setting)
        batches = [seeds[start : start + self.batch] for start in range(0, len(seeds), self.batch)]
        weights = [estimator.weights(len(visits), seeds) for seeds in batches]
        return work_of(weights, estimator.levels, setting.rule, len(batches[0]), visits)

    def _compared(self, images: Tensor, dynamics: str, start: int) -> dict[str, np.ndarray]:
        """What is kept of a batch: errors to the reference, and the first images."""
        whole, half = (part[start : start + len(images)] for part in self.references(dynamics))
        out = {"diverged": diverged(images), "errors": squared_errors(images, whole)}
        out["to_half"] = squared_errors(images, half)
        count = min(len(images), max(0, self.grid_images - start))
        if self.has_pictures:  # without any, one tells their size
            out["images"] = self.pictures(images[: max(1, count)])[:count].numpy()
        return out

    @property
    def has_pictures(self) -> bool:
        """Whether samples are pictures, or latents that become pictures, and not functions."""
        return self.decode is not None or self.shape[0] == 3

    def pictures(self, samples: Tensor) -> Tensor:
        """Samples [n, *shape] on the CPU as uint8 pictures [n, 3, H, W]."""
        if self.decode is not None:
            samples = self.decode(samples.to(self.device)).cpu()
        return to_uint8(samples.nan_to_num())

    def read(self, setting: SamplerSetting) -> Measurement:
        """A finished setting; it is measured again if its file is missing or damaged."""
        arrays = cached(self._setting_file(setting), _read, lambda: self.measure(setting))
        path, grid = self.path([0]), setting.grid(self.process)
        work = json.loads(str(arrays["work"])) | random_work(self.build(setting), setting.rule, grid, path)
        row = setting.row | json.loads(str(arrays["costs"]))
        row["seconds"] = None if self.timing is None else self.timing.seconds(work)
        return Measurement(row, arrays["errors"], arrays.get("images"), work)

    def _setting_file(self, setting: SamplerSetting) -> Path:
        return self._file("setting", setting.dynamics, len(self.seeds_of(setting)), setting.row)

    def _file(self, kind: str, dynamics: str, count: int, what: Any = None) -> Path:
        facts = [self.key, self.seeds[0], count, self.reference_steps[dynamics]]
        return self._hashed(kind, [dynamics, what, *facts, self.gamma, self.grid_images, self.batch])

    def _hashed(self, kind: str, facts: list[Any]) -> Path:
        text = json.dumps([kind, *facts], sort_keys=True)
        return self.cache / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"


def diverged(images: Tensor) -> np.ndarray:
    """bool [N]: which images [N, C, H, W] have a value that is not finite or is at least ABSURD in size."""
    return ~(images.abs().flatten(1).amax(1) < ABSURD).numpy()
