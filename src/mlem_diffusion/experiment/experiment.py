"""An experiment as its scripts see it: configuration, images, levels, and files to write."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .. import files, parallel
from ..comparison.settings import GAUSSIAN
from ..data import images as datasets
from ..data.pixels import to_float
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level, base_of
from ..diffusion.process import Process
from ..errors import UserError
from ..figures import style
from ..models.family import describe, identity_of, levels_folder, load_family, read_index, read_metadata, taught_name
from ..models.gaussian import fit_gaussian, load_gaussian
from ..training.levels import level_names, taught_widths
from . import config, runs
from .config import ROOT, shown
from .tracking import Tracker, bar, stop_asked

T = TypeVar("T")


class Experiment:
    """One run of a script. It can be pickled: a worker rebuilds the levels from it."""

    def __init__(self, name: str, cfg: DictConfig, folder: str | None = None):
        self.name, self.cfg, self.started = name, cfg, time.monotonic()
        cfg.title = files.readable(str(cfg.title or ""))
        unswept = ROOT / cfg.paths.checkpoints
        if folder is not None:
            cfg.name = folder
        elif HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            job = config.job_folder(HydraConfig.get().job.override_dirname)
            cfg.name = f"{cfg.name}/{job}" if job else cfg.name  # each job of a sweep gets its own folders
        self.data_dir, self.results = ROOT / cfg.paths.data, ROOT / cfg.paths.results
        self.checkpoints = ROOT / cfg.paths.checkpoints
        if name not in ("train_levels", "publish"):
            if not self.checkpoints.is_dir():
                self.checkpoints = unswept  # a sweep over later stages shares the levels
            self.checkpoints = levels_folder(self.checkpoints, level_names(cfg))
        self.device = config.set_up_device(cfg, training=name == "train_levels")
        self.process: Process = config.build(cfg.process)
        self.key, self.written = "", []  # fingerprint and outputs of this stage
        mode = cfg.tracking.mode if parallel.is_main() else "disabled"
        self.tracker = Tracker(self.results, name, self.plain(), mode, cfg.tracking.project)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a worker, which logs to metrics.jsonl only; images and decoder stay here."""
        own = {"tracker": Tracker(self.results, self.name, {}, mode="disabled", project="")}
        return {k: v for k, v in self.__dict__.items() if k not in ("images", "conditions", "decode")} | own

    def plain(self, *keys: str) -> dict[str, Any]:
        """The resolved configuration (only these keys if given), without absolute or parent paths."""
        return config.plain(self.cfg, keys)

    def fingerprint(self, groups: Sequence[str], **inputs: Any) -> str:
        """Hash of the configuration groups and input artefacts that a result depends on."""
        return config.fingerprint(self.plain(*groups), inputs)

    @functools.cached_property
    def images(self) -> datasets.ImageData:
        """The packed images; the procedural default is generated on first use."""
        if config.source(self.cfg) == "portraits" and parallel.is_main():
            self.prepare_data()
        parallel.barrier()
        return datasets.load(self.data_dir)

    def images_if_needed(self) -> datasets.ImageData | None:
        """As `images`, but None if no images are prepared and the levels, published ones or functions, need none;
        functions are compared with prepared images if there is a metric."""
        prepared, own = (self.data_dir / "manifest.json").is_file(), self.cfg.family.callable is not None
        if (own and self.cfg.metrics.get("_target_") is None) or ((own or self.published is not None) and not prepared):
            return None
        return self.images

    def prepare_data(self) -> dict[str, Any]:
        """Pack the images of data.source, and return the manifest."""
        source = config.source(self.cfg)
        if source is None:
            raise UserError("data.source is not set: run make data SOURCE=archive-or-folder or SOURCE=download.")
        workers = runs.worker_count(self, (self.cfg.data.count or 0) // 1000)  # to start a worker takes seconds
        with bar("images", None) as progress:
            return datasets.prepare(source, self.data_dir, self.cfg.data, workers, progress)

    def held_out(self) -> torch.Tensor:
        """The held-out images [M,3,S,S] in [-1, 1] on which denoising errors are measured."""
        return to_float(self.images.images[self.images.held_out()[: self.cfg.gamma.images]], self.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, [C, H, W]."""
        size = self.cfg.data.size
        return tuple(self.cfg.family.shape) if self.cfg.family.callable is not None else (3, size, size)

    @functools.cached_property
    def conditions(self) -> Any:
        """The function that gives the conditions of the samples with given seeds; None without conditions."""
        return self.cfg.family.conditions and config.build(self.cfg.family.conditions)

    @functools.cached_property
    def decode(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The function from latents to images; None if the levels denoise images."""
        return self.cfg.family.decoder and config.build(self.cfg.family.decoder)

    def path(self, seeds: Sequence[int]) -> BrownianPath:
        """The path of samples with these seeds, and their conditions."""
        return BrownianPath(seeds, self.shape, self.device, self.conditions)

    @functools.cached_property
    def published(self) -> dict[str, Any] | None:
        """The content of family.json if the levels in use are published, else None."""
        return read_index(self.checkpoints)

    def describe_levels(self, data_rms: float = 0.5) -> list[dict[str, Any]]:
        """The facts of each level before training: name, width, parameters, FLOPs, ...; last those with a "teacher"."""
        unet, target = self.plain("unet")["unet"], self.cfg.family.target
        found = {w: describe(w, self.cfg.data.size, data_rms, unet, target) for w in self.cfg.family.widths}
        *_, largest = found.values()
        teacher = {key: largest[key] for key in ("name", "flops")}
        taught = [found[w] | {"name": taught_name(w), "teacher": teacher} for w in taught_widths(self.cfg)]
        return [*found.values(), *taught]

    def levels_to_train(self) -> list[dict[str, Any]]:
        """`describe_levels` for the images; levels preconditioned by the Gaussian denoiser name its file, made here."""
        levels = self.describe_levels(self.images.manifest["rms"])
        if any(level["unet"].get("precondition") == "gaussian" for level in levels):
            path = self._fitted(self.checkpoints)
            for level in levels:
                level["gauss"] = {"file": path.name, "sha256": files.sha256_of(path)}
        return levels

    def _fitted(self, folder: Path) -> Path:
        """The file in this folder with the Gaussian denoiser of the training images, made once."""
        images, rank = self.images, self.cfg.family.gaussian_rank
        path = folder / f"gauss-{images.manifest['sha256'][:12]}-{rank}.safetensors"
        _made_once(path, load_gaussian, lambda path: fit_gaussian(images.images[images.train()], rank).save(path))
        return path

    def metadata(self) -> list[dict[str, Any]]:
        """metadata.json of every level; UserError if one was trained on other images or on fewer noise levels."""
        found = read_metadata(self.checkpoints, level_names(self.cfg))
        images, wanted = self.images_if_needed(), (self.cfg.process.logsnr_min, self.cfg.process.logsnr_max)
        if images is not None and any(m["data_sha256"] != images.manifest["sha256"] for m in found):
            text = (
                f"{shown(self.data_dir)} is not the data set that the levels in {shown(self.checkpoints)} were trained"
            )
            again = "prepare that one (make data), or train again (make train-levels ARGS=overwrite=true)"
            raise UserError(f"{text} on: {again}.")
        for m in found:
            low, high = map(float, m["logsnr_range"])
            if wanted[0] < low or wanted[1] > high:
                text = "set process.logsnr_min and process.logsnr_max within this range, or train it again"
                raise UserError(f"{m['name']} was trained for log-SNR {low:g} to {high:g}: {text}.")
        return found

    @functools.cached_property
    def identity(self) -> dict[str, Any] | None:
        """The hashes of images and levels that artefacts are made with; None for functions."""
        return None if self.cfg.family.callable is not None else identity_of(self.metadata())

    def levels(self) -> dict[str, Level]:
        """The levels by name, cheap to expensive, for sampling on this device; with the Gaussian denoiser if wanted."""
        cfg = self.cfg
        if cfg.family.callable is not None:
            return {level.name: level for level in config.build(cfg.family.callable)}
        options = {"precision": cfg.precision, "compile": cfg.compile, "batch": cfg.compare.batch}
        found = load_family(self.checkpoints, level_names(cfg), device=self.device, **options)
        if cfg.family.gaussian:
            gauss = base_of(found) or self.gaussian_level()
            if gauss.flops < found[0].flops:  # useless if it costs more than the first network
                found.insert(0, gauss)
        return {level.name: level for level in found}

    def gaussian_level(self) -> Level:
        """The linear Gaussian denoiser of the training images: the published one, or fitted once and cached."""
        rank, found = self.cfg.family.gaussian_rank, (self.published or {}).get("gaussian")
        if found is not None and found["asked_rank"] == rank:
            return load_gaussian(self.checkpoints / found["file"], self.device).as_level(GAUSSIAN)
        images = self.images_if_needed()
        if images is None:
            raise UserError(
                f"No Gaussian level with family.gaussian_rank={rank} is published, so it must be fitted to the "
                "training images: prepare them (make data), or set family.gaussian=false."
            )
        return load_gaussian(self._fitted(self.results / "cache"), self.device).as_level(GAUSSIAN)

    def cached(self, stem: str, facts: Any, read: Callable[[Path], T], make: Callable[[Path], object]) -> T:
        """read(path) of a cache file; rank 0 makes it first if it is missing or damaged.
        stem: such as "effects.npz". The name has a hash of `facts`, of the process and of the levels."""
        key = self.fingerprint(
            ("process", "precision"), levels=self._content_of("levels"), facts=facts, device=self.device.type
        )[:20]
        return _made_once(self.results / "cache" / f"{Path(stem).stem}-{key}{Path(stem).suffix}", read, make)

    def progress(self, label: str, total: int | None, unit: str = "img") -> bar:
        """A progress bar, which is also a callback (done, total) that raises Interrupted if the stage should stop."""
        return bar(label, total, unit, should_stop=self.should_stop)

    def should_stop(self) -> bool:
        """True after SIGINT or SIGTERM, or after max_minutes."""
        limit = self.cfg.max_minutes
        return stop_asked() or (limit is not None and time.monotonic() - self.started > 60 * limit)

    def print(self, text: str) -> None:
        """Print on rank 0."""
        if parallel.is_main():
            print(text)

    def save(self, name: str, value: Any) -> None:
        """Write a result as JSON if its name ends so, else as text, and send a table to W&B; rank 0 only."""
        if parallel.is_main():
            (files.write_json if name.endswith(".json") else files.write_text)(self.results / name, value)
            self.note(name)
            if name.endswith(".csv"):
                self.log({f"table/{Path(name).stem}": name})

    def note(self, *names: str) -> None:
        """Count files that were written by other means among this stage's outputs."""
        self.written += [name for name in names if name not in self.written]

    def figure(self, name: str, figure: Any) -> None:
        """Write a matplotlib Figure or a PIL image as PNG, and send it to W&B; rank 0 only."""
        if parallel.is_main():
            style.save(figure, self.results / name)
            self.note(name)
            self.log({f"figure/{Path(name).with_suffix('')}": name})

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl and send it to W&B; workers send nothing, and other ranks do nothing."""
        if parallel.is_main():
            self.tracker.log(values)

    def is_finished(self, outputs: Sequence[str], depends: Sequence[str] = (), reads: Sequence[str] = ()) -> bool:
        """Whether this stage finished before with the same fingerprint, and its outputs exist; prints so.
        The fingerprint is that of the configuration groups `depends` and of what the stage `reads`. The record is in
        the cache, which is never committed, so a fresh clone recomputes the committed results."""
        self.key = self.fingerprint(depends, **{what: self._content_of(what) for what in reads}) if depends else ""
        noted = self._done().get(self.name) or {}
        names = [*outputs, *noted.get("outputs", ())]
        same = noted.get("key") == self.key and all((self.results / name).is_file() for name in names)
        if same and not self.cfg.force:
            self.print(f"{self.name}: already done, nothing has changed (ARGS=force=true runs it again).")
        return same and not self.cfg.force

    def _content_of(self, what: str) -> Any:
        """Hash of "images", "levels" or a file of the results folder; None if it is missing."""
        if what == "images":
            images = self.images_if_needed()
            return images and images.manifest["sha256"]
        if what == "levels":
            extra = {key: self.cfg.family[key] for key in ("gaussian", "gaussian_rank")}
            return {**self.identity, **extra} if self.identity else self.plain("family")
        path = self.results / what
        return files.sha256_of(path) if path.is_file() else None

    def _done(self) -> dict[str, Any]:
        """The record of finished stages; empty if it is missing or damaged."""
        try:
            return dict(files.read_json(self.results / "cache" / "done.json", ""))
        except UserError:
            return {}

    def finish(self) -> None:
        """Write config.yaml and this stage's entry in provenance.json, and record that the stage is done."""
        if not parallel.is_main():
            return
        self.tracker.finish()
        if not self.written:
            return
        path, seconds = self.results / "provenance.json", round(time.monotonic() - self.started, 1)
        files.write_text(self.results / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.plain())))
        before = files.read_json(path, "delete it, the stages write it again") if path.is_file() else {}
        entry = {"seconds": seconds, "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        entry |= {**config.machine(self.device), "overrides": config.overrides()}
        entry["outputs"] = {name: files.sha256_of(self.results / name) for name in self.written}
        images = self.__dict__.get("images")  # if this stage used them
        data = images.manifest if images else (self.published or {}).get("data", before.get("data", {}))
        stages = {**before.get("stages", {}), self.name: entry}
        files.write_json(path, {"experiment": self.cfg.name, "data": data, "stages": stages})
        done = {**self._done(), self.name: {"key": self.key, "outputs": self.written}}
        files.write_json(self.results / "cache" / "done.json", done)
        print(f"{self.name}: done in {seconds:.0f} s; see {shown(self.results)}/")


def _made_once(path: Path, read: Callable[[Path], T], make: Callable[[Path], object]) -> T:
    """read(path) on every rank; rank 0 makes the file first if it is missing or damaged."""
    found = files.cached(path, read, lambda: make(path)) if parallel.is_main() else None
    parallel.barrier()
    return read(path) if found is None else found
