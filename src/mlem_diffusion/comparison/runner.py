"""The comparison: each setting against one fine reference on the same seeds and Brownian paths; pictures of samples.

Every batch of a reference and every finished setting is one npz file under a hash of all that it depends on, so a
stopped comparison can resume."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Ledger, Level, joined
from ..diffusion.process import Process, TimeGrid
from ..diffusion.sampler import Estimator, SingleLevel, sample
from ..diffusion.step_rules import REFERENCE_RULE, StepRule
from ..errors import Interrupted, UserError
from ..files import atomic_write, cached, read_arrays, write_arrays
from ..multilevel.plan import Plan
from ..statistics import squared_errors, standard_error
from .features import Extractor
from .settings import Measurement, SamplerSetting

ABSURD = 1e3  # size of a pixel value; pixels are in [-1, 1], and no working sampler comes near it
GRID = 1024  # the most images in a grid of pictures
_read = partial(read_arrays, hint="remove it and run the same command again")


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
                raise UserError(f"The reference of the {dynamics.upper()} is not finite: train its top level longer.")
            self._references[dynamics] = images
        return self._references[dynamics]

    def is_done(self, setting: SamplerSetting) -> bool:
        return self._file("setting", setting.row).is_file()

    def measure(self, setting: SamplerSetting, should_stop: Callable[[], bool] = parallel.never) -> None:
        """Run all batches of a setting and write its file; raises Interrupted between batches."""
        estimator, parts, ledgers = self.build(setting), [], []
        for start in range(0, len(self.seeds), self.batch):
            if should_stop():
                raise Interrupted("stopped; finished settings are saved")
            path = BrownianPath(self.seeds[start : start + self.batch], self.shape, self.device)
            images, ledger = sample(estimator, setting.rule, self.process.grid(setting.steps), path)
            parts.append(self._compared(images.cpu(), setting.dynamics, start))
            ledgers.append(ledger)
        total = joined(ledgers)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        errors, lost = arrays["errors"], int(arrays.pop("diverged").sum())
        spread = np.nan if lost else standard_error(errors)
        costs = {
            "error": None if lost else float(errors.mean()),  # undefined if a sample has diverged
            "error_se": spread if np.isfinite(spread) else None,  # not finite for a single seed
            "network_calls": total.calls_per_image,
            "gflops_expected": estimator.expected_flops(setting.evaluations(self.process)) / 1e9,
            "gflops_realised": total.flops_per_image / 1e9,
            "seconds": total.seconds_per_image,
            "top_evaluations": int(total.per_sample[: len(errors), -1].sum()),  # in the samples that the error averages
        }
        costs |= {"diverged": lost} if lost else {}
        write_arrays(self._file("setting", setting.row), {"costs": json.dumps(costs), **arrays})

    def _compared(self, images: Tensor, dynamics: str, start: int) -> dict[str, np.ndarray]:
        """What is kept of a batch: errors to the reference, features, and the first images."""
        reference = self.reference(dynamics)[start : start + len(images)]
        out = {"diverged": diverged(images), "errors": squared_errors(images[: len(reference)], reference)}
        if self.extractor is not None:
            pixels = to_uint8(images.nan_to_num())
            out["features"] = self.extractor.features(pixels).numpy()
            out["images"] = pixels[: max(0, self.grid_images - start)].numpy()
        return out

    def read(self, setting: SamplerSetting) -> Measurement:
        """A finished setting; it is measured again if its file is missing or damaged."""
        arrays = cached(self._file("setting", setting.row), _read, lambda: self.measure(setting))
        row = setting.row | json.loads(str(arrays["costs"]))
        return Measurement(row, arrays["errors"], arrays.get("features"), arrays.get("images"))

    def _file(self, kind: str, what: Any) -> Path:
        sizes = [self.seeds[0], len(self.seeds), self.num_reference]
        asked = [kind, what, self.key, *sizes, self.gamma, self.grid_images, self.batch, self.reference_steps]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return self.cache / f"{kind}-{digest[:20]}.npz"


def diverged(images: Tensor) -> np.ndarray:
    """bool [N]: which images [N, C, H, W] have a value that is not finite or is at least ABSURD in size."""
    return ~(images.abs().flatten(1).amax(1) < ABSURD).numpy()


def parse_seeds(text: str) -> list[int]:
    """ "0-63" or "3,7,100-120" -> sample seeds; UserError for anything else."""
    try:
        parts = [[int(end) for end in part.split("-")] for part in str(text).split(",")]
    except ValueError:
        parts = []
    if not parts or any(len(part) > 2 or part[0] > part[-1] for part in parts):
        raise UserError(f"SEEDS={text} is not a list of seeds; write 0-63 or 3,7,100-120.")
    return list(dict.fromkeys(seed for part in parts for seed in range(part[0], part[-1] + 1)))


def draw(
    estimator: Estimator, rule: StepRule, grid: TimeGrid, seeds: Sequence[int], batch: int, shape: tuple[int, ...],
    device: torch.device, folder: Path, progress: Callable[[int, int], object],
) -> tuple[Ledger, Tensor]:  # fmt: skip
    """Write folder/<seed>.png; the ledger, and the first images as uint8 [at most GRID, 3, H, W].

    Ranks share the batches, and all get the whole result. progress(images done, images of this rank)."""
    if shape[0] != 3:
        raise UserError(f"Samples of shape {list(shape)} are not pictures in RGB.")
    starts, found = parallel.mine(range(0, len(seeds), batch)), {}
    for start in starts:
        own = seeds[start : start + batch]
        images, ledger = sample(estimator, rule, grid, BrownianPath(own, shape, device))
        pixels = to_uint8(images.cpu())
        for seed, image in zip(own, pixels, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            atomic_write(folder / f"{seed:06d}.png", lambda path, p=picture: p.save(path, format="PNG"))
        found[start] = ledger, pixels[: max(0, GRID - start)]
        progress(len(found) * batch, len(starts) * batch)
    ledgers, parts = zip(*parallel.gather(found).values(), strict=True)
    return joined(ledgers), torch.cat(parts)
