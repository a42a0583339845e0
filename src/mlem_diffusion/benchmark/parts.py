"""What is timed, in parts that return rows; torch.utils.benchmark repeats the calls and waits for the device.

cfg: one size of the configuration, `benchmark.full` or `benchmark.small`.
"""

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
from ..models.compiled import FastDenoiser, first_line
from ..models.flops import flops_per_evaluation
from ..multilevel.estimators import Multilevel
from ..multilevel.probabilities import constant_probabilities
from ..training.levels import TrainConfig
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


def timed(cfg: Any, what: str, mode: str, calls: Mapping[str, Callable], **shape: Any) -> Iterable[Row]:
    """A row for each function, what + its name: timed in turns, so that a warm or busy machine favours none."""
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": call}, label=name, num_threads=threads) for name, call in calls.items()]
    found = [t.blocked_autorange(min_run_time=cfg.seconds / _ROUNDS) for _ in range(_ROUNDS) for t in timers]
    for name, measured in zip(calls, Measurement.merge(found), strict=True):
        yield row(f"{what}{name}", mode, measured, **shape)


def matmul(cfg: Any, device: torch.device) -> Iterable[Row]:
    """The product of two random square matrices: the best speed for networks on this device."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    a, b = torch.randn(2, cfg.matmul, cfg.matmul, device=device).to(dtype)
    mode = f"{cfg.precision} {cfg.matmul}-cube"
    yield from timed(cfg, "matmul", mode, {"": lambda: a @ b}, flops=2.0 * cfg.matmul**3)


def forward(cfg: Any, device: torch.device, width: int, mode: str) -> Iterable[Row]:
    """Forward passes of ours and diffusers' network, in the form that a sampler runs; mode: "eager" or "compiled"."""
    fast, networks = mode == "compiled", denoisers(width, cfg.resolution, cfg.unet, device)
    flops = flops_per_evaluation(networks[""], cfg.resolution)  # theirs have the same
    options = {"compile": "on" if fast else "off", "graphs": fast, "batch": max(cfg.batches), "name": f"w{width}"}
    forms = {kind: FastDenoiser(network, cfg.precision, **options) for kind, network in networks.items()}
    for batch in cfg.batches:
        x = torch.randn(batch, 3, cfg.resolution, cfg.resolution, device=device)
        calls = {kind: partial(form, x, torch.zeros((), device=device)) for kind, form in forms.items()}
        yield from timed(cfg, "forward", f"{cfg.precision} {mode}", calls, width=width, batch=batch, flops=flops)


def train(cfg: Any, device: torch.device, precision: str) -> Iterable[Row]:
    """One training step: forward, backward, clipping, Adam and the moving average. FLOPs: three forward passes."""
    width, batch = cfg.train.width, cfg.train.batch
    x0, noise = torch.randn(2, batch, 3, cfg.resolution, cfg.resolution, device=device)
    images, steps = (x0, noise, torch.linspace(-8, 8, batch, device=device)), {}
    networks = denoisers(width, cfg.resolution, cfg.unet, device)
    for kind, network in networks.items():
        ema = copy.deepcopy(network).eval().requires_grad_(False)
        steps[kind] = partial(TrainStep(network, ema, TrainConfig(precision=precision)), images, 1e-5, 0.999)
    flops = 3 * flops_per_evaluation(networks[""], cfg.resolution)
    yield from timed(cfg, "train", precision, steps, width=width, batch=batch, flops=flops)


def sampler(cfg: Any, device: torch.device, process: Process) -> Iterable[Row]:
    """One step of the sampling loop with networks that cost nothing: what the loop adds to its networks.

    DDIM draws no noise after the start; DDPM draws the noise of each step: the difference is the price of the noise.
    """
    batch, flops = max(cfg.batches), (1.0, 6.0, 36.0)  # the FLOPs only decide the probabilities of the coins
    levels = tuple(Level(f"free{k}", lambda x, logsnr: x, cost) for k, cost in enumerate(flops))
    ml_em = Multilevel(levels, constant_probabilities(flops, gamma=2.5, c=4.0), "independent")

    def run(estimator: Any, key: str) -> None:
        path = BrownianPath(range(batch), (3, cfg.resolution, cfg.resolution), device)
        sample(estimator, step_rule(key), process.grid(cfg.steps), path)

    for key in ("ode/ddim", "sde/ddpm"):
        for name, estimator in (("one level", SingleLevel(levels[-1])), ("ML-EM", ml_em)):
            mode, call = f"{key}, {name}, a step of {cfg.steps}", {"": partial(run, estimator, key)}
            yield from timed(cfg, "sampler", mode, call, batch=batch, repeats=cfg.steps)
