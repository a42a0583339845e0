"""Where a run takes place: device, machine, versions of the code and of its packages."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("torch", "torchvision", "torch-fidelity", "hydra-core", "numpy", "scipy", "pandas")


def set_up_device(cfg: Any, training: bool) -> torch.device:
    """The configured device (auto: CUDA if available), with torch's threads and precision: TF32 in training only.

    Each rank gets its own GPU. UserError if the device does not work."""
    name = cfg.device
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name} does not work on this machine ({torch.cuda.device_count()} GPUs): "
            "set device=auto or device=cpu, or start fewer processes (NPROC)."
        ) from error
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if training:
        torch.set_float32_matmul_precision("high")
    else:
        torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = bool(cfg.autotune)
    return device


def commit() -> str:
    """The checked-out commit; changed results and checkpoints do not count, since every run writes them."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        dirty = git("status", "--porcelain", "--", "src", "scripts", "configs")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def device_model(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
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
    versions = {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES}
    return {"commit": commit(), "device": device_model(device), "versions": versions}


def shown(path: Path) -> Path:
    """A path for messages: relative to the repository's root if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
