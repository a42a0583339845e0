"""Training speed in the real training loop, and the time to its first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.process import Process
from ..errors import Interrupted, SlowPath
from ..models.flops import flops_per_evaluation
from ..models.torch_compile import first_line
from ..training.loop import TrainConfig, train_level
from .forward import NO_DIFFUSERS, Bench
from .networks import denoiser_of, has_diffusers
from .record import Found, row

_FOREVER = 10**9
_SKIPPED = 2  # reports before the clock starts: compilation, capture and the first filling of caches are not timed


def train(
    bench: Bench,
    process: Process,
    width: int,
    batch: int,
    seconds: float,
    precision: str,
    whose: str,
    unet: Mapping[str, Any],
    compile: str = "auto",
    count: int = 20_000,
) -> Found:
    """Time about `seconds` of train_level on `count` random images of the benchmark's size, between two reports."""
    found = Found()
    what = "train" if whose == "ours" else "train_diffusers"
    if whose == "diffusers" and not has_diffusers():
        found.note(NO_DIFFUSERS)
        found.rows.append(row(what, precision, width=width, batch=batch))
        return found
    denoiser = denoiser_of(whose, width, bench.size, unet, bench.device)
    flops = 3 * flops_per_evaluation(denoiser, bench.size)
    images = np.random.default_rng(0).integers(0, 256, (count, 3, bench.size, bench.size), dtype=np.uint8)
    reports: list[tuple[float, int]] = []

    def report(progress: dict[str, Any]) -> None:
        reports.append((time.perf_counter(), progress["images"]))

    def enough() -> bool:
        return len(reports) > _SKIPPED and reports[-1][0] - reports[_SKIPPED - 1][0] >= seconds

    # a small learning rate: random images give nothing to learn, and the loss must stay finite
    every = batch * (20 if bench.device.type == "cuda" else 1)  # each report waits for the GPU, so they are rare
    config = TrainConfig(
        images=_FOREVER, batch=batch, lr=1e-5, log_every=every, save_every=1e9, snapshots=[1.0], precision=precision,
        compile=compile,
    )  # fmt: skip
    ms = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowPath)
        try:
            train_level(
                denoiser, images, process, config, Path(folder), width=width, device=bench.device, report=report,
                should_stop=enough,
            )  # fmt: skip
        except Interrupted:
            (start, first), (stop, last) = reports[_SKIPPED - 1], reports[-1]
            ms = 1e3 * (stop - start) * batch / (last - first)
        except Exception as error:
            found.note(f"{what} w{width} {precision}: {first_line(error)}.")
    slow = [str(w.message) for w in caught if issubclass(w.category, SlowPath)]
    for text in slow:
        found.note(text)
    found.rows.append(row(what, precision, ms, width=width, batch=batch, flops=flops))
    return found


def first_step(
    bench: Bench, width: int, batch: int, unet: Mapping[str, Any], compile: str = "auto", timeout: float = 900
) -> Found:
    """Time from the start of a Python process to the end of its first training step, with empty and filled caches."""
    found = Found()
    task = {"width": width, "batch": batch, "size": bench.size, "unet": dict(unet), "compile": compile}
    command = [
        sys.executable,
        "-m",
        "mlem_diffusion.benchmark.first_step",
        json.dumps(task | {"device": str(bench.device)}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}  # its default is inside inductor's cache
        source = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [env.get("PYTHONPATH")])])
        env["TORCHINDUCTOR_CACHE_DIR"] = folder
        for mode in ("cold", "warm"):
            start, ms = time.time(), None
            try:
                done = subprocess.run(
                    command, env=env, capture_output=True, text=True, timeout=timeout, check=True, cwd=folder
                )
                answer = json.loads(done.stdout.splitlines()[-1])
                ms = 1e3 * (answer["finished"] - start)
                for text in answer["slow"]:
                    found.note(text)
                if answer["slow"]:
                    ms = None  # a slow path ran instead of the requested one
            except subprocess.TimeoutExpired:
                found.note(f"first_step {mode}: not finished after {timeout:.0f} s.")
            except (subprocess.CalledProcessError, ValueError, LookupError) as error:
                lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                found.note(f"first_step {mode}: {lines[-1][:160] if lines else 'no answer'}.")
            found.rows.append(row("first_step", mode, ms, width=width))
    return found


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work on this device: on the CPU it needs a C++ compiler."""
    if device.type != "cpu":
        return True
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:
        return False
