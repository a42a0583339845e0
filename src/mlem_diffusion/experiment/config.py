"""The configuration as plain values, objects and fingerprints; the device, machine and versions of a run."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from joblib import cpu_count
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import parallel
from ..errors import UserError
from ..training.levels import settings

ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("torch", "torchvision", "torch-fidelity", "hydra-core", "numpy", "scipy", "pandas")
# paths and options of this machine do not change results
_ELSEWHERE = re.compile(
    r"[+~]*(hydra[./]|paths\.|data\.source|metrics\.weights|dry_run|force|overwrite|max_minutes|workers|threads)"
)
_LONGEST = 200  # bytes of a folder's name, which file systems limit to 255
# settings of training that do not affect the trained model
_WATCHING = ("log_every", "save_every", "compile", "graph")


def source(cfg: DictConfig) -> str | None:
    """data.source, or None if it is not set."""
    return None if OmegaConf.is_missing(cfg.data, "source") else str(cfg.data.source)


def plain(cfg: DictConfig, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration (only these keys if given); paths of this machine are left out or shortened."""
    out = {}
    for key in keys or (k for k in map(str, cfg) if k != "paths"):
        node = cfg[key]
        out[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(out.get("data"), dict):
        found = source(cfg)
        out["data"]["source"] = None if found is None else Path(found).name
    if isinstance(out.get("metrics"), dict) and out["metrics"].get("weights"):
        out["metrics"]["weights"] = Path(out["metrics"]["weights"]).name
    return out


def fingerprint(groups: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Hash of configuration groups and input artefacts; with the input "width", `train` is that of this level."""
    if isinstance(train := groups.get("train"), dict):
        if "width" in inputs:
            groups["train"] = settings(train, {key: inputs[key] for key in ("width", "teacher") if key in inputs})
        elif not train.get("narrow"):
            train.pop("narrow", None)
        hidden = _WATCHING if "teacher" in inputs else (*_WATCHING, "teacher", "warm_start")
        for key in (*hidden, *(["focus"] if groups["train"].get("focus") is None else [])):
            groups["train"].pop(key, None)
        if "process" in groups:  # the finest grid of samplers, so a finer reference needs no new training
            groups["process"].pop("base_steps", None)
    text = json.dumps([_without_modules(groups), inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_modules(node: Any) -> Any:
    """The configuration with only the class name in every `_target_`, so that modules may move."""
    if isinstance(node, dict):
        return {k: str(v).rpartition(".")[2] if k == "_target_" and v else _without_modules(v) for k, v in node.items()}
    return [_without_modules(v) for v in node] if isinstance(node, list) else node


def build(node: Any, **more: Any) -> Any:
    """Hydra's instantiate; any of its errors becomes a UserError of one sentence."""
    try:
        return instantiate(node, **more)
    except (InstantiationException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{node.get('_target_')} cannot be built from the configuration ({reason}).") from error


def given() -> list[str]:
    """The overrides of the command line, as they were written; Hydra's own first."""
    if not HydraConfig.initialized():
        return []
    found: Any = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    return [*found["hydra"], *found["task"]]


def overrides() -> list[str]:
    """The command line's overrides that change results, sorted."""
    return sorted(text for text in given() if not _ELSEWHERE.match(text))


def job_folder(overrides: str) -> str:
    """The name of a folder for the job of a sweep with these overrides: shortened, with a hash, if it is too long."""
    name = re.sub(r"[/$]", "_", overrides)
    if len(name.encode()) <= _LONGEST:
        return name
    start = name.encode()[: _LONGEST - 17].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(overrides.encode()).hexdigest()[:16]}"


def set_up_device(cfg: Any, training: bool) -> torch.device:
    """The configured device, a GPU of its own for each rank, with torch's threads and precision (TF32 in training)."""
    name = cfg.device
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device == torch.device("cuda") and parallel.world() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        text = f"device={name} does not work on this machine ({torch.cuda.device_count()} GPUs): "
        raise UserError(text + "set device=auto or device=cpu, or start fewer processes (NPROC).") from error
    # a container's limit and taskset count
    torch.set_num_threads(cfg.threads or min(torch.get_num_threads(), cpu_count()))
    torch.set_float32_matmul_precision("high" if training else "highest")
    torch.backends.cudnn.allow_tf32 = training
    torch.backends.cudnn.benchmark = bool(cfg.autotune)
    return device


def commit() -> str:
    """The checked-out commit; changed results and checkpoints do not count, since every run writes them."""
    if not (ROOT / ".git").exists():  # a repository around this folder is not ours
        return "unknown (not a git checkout)"
    # named, so that git neither searches nor minds another owner; a hook's variables do not count
    where = ["git", "--no-optional-locks", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"LC_ALL": "C"}

    def git(*words: str) -> str:
        done = subprocess.run([*where, *words], text=True, capture_output=True, cwd=ROOT, env=own, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", "src", "scripts", "configs")
        return git("log", "-1", "--no-show-signature", "--format=%H") + (" with uncommitted changes" if dirty else "")
    except OSError:
        return "unknown (git cannot be run)"
    except subprocess.CalledProcessError as error:
        return f"unknown ({error.stderr.partition(chr(10))[0]})".replace(f"{ROOT}/", "")


def device_model(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.get_num_threads()} threads)"


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What provenance.json notes of the code and of this machine."""
    versions = {"python": platform.python_version()} | {name: package_version(name) for name in _PACKAGES}
    return {"commit": commit(), "device": device_model(device), "versions": versions}


def shown(path: Path) -> Path:
    """A path for messages: relative to the repository's root if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
