"""Common code of the scripts: configuration, one-sentence errors, dry runs, stage records and provenance."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import TqdmMonitorWarning, tqdm

from .. import parallel
from ..data import images as datasets
from ..data.pixels import to_float
from ..diffusion.process import Process
from ..errors import SYSTEM_ERRORS, Interrupted, SlowPath, UserError, is_out_of_memory
from ..files import expect_content, read_json, sha256_of, write_json, write_text
from ..models import published
from ..models.checkpoint import AGAIN
from ..models.family import at_width, describe, level_name, read_metadata
from . import interrupts, processes, renamed
from .locks import FolderLock

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = str(ROOT / "configs")
# Processes that a launcher starts elsewhere (a SLURM job) must be able to import the scripts.
_PATHS = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if str(ROOT / "scripts") not in _PATHS:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), *filter(None, _PATHS)])
PACKAGES = (
    "mlem-diffusion",
    "torch",
    "torchvision",
    "torch-fidelity",
    "hydra-core",
    "numpy",
    "scipy",
    "diffusers",
)


class Stage:
    """One run of a script: its configuration, its folders, and the record of finished work."""

    def __init__(self, name: str, cfg: DictConfig):
        self.name, self.cfg, self.started = name, cfg, time.monotonic()
        renamed.check_config(self.plain())
        unswept = {k: ROOT / cfg.paths[k] for k in ("checkpoints", "results")}
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # each job of a sweep gets its own folders
            job = HydraConfig.get().job.override_dirname.replace("/", "_")
            cfg.name = f"{cfg.name}/{job}" if job else cfg.name
        self.data_dir, self.checkpoints, self.results = (
            ROOT / cfg.paths[k] for k in ("data", "checkpoints", "results")
        )
        self._unswept_results = unswept["results"]
        if name not in ("train_levels", "publish"):
            if not self.checkpoints.is_dir():
                self.checkpoints = unswept["checkpoints"]  # a sweep over later stages shares the levels
            self.checkpoints = published.levels_folder(self.checkpoints, [level_name(w) for w in cfg.family.widths])
        self.device = usable_device(cfg.device)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        if name == "train_levels":  # all other stages use float32, not TF32
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = bool(cfg.autotune)
        self._interrupts = interrupts.Interrupts()
        self._lock: FolderLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for a worker, whose parent holds the lock and handles the signals."""
        return {**self.__dict__, "_lock": None, "_interrupts": interrupts.Interrupts()}

    # ---- configuration -----------------------------------------------------------------------------------

    def plain(self, *keys: str) -> dict[str, Any]:
        """The resolved configuration (only these keys if given), without absolute or parent paths."""
        if not keys:
            keys = tuple(str(k) for k in self.cfg)
        out = {}
        for key in keys:
            node = self.cfg[key]
            out[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if "data" in out and isinstance(out["data"], dict):
            source = None if OmegaConf.is_missing(self.cfg.data, "source") else str(self.cfg.data.source)
            out["data"]["source"] = None if source is None else Path(source).name
        for key, names in (("paths", tuple(self.cfg.paths)), ("metrics", ("weights",))):
            for name in names if isinstance(out.get(key), dict) else ():
                value = out[key].get(name)
                if isinstance(value, str) and Path(value).is_absolute():
                    path = shown(Path(value))
                    out[key][name] = path.name if path.is_absolute() else str(path)
        return out

    def process(self) -> Process:
        return build(self.cfg.process)

    def data(self) -> datasets.ImageData:
        """The packed images; the procedural default is generated on first use."""
        if not self._source_missing() and self.cfg.data.source == "portraits":
            self.prepare_data()
        return datasets.load(self.data_dir)

    @functools.cached_property
    def published(self) -> dict[str, Any] | None:
        """The content of family.json if the levels in use are published (models/published.py), else None."""
        return published.read_index(self.checkpoints)

    def data_if_needed(self) -> datasets.ImageData | None:
        """As `data`, but None if no images are prepared and the levels are published, so that they need none."""
        prepared = (self.data_dir / "manifest.json").is_file()
        return self.data() if prepared or self.published is None else None

    def manifest(self, images: datasets.ImageData | None) -> dict[str, Any]:
        """The manifest of the images, or the published one without images; empty for a family without images."""
        if images is not None:
            return images.manifest
        return (self.published or {}).get("data", {}) if self.cfg.family.callable is None else {}

    def held_out(self, images: datasets.ImageData) -> torch.Tensor:
        """The held-out images [M,3,S,S] in [-1, 1] on which denoising errors are measured."""
        return to_float(images.images[images.held_out()[: self.cfg.gamma.images]], self.device)

    def _source_missing(self) -> bool:
        return OmegaConf.is_missing(self.cfg.data, "source")

    def prepare_data(self) -> dict[str, Any]:
        if self._source_missing():
            raise UserError(
                "data.source is not set: run make data SOURCE=path/to/archive-or-folder (or SOURCE=download)."
            )
        options = {k: self.cfg.data[k] for k in ("name", "size", "crop", "holdout", "seed", "count", "skip_broken")}
        with bar("images", None, disable=None) as progress:
            return datasets.prepare(str(self.cfg.data.source), self.data_dir, progress=progress, **options)

    def describe_levels(self, data_rms: float = 0.5) -> list[dict[str, Any]]:
        unet = OmegaConf.to_container(self.cfg.unet, resolve=True)
        assert isinstance(unet, dict)
        widths, size, target = self.cfg.family.widths, self.cfg.data.size, self.cfg.family.target
        return [describe(w, size, data_rms, {str(k): v for k, v in unet.items()}, target) for w in widths]

    def levels_of(self, images: datasets.ImageData | None) -> list[dict[str, Any]]:
        """metadata.json of every level; UserError if one was trained on other images or on fewer noise levels."""
        metadata = read_metadata(self.checkpoints, self.cfg.family.widths)
        if images is not None and any(m["data_sha256"] != images.manifest["sha256"] for m in metadata):
            raise UserError(
                f"{shown(self.data_dir)} is not the data set that the levels in {shown(self.checkpoints)} were trained "
                "on: prepare that data set (make data), "
                "or train the levels again (make train-levels ARGS=overwrite=true)."
            )
        wanted = (self.cfg.process.logsnr_min, self.cfg.process.logsnr_max)
        for m in metadata:
            with expect_content(self.checkpoints / m["name"] / "metadata.json", AGAIN):
                low, high = map(float, m["logsnr_range"])
            if wanted[0] < low or wanted[1] > high:
                raise UserError(
                    f"{m['name']} was trained for log-SNR {low:g} to {high:g}, so it cannot be used from "
                    f"{wanted[0]:g} to {wanted[1]:g}: set process.logsnr_min and process.logsnr_max within the trained "
                    "range, or train it again."
                )
        return metadata

    # ---- record of finished work -------------------------------------------------------------------------

    def fingerprint(self, groups: tuple[str, ...], **inputs: Any) -> str:
        """Hash of the configuration groups and input artefacts that a stage depends on."""
        config = self.plain(*groups)
        if isinstance(train := config.get("train"), dict):
            if "width" in inputs:  # the settings of this level only
                config["train"] = at_width(train, inputs["width"])
            elif not train.get("narrow"):
                train.pop("narrow", None)
        for key in ("log_every", "save_every", "compile", "graph"):  # these do not affect the trained model
            config.get("train", {}).pop(key, None)
        text = json.dumps([_without_modules(config), inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self, fingerprint: str, outputs: list[str]) -> bool:
        """Whether this stage has finished before with the same inputs, and its files are unchanged; prints the answer.

        The record is in the cache, which is never committed, so a fresh clone recomputes the published results.
        """
        noted = self._done().get(self.name)
        if self.cfg.force or not isinstance(noted, dict) or noted.get("fingerprint") != fingerprint:
            return False
        written = noted["outputs"]
        changed = [name for name in {**dict.fromkeys(outputs), **written} if not self._is_as_written(name, written)]
        if changed:
            print(f"{self.name}: {changed[0]} has changed since it was written, so the stage runs again.")
        else:
            print(f"{self.name}: already done, nothing has changed (ARGS=force=true runs it again).")
        return not changed

    def _is_as_written(self, name: str, written: dict[str, str]) -> bool:
        path = self.results / name
        return name in written and path.is_file() and sha256_of(path) == written[name]

    def hashes(self, outputs: Iterable[str]) -> dict[str, str]:
        """SHA-256 of files in the results folder, by name."""
        return {name: sha256_of(self.results / name) for name in outputs}

    def mark_done(self, fingerprint: str, written: dict[str, str]) -> None:
        """Record that the stage is done, with the hashes of its outputs."""
        entry = {"fingerprint": fingerprint, "outputs": written}
        write_json(self.results / "cache" / "done.json", {**self._done(), self.name: entry})

    def _done(self) -> dict[str, Any]:
        try:
            return read_json(self.results / "cache" / "done.json", "")
        except UserError:  # all stages run again
            return {}

    def read_provenance(self) -> dict[str, Any]:
        """The content of provenance.json; empty if the file does not exist."""
        path = self.results / "provenance.json"
        if not path.is_file():
            return {}
        return read_json(path, "restore it (git checkout), or delete it: the stages will write it again")

    def written(self, *patterns: str) -> list[str]:
        """Names of the files in the results folder that match, sorted."""
        found = (p for pattern in patterns for p in sorted(self.results.glob(pattern)) if p.is_file())
        return [p.relative_to(self.results).as_posix() for p in found]

    def find(self, name: str) -> Path:
        """Path of an artefact of an earlier stage: this job's own, or the one that all jobs of a sweep share."""
        own, shared = self.results / name, self._unswept_results / name
        return shared if shared.is_file() and not own.is_file() else own

    def record(
        self, fingerprint: str, outputs: Iterable[str], manifest: dict[str, Any] | None = None, **facts: Any
    ) -> None:
        """Write provenance.json and config.yaml, and record that the stage is done.

        provenance.json has one entry per stage, with its overrides and the SHA-256 of its outputs. config.yaml is the
        full configuration of the last stage that ran.
        """
        write_text(self.results / "config.yaml", to_yaml(self.plain()))
        before = self.read_provenance()
        stages = before.get("stages", {})
        seconds = round(time.monotonic() - self.started, 1)
        written = self.hashes(outputs)
        stages[self.name] = {
            "seconds": seconds,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "commit": commit(),
            "device": device_model(self.device),
            "overrides": overrides(),
            **facts,
            "outputs": written,
        }
        provenance = {
            "experiment": self.cfg.name,
            "data": manifest if manifest is not None else before.get("data", {}),
            "commit": commit(),
            "device": device_model(self.device),
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "packages": {name: installed for name in PACKAGES if (installed := package_version(name))},
            "stages": stages,
            "config_sha256": sha256_of(self.results / "config.yaml"),
        }
        write_json(self.results / "provenance.json", provenance)
        self.mark_done(fingerprint, written)
        print(f"{self.name}: done in {seconds:.0f} s; see {shown(self.results)}/")

    # ---- lock and signals --------------------------------------------------------------------------------

    def take_folder(self, shared: bool = False) -> None:
        """Lock the results folder, alone or shared with other runs; UserError if it is in use.

        Also checks provenance.json, which every stage extends.
        """
        lock = FolderLock(self.results, self.name, shown(self.results), file="cache/.lock")
        lock.take(shared)
        self._lock = lock
        self.read_provenance()

    def give_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def should_stop(self) -> bool:
        """True after SIGINT or SIGTERM, or after max_minutes: the work then saves its state and stops."""
        limit = self.cfg.max_minutes
        return bool(self._interrupts.asked) or (limit is not None and time.monotonic() - self.started > 60 * limit)

    def catch_signals(self, patient: bool = True) -> None:
        """Handle SIGINT and SIGTERM. patient: the work checks `should_stop`, and has time to stop (interrupts.py)."""
        self._interrupts.begin(patient)

    def let_signals_be(self) -> None:
        """Restore the earlier signal handlers."""
        self._interrupts.end()


def _without_modules(config: Any) -> Any:
    """The configuration with only the class name in every `_target_`, so that modules may move."""
    if isinstance(config, dict):
        return {
            k: str(v).rpartition(".")[2] if k == "_target_" and v else _without_modules(v) for k, v in config.items()
        }
    return [_without_modules(v) for v in config] if isinstance(config, list) else config


@contextlib.contextmanager
def plain_warnings(name: str) -> Iterator[None]:
    """Print each SlowPath warning as one line, without its place in the code."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, SlowPath):
            if is_main_process():
                print(f"{name}: {message}", file=sys.stderr)
        else:
            before(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def run_stage(
    name: str,
    cfg: DictConfig,
    work: Callable[[Stage], None],
    estimate: Callable[[Stage], list[tuple[str, float, float]]] | None = None,
    everyone: bool = False,
    writes_results: bool = True,
    trained_only: bool = False,
) -> None:
    """Run a stage, or print what it would do. Expected errors become one line and exit status 2.

    estimate: returns rows (description, FLOPs, seconds on this device). With several processes, the main one does the
    work and the others help on its request (parallel.py); everyone: all do the work. writes_results: lock the results
    folder. trained_only: the stage has nothing to do for a family of functions.
    """
    # torch itself still uses it for its forward derivatives
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", category=TqdmMonitorWarning)  # bars also work without a thread

    def do() -> None:
        if trained_only and cfg.family.callable is not None:
            if is_main_process():
                print(f"{name}: nothing to do, the levels of this experiment are functions (family.callable).")
            return
        stage = Stage(name, cfg)
        if cfg.dry_run:
            if is_main_process():
                show_cost(stage, estimate)
            return
        stage.catch_signals(patient=processes.count() > 1)
        try:
            if writes_results and is_main_process():
                stage.take_folder(shared=cfg.only is not None and name == "train_levels")
            begin(stage)
        finally:
            stage.give_folder()
        stage.let_signals_be()

    def begin(stage: Stage) -> None:
        if processes.count() == 1 or everyone:
            work(stage)
            return
        if not is_main_process():
            parallel.serve(stage)
            return
        try:
            work(stage)
        except Interrupted:
            parallel.dismiss()
            raise
        parallel.dismiss()

    try:
        with plain_warnings(name):
            if processes.count() == 1:
                do()
            else:
                processes.together(do, lambda error: report(name, error), Interrupted)
    except (UserError, Interrupted, KeyboardInterrupt, OSError, MemoryError, RuntimeError, ImportError) as error:
        if isinstance(error, Interrupted) and not is_main_process():
            sys.exit(interrupts.TRY_AGAIN)
        sys.exit(report(name, error))


def report(name: str, error: BaseException) -> int:
    """Print why the stage ended, in one line for expected errors, and return the exit status."""

    def say(text: str, status: int) -> int:
        print(f"{name}: {text}", file=sys.stderr)
        return status

    if isinstance(error, UserError):
        return say(str(error), 2)
    if isinstance(error, Interrupted):
        return say(f"{error}, run the same command again to continue.", interrupts.TRY_AGAIN)
    if isinstance(error, KeyboardInterrupt):
        return say("stopped; finished work is saved, run the same command again to continue.", interrupts.TRY_AGAIN)
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return say(f"{SYSTEM_ERRORS[error.errno]}{where}: fix this and run the same command again.", 2)
    if is_out_of_memory(error):
        return say(
            "there is not enough memory: use smaller batches (compare.batch, gamma.batch, train.batch) or fewer "
            "workers (ARGS=workers=1).",
            2,
        )
    traceback.print_exception(error)
    return 1


def show_cost(stage: Stage, estimate: Callable[[Stage], list[tuple[str, float, float]]] | None) -> None:
    """Print the resolved configuration and the estimated cost."""
    print(OmegaConf.to_yaml(OmegaConf.create(stage.plain()), resolve=True))
    if estimate is None:
        print(f"estimated cost of {stage.name}: no network is evaluated; seconds to minutes.")
        return
    rows = estimate(stage)
    for what, flops, seconds in rows:
        print(f"{what:<44} {flops / 1e12:12.3f} TFLOP  about {duration(seconds)}")
    flops, seconds = sum(row[1] for row in rows) / 1e12, sum(row[2] for row in rows)
    what, where = f"estimated cost of {stage.name}", device_model(stage.device)
    print(f"{what:<44} {flops:12.3f} TFLOP  about {duration(seconds)} on {where}")


Config = DictConfig


def entry_point(config_name: str) -> Callable[[Callable[[Config], None]], Callable[[], None]]:
    """Decorator of a script's main(cfg): Hydra composes configs/<config_name>.yaml with the command line's overrides.

    An old name among the overrides ends the script with a message of one sentence.
    """

    def decorate(task: Callable[[Config], None]) -> Callable[[], None]:
        start = hydra.main(version_base=None, config_path=CONFIGS, config_name=config_name)(task)

        @functools.wraps(task)
        def main() -> None:
            try:
                renamed.check_overrides(sys.argv[1:])
            except UserError as error:
                sys.exit(report(config_name, error))
            start()

        return main

    return decorate


def to_plain(node: Any) -> Any:
    """A part of the configuration as dicts and lists, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True)


def to_yaml(values: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(values), resolve=True)


def merged(cfg: Config, changes: dict[str, Any]) -> Any:
    """A copy of the configuration with some values changed."""
    return OmegaConf.merge(cfg, changes)


def is_mapping(node: Any) -> bool:
    return OmegaConf.is_dict(node)


def chosen_experiment() -> str | None:
    """The value of experiment=... in this run, or None."""
    return HydraConfig.get().runtime.choices.get("experiment")


def overrides() -> list[str]:
    """The command line's overrides that change results, sorted; paths and options of this machine are left out."""
    elsewhere = re.compile(
        r"[+~]*(paths\.|data\.source|metrics\.weights|dry_run|force|overwrite|max_minutes|workers|threads)"
    )
    return sorted(text for text in HydraConfig.get().overrides.task if not elsewhere.match(text))


def composed(config_name: str, experiment: str | None, keys: list[str]) -> Any:
    """These keys of a script's configuration for an experiment, without the command line's overrides."""
    cfg = hydra.compose(config_name, [f"experiment={experiment}"] if experiment else [])
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, keys))


def build(config: Any, **more: Any) -> Any:
    """Hydra's instantiate; any of its errors becomes a UserError of one sentence."""
    try:
        return instantiate(config, **more)
    except (InstantiationException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{config.get('_target_')} cannot be built from the configuration ({reason}).") from error


def usable_device(name: str) -> torch.device:
    """The device of this name; UserError if it does not work.

    auto: CUDA if available. Each of several processes gets its own GPU.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device == torch.device("cuda") and processes.count() > 1:
            device = processes.own_gpu()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} does not work on this machine: set device=auto or device=cpu.") from error
    return device


def shown(path: Path) -> Path:
    """A path for messages: relative to the repository's root if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


class bar:
    """A progress bar with rate and time left, which is also a callback (done, total)."""

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "img",
        position: int | None = None,
        disable: bool | None = False,
    ):
        self.tqdm = tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,  # a log file needs few lines
            leave=False,
            position=position,
            disable=disable if is_main_process() else True,  # None: silent unless on a terminal
        )

    def __enter__(self) -> bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.tqdm.close()

    def __call__(self, done: int, total: int) -> None:
        self.tqdm.total = total
        self.tqdm.update(done - self.tqdm.n)


def seconds_per_evaluation(stage: Stage, batch: int) -> list[float]:
    """Measured seconds per image of one evaluation of each level, with fresh weights, smaller of two runs.

    batch: images per evaluation; fewer on a CPU if the largest level would take long.
    """
    from ..models.family import build_denoiser

    unet: Any = OmegaConf.to_container(stage.cfg.unet, resolve=True)
    if stage.device.type == "cpu":
        batch = max(1, min(batch, int(20e9 / stage.describe_levels()[-1]["flops"])))
    out = []
    for width in stage.cfg.family.widths:
        net = build_denoiser(width, stage.cfg.data.size, 0.5, unet, stage.cfg.family.target).to(stage.device).eval()
        x = torch.zeros(batch, 3, stage.cfg.data.size, stage.cfg.data.size, device=stage.device)
        times = []
        with torch.no_grad():
            for _ in range(3):
                start = time.perf_counter()
                net(x, torch.zeros(batch, device=stage.device)).sum().item()
                times.append(time.perf_counter() - start)
        out.append(min(times[1:]) / batch)
    return out


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def commit() -> str:
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        # changed results and checkpoints do not count, since every run writes them
        paths = ["src", "scripts", "configs"]
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=True
        ).stdout
        return head + (" with uncommitted changes" if dirty.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_model(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_model()} ({torch.get_num_threads()} threads)"
    )


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


is_main_process = processes.is_main
