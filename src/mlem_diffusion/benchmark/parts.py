"""What is timed, in parts that return rows; torch.utils.benchmark repeats the calls and waits for the device.

cfg: one size of the configuration, `benchmark.full` or `benchmark.small`.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Measurement, Timer

from ..diffusion.brownian import BrownianPath
from ..diffusion.estimator import SingleLevel
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..diffusion.step_rules import step_rule
from ..errors import SlowPath
from ..models.compiled import FastDenoiser
from ..models.flops import flops_per_evaluation
from ..models.torch_compile import first_line
from ..multilevel.estimators import Multilevel
from ..multilevel.probabilities import constant_probabilities
from ..training.step import TrainStep
from .networks import denoisers
from .table import Row, compared, row

Part = Callable[[], Iterable[Row]]
_ROUNDS, _WARM_UP = 3, 5  # a training step is captured as a CUDA graph in its fourth call


def parts_of(cfg: Any, process: Process, device: torch.device) -> dict[str, Part]:
    """All parts of a size, by name."""
    parts: dict[str, Part] = {"matmul": partial(matmul, cfg, device)}
    for mode in cfg.modes:
        for width in cfg.widths:
            parts[f"forward w{width} {mode}"] = partial(forward, cfg, device, width, mode)
    for precision in cfg.train.precisions:
        parts[f"train {precision}"] = partial(train, cfg, device, precision)
    return parts | {"sampler": partial(sampler, cfg, device, process)}


def measure(
    parts: Mapping[str, Part], progress: Callable[[int, int], object], save: Callable[[list[Row]], object]
) -> list[Row]:
    """Measure the parts and return their rows; save(rows) is called after each part, progress(done, total) before it.

    A part that fails, or falls back to a slow path, leaves a row that names the reason.
    """
    rows: list[Row] = []
    for done, (name, part) in enumerate(parts.items()):
        progress(done, len(parts))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowPath)
                rows.extend(part())
        except Exception as error:
            rows.append(row(name.split()[0], f"{name}: {first_line(error)}"))
        save(compared(rows))
        torch._dynamo.reset()  # each part starts as in a new process
        gc.collect()
        torch.cuda.empty_cache()
    return compared(rows)


def timed(functions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Measurement]:
    """Time functions for about `seconds` each, in turns, so that a warm or busy machine favours none of them."""
    for function in functions.values():
        for _ in range(_WARM_UP):
            function()
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": f}, label=k, num_threads=threads) for k, f in functions.items()]
    found = [t.blocked_autorange(min_run_time=seconds / _ROUNDS) for _ in range(_ROUNDS) for t in timers]
    return dict(zip(functions, Measurement.merge(found), strict=True))


def matmul(cfg: Any, device: torch.device) -> Iterable[Row]:
    """The product of two random square matrices: the best speed for networks on this device."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    a, b = torch.randn(2, cfg.matmul, cfg.matmul, device=device).to(dtype)
    (found,) = timed({"": lambda: a @ b}, cfg.seconds).values()
    yield row("matmul", f"{cfg.precision} {cfg.matmul}-cube", found, flops=2.0 * cfg.matmul**3)


def forward(cfg: Any, device: torch.device, width: int, mode: str) -> Iterable[Row]:
    """Forward passes of ours and diffusers' network, in the form that a sampler runs; mode: "eager" or "compiled"."""
    fast, networks = mode == "compiled", denoisers(width, cfg.resolution, cfg.unet, device)
    flops = {kind: flops_per_evaluation(network, cfg.resolution) for kind, network in networks.items()}
    options = {"compile": "on" if fast else "off", "graphs": fast, "batch": max(cfg.batches), "name": f"w{width}"}
    forms = {kind: FastDenoiser(network, cfg.precision, **options) for kind, network in networks.items()}
    for batch in cfg.batches:
        x = torch.randn(batch, 3, cfg.resolution, cfg.resolution, device=device)
        calls = {kind: partial(form, x, torch.zeros((), device=device)) for kind, form in forms.items()}
        for kind, found in timed(calls, cfg.seconds).items():
            label = f"{cfg.precision} {mode}"
            yield row(f"forward{kind}", label, found, width=width, batch=batch, flops=flops[kind])


def train(cfg: Any, device: torch.device, precision: str) -> Iterable[Row]:
    """One training step: forward, backward, clipping, Adam and the moving average. FLOPs: three forward passes."""
    width, batch = cfg.train.width, cfg.train.batch
    x0, noise = torch.randn(2, batch, 3, cfg.resolution, cfg.resolution, device=device)
    images = (x0, noise, torch.linspace(-8, 8, batch, device=device))
    flops, steps = {}, {}
    for kind, network in denoisers(width, cfg.resolution, cfg.unet, device).items():
        flops[kind] = 3 * flops_per_evaluation(network, cfg.resolution)
        ema = copy.deepcopy(network).eval().requires_grad_(False)
        steps[kind] = partial(TrainStep(network, ema, precision=precision), images, 1e-5, 0.999)
    for kind, found in timed(steps, cfg.seconds).items():
        yield row(f"train{kind}", precision, found, width=width, batch=batch, flops=flops[kind])


def sampler(cfg: Any, device: torch.device, process: Process) -> Iterable[Row]:
    """One step of the sampling loop with networks that cost nothing: what the loop adds to its networks.

    DDIM draws no noise after the start; DDPM draws the noise of each step: the difference is the price of the noise.
    """
    batch, flops = max(cfg.batches), (1.0, 6.0, 36.0)  # the FLOPs only decide the probabilities of the coins
    levels = [Level(f"free{k}", lambda x, logsnr: x, cost) for k, cost in enumerate(flops)]
    p = constant_probabilities(flops, gamma=2.5, c=4.0)
    estimators = {"one level": SingleLevel(levels[-1]), "ML-EM": Multilevel(tuple(levels), p, "independent")}

    def run(estimator: Any, key: str) -> None:
        path = BrownianPath(range(batch), (3, cfg.resolution, cfg.resolution), device)
        sample(estimator, step_rule(key), process.grid(cfg.steps), path)

    for key in ("ode/ddim", "sde/ddpm"):
        calls = {name: partial(run, estimator, key) for name, estimator in estimators.items()}
        for name, found in timed(calls, cfg.seconds).items():
            yield row("sampler", f"{key}, {name}, a step of {cfg.steps}", found, batch=batch, repeats=cfg.steps)
