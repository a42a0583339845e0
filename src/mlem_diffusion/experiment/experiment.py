"""An experiment as its scripts see it: configuration, images, levels, settings to run, and files to write."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .. import files, parallel
from ..comparison.runner import Runner
from ..data import images as datasets
from ..data.pixels import to_float
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..errors import UserError
from ..figures import style
from ..models import published
from ..models.family import describe, identity_of, level_name, read_metadata
from . import config, environment, runs, signals
from .environment import ROOT, shown
from .progress import bar
from .tracking import Tracker

T = TypeVar("T")


class Experiment:
    """One run of a script. It can be pickled: a worker rebuilds levels and runner from it.

    cfg: the configuration; name: of the stage; device; process; data_dir, checkpoints, results: folders; facts: what
    this stage adds to its entry in provenance.json.
    """

    def __init__(self, name: str, cfg: DictConfig, folder: str | None = None):
        self.name, self.cfg, self.started = name, cfg, time.monotonic()
        unswept = ROOT / cfg.paths.checkpoints
        if folder is not None:
            cfg.name = folder
        elif HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            job = HydraConfig.get().job.override_dirname.replace("/", "_")
            cfg.name = f"{cfg.name}/{job}" if job else cfg.name  # each job of a sweep gets its own folders
        self.overrides = config.overrides()
        self.data_dir, self.checkpoints, self.results = (
            ROOT / cfg.paths[k] for k in ("data", "checkpoints", "results")
        )
        if name not in ("train_levels", "publish"):
            if not self.checkpoints.is_dir():
                self.checkpoints = unswept  # a sweep over later stages shares the levels
            names = [level_name(w) for w in cfg.family.widths]
            self.checkpoints = published.levels_folder(self.checkpoints, names)
        self.device = environment.usable_device(cfg.device)
        environment.configure_torch(cfg, training=name == "train_levels")
        self.process: Process = config.build(cfg.process)
        self.facts: dict[str, Any] = {}
        self.written: list[str] = []
        self.tracker = Tracker(self.results, name, self.plain(), **cfg.tracking)
        if not parallel.is_main():
            self.tracker.mode = "disabled"

    def __getstate__(self) -> dict[str, Any]:
        """The state for a worker, which logs to metrics.jsonl only; what is cached of the images stays here."""
        worker = Tracker(self.results, self.name, {}, mode="disabled", project="")
        return {k: v for k, v in self.__dict__.items() if k not in ("published", "_images")} | {"tracker": worker}

    # ------------------------------------------------------------------------------------------ configuration

    def plain(self, *keys: str) -> dict[str, Any]:
        """The resolved configuration (only these keys if given), without absolute or parent paths."""
        return config.plain(self.cfg, keys)

    def build(self, node: Any, **more: Any) -> Any:
        """Hydra's instantiate; any of its errors becomes a UserError of one sentence."""
        return config.build(node, **more)

    def fingerprint(self, groups: Sequence[str], **inputs: Any) -> str:
        """Hash of the configuration groups and input artefacts that a result depends on."""
        return config.fingerprint(self.plain(*groups), inputs)

    # ------------------------------------------------------------------------------------------------- inputs

    def images(self) -> datasets.ImageData:
        """The packed images; the procedural default is generated on first use."""
        return self._images

    @functools.cached_property
    def _images(self) -> datasets.ImageData:
        if self.cfg.family.callable is None and config.source(self.cfg) == "portraits" and parallel.is_main():
            self.prepare_data()
        parallel.barrier()
        return datasets.load(self.data_dir)

    def images_if_needed(self) -> datasets.ImageData | None:
        """As `images`, but None for functions, and if no images are prepared and published levels need none."""
        prepared = (self.data_dir / "manifest.json").is_file()
        if self.cfg.family.callable is not None or (self.published is not None and not prepared):
            return None
        return self.images()

    def prepare_data(self) -> dict[str, Any]:
        """Pack the images of data.source, and return the manifest."""
        source = config.source(self.cfg)
        if source is None:
            raise UserError(
                "data.source is not set: run make data SOURCE=path/to/archive-or-folder or SOURCE=download."
            )
        workers = runs.worker_count(self, (self.cfg.data.count or 0) // 1000)  # to start a worker takes seconds
        with bar("images", None, disable=None) as progress:
            return datasets.prepare(source, self.data_dir, self.cfg.data, workers, progress)

    def held_out(self) -> torch.Tensor:
        """The held-out images [M,3,S,S] in [-1, 1] on which denoising errors are measured."""
        images = self.images()
        return to_float(images.images[images.held_out()[: self.cfg.gamma.images]], self.device)

    @functools.cached_property
    def published(self) -> dict[str, Any] | None:
        """The content of family.json if the levels in use are published (models/published.py), else None."""
        return published.read_index(self.checkpoints)

    def describe_levels(self, data_rms: float = 0.5) -> list[dict[str, Any]]:
        """The facts of each level before training: name, width, parameters, FLOPs, ..."""
        unet, target = self.plain("unet")["unet"], self.cfg.family.target
        return [describe(w, self.cfg.data.size, data_rms, unet, target) for w in self.cfg.family.widths]

    def metadata(self) -> list[dict[str, Any]]:
        """metadata.json of every level; UserError if one was trained on other images or on fewer noise levels."""
        found = read_metadata(self.checkpoints, self.cfg.family.widths)
        images, wanted = self.images_if_needed(), (self.cfg.process.logsnr_min, self.cfg.process.logsnr_max)
        if images is not None and any(m["data_sha256"] != images.manifest["sha256"] for m in found):
            raise UserError(
                f"{shown(self.data_dir)} is not the data set that the levels in {shown(self.checkpoints)} were trained "
                "on: prepare that one (make data), or train again (make train-levels ARGS=overwrite=true)."
            )
        for m in found:
            low, high = map(float, m["logsnr_range"])
            if wanted[0] < low or wanted[1] > high:
                raise UserError(
                    f"{m['name']} was trained for log-SNR {low:g} to {high:g}: set process.logsnr_min and "
                    "process.logsnr_max within this range, or train it again."
                )
        return found

    @functools.cached_property
    def identity(self) -> dict[str, Any] | None:
        """The hashes of images and levels that artefacts are made with; None for functions."""
        return None if self.cfg.family.callable is not None else identity_of(self.metadata())

    def levels(self) -> dict[str, Level]:
        """The levels by name, cheap to expensive, for sampling on this device; with the Gaussian denoiser if wanted."""
        return runs.load_levels(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, [C, H, W]."""
        size = self.cfg.data.size
        return tuple(self.cfg.family.shape) if self.cfg.family.callable is not None else (3, size, size)

    # ---------------------------------------------------------------------------------------------------- work

    def runner(self, select: bool = False) -> Runner:
        """The data that all settings share: on the seeds of the comparison, or on those that select plans."""
        return runs.make_runner(self, select)

    def run(self, runner: Runner, settings: Sequence[Any], label: str) -> list[Any]:
        """Run settings on all ranks or workers, each once and cached; their results in order."""
        return runs.run_all(self, runner, settings, label)

    def cached(self, stem: str, facts: Any, read: Callable[[Path], T], make: Callable[[Path], object]) -> T:
        """read(path) of a cache file; rank 0 makes it first if it is missing or damaged.

        stem: such as "effects.npz". The name has a hash of `facts`, of the process and of the levels.
        """
        levels = self.identity or self.plain("family")
        key = self.fingerprint(("process", "precision"), levels=levels, facts=facts, device=self.device.type)[:20]
        return runs.made_once(self.results / "cache" / f"{Path(stem).stem}-{key}{Path(stem).suffix}", read, make)

    def progress(self, label: str, total: int | None, unit: str = "img") -> bar:
        """A progress bar, which is also a callback (done, total) that raises Interrupted if the stage should stop."""
        return bar(label, total, unit, should_stop=self.should_stop)

    def should_stop(self) -> bool:
        """True after SIGINT or SIGTERM, or after max_minutes."""
        limit = self.cfg.max_minutes
        return signals.asked() or (limit is not None and time.monotonic() - self.started > 60 * limit)

    def print(self, text: str) -> None:
        """Print on rank 0."""
        if parallel.is_main():
            print(text)

    # ------------------------------------------------------------------------------------------------- outputs

    def save(self, name: str, value: Any) -> None:
        """Write a result by the suffix of its name: JSON, or a DataFrame or text as it is; rank 0 only."""
        if not parallel.is_main():
            return
        path = self.results / name
        if path.suffix == ".json":
            files.write_json(path, value)
        else:
            text = value.to_csv(index=False, float_format="%.6g") if isinstance(value, pd.DataFrame) else value
            files.write_text(path, text)
        self.note(name)

    def note(self, *names: str) -> None:
        """Count files that were written by other means among this stage's outputs."""
        self.written += [name for name in names if name not in self.written]

    def read(self, name: str, hint: str) -> Any:
        """The content of a JSON file of the results folder; UserError if it is missing. hint: what to run."""
        return files.read_json(self.results / name, hint)

    def figure(self, name: str, figure: Any) -> None:
        """Write a matplotlib Figure or a PIL image as PNG, and send it to W&B; rank 0 only."""
        if parallel.is_main():
            style.save(figure, self.results / name)
            self.note(name)
            self.tracker.image(Path(name).stem, self.results / name)

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl and send it to W&B; in workers and other ranks nothing is sent."""
        if parallel.is_main():
            self.tracker.log(dict(values))
            self.tracker.mirror()

    # ------------------------------------------------------------------------------------------- finished work

    def finished_key(self, depends: Sequence[str], reads: Sequence[str]) -> str:
        """The fingerprint of a stage: of the configuration that it depends on, and of what it reads."""
        found: dict[str, Any] = {}
        for what in reads:
            path = self.results / what
            if what == "images":
                images = self.images_if_needed()
                found[what] = images and images.manifest["sha256"]
            elif what == "levels":
                found[what] = self.identity or self.plain("family")
            else:
                found[what] = files.sha256_of(path) if path.is_file() else None
        return self.fingerprint(depends, **found)

    def is_finished(self, key: str, outputs: Sequence[str]) -> bool:
        """Whether this stage finished before with the same fingerprint, and its outputs exist; prints so.

        The record is in the cache, which is never committed, so a fresh clone recomputes the committed results.
        """
        noted = self._done().get(self.name) or {}
        names = [*outputs, *noted.get("outputs", ())]
        same = noted.get("key") == key and all((self.results / name).is_file() for name in names)
        if same and not self.cfg.force:
            self.print(f"{self.name}: already done, nothing has changed (ARGS=force=true runs it again).")
            return True
        return False

    def _done(self) -> dict[str, Any]:
        path = self.results / "cache" / "done.json"
        return files.cached(path, lambda p: dict(files.read_json(p, "")), lambda: files.write_json(path, {}))

    def finish(self, key: str) -> None:
        """Write config.yaml and this stage's entry in provenance.json, and record that the stage is done."""
        if not parallel.is_main():
            return
        self.tracker.finish()
        if not self.written:
            return
        path, seconds = self.results / "provenance.json", round(time.monotonic() - self.started, 1)
        files.write_text(self.results / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.plain())))
        before = self.read("provenance.json", "delete it, the stages write it again") if path.is_file() else {}
        machine = environment.machine(self.device)
        entry = {
            "seconds": seconds,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "commit": machine["commit"],
            "device": machine["device"],
            "overrides": self.overrides,
            **self.facts,
            "outputs": {name: files.sha256_of(self.results / name) for name in self.written},
        }
        images = self.__dict__.get("_images")  # if this stage used them
        data = images.manifest if images else (self.published or {}).get("data", before.get("data", {}))
        stages = {**before.get("stages", {}), self.name: entry}
        files.write_json(path, {"experiment": self.cfg.name, "data": data, **machine, "stages": stages})
        done = {**self._done(), self.name: {"key": key, "outputs": self.written}}
        files.write_json(self.results / "cache" / "done.json", done)
        print(f"{self.name}: done in {seconds:.0f} s; see {shown(self.results)}/")
