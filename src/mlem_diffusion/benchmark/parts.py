"""What is timed, in parts: each part returns rows, timed by torch.utils.benchmark, which waits for the device."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Measurement, Timer

from ..diffusion.brownian import BrownianPath
from ..diffusion.estimator import SingleLevel
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..diffusion.step_rules import step_rule
from ..errors import Interrupted, SlowPath, UserError
from ..models.compiled import FastDenoiser
from ..models.flops import flops_per_evaluation
from ..models.torch_compile import first_line
from ..multilevel.estimators import Multilevel
from ..multilevel.probabilities import constant_probabilities, draw_coins
from ..training.step import TrainStep
from .networks import denoiser_of, names
from .table import Row, row

_ROUNDS, _WARM_UP = 3, 5  # a training step is captured as a CUDA graph in its fourth call
_FLOPS = (1.0, 6.0, 36.0)  # of the free levels; they only decide the probabilities of the coins


@dataclass(frozen=True)
class Bench:
    """The device, the image size, the precision of forward passes, seconds of one measurement, and the network."""

    device: torch.device
    resolution: int
    precision: str
    seconds: float
    unet: Mapping[str, Any]

    def time(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, Measurement]:
        """Time functions in turns, so that a warm or busy machine favours none of them."""
        for function in functions.values():
            for _ in range(_WARM_UP):
                function()
        threads = torch.get_num_threads()
        timers = [Timer("f()", globals={"f": f}, label=k, num_threads=threads) for k, f in functions.items()]
        found = [t.blocked_autorange(min_run_time=self.seconds / _ROUNDS) for _ in range(_ROUNDS) for t in timers]
        return dict(zip(functions, Measurement.merge(found), strict=True))


def parts_of(cfg: Any, process: Process, device: torch.device) -> dict[str, Callable[[], list[Row]]]:
    """All parts of one size of the configuration (`benchmark.full` or `benchmark.small`), by name."""
    bench = Bench(device, cfg.resolution, cfg.precision, cfg.seconds, dict(cfg.unet))
    parts: dict[str, Callable[[], list[Row]]] = {"matmul": partial(matmul, bench, cfg.matmul)}
    for mode in cfg.modes:
        for width in cfg.widths:
            parts[f"forward w{width} {mode}"] = partial(forward, bench, width, cfg.batches, mode)
    for precision in cfg.train.precisions:
        parts[f"train {precision}"] = partial(train, bench, cfg.train, precision)
    parts["noise"] = partial(noise, bench, process, cfg.steps, cfg.batches[0])
    parts["sampler"] = partial(sampler, bench, process, cfg.steps, cfg.batches[0])
    return parts


def measure(
    parts: Mapping[str, Callable[[], list[Row]]],
    finished: list[Row],
    save: Callable[[list[Row]], object],
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Measure the parts that have no row in `finished`, and return all rows; save(rows) is called after each part.

    A part that fails, or that falls back to a slow path, leaves one row without numbers, which names the reason. Raises
    Interrupted between two parts if should_stop() returns true.
    """
    rows = [r for r in finished if r.get("part") in parts and r["ms"] is not None]
    for name, part in parts.items():
        if any(r["part"] == name for r in rows):
            continue
        if should_stop():
            raise Interrupted(f"stopped before {name}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowPath)
                found = part()
        except UserError:
            raise
        except Exception as error:
            found = [row(name.split()[0], f"{name}: {first_line(error)}")]
        rows += [{"part": name, **r} for r in found]
        save(rows)
        _forget(torch.cuda.is_available())
    return rows


def _forget(has_cuda: bool) -> None:
    """Drop compiled programs, graphs and memory of the last part, so that each part starts as in a new process."""
    torch._dynamo.reset()
    gc.collect()
    if has_cuda:
        torch.cuda.empty_cache()


def matmul(bench: Bench, side: int) -> list[Row]:
    """The product of two random square matrices: the best speed for networks of matrix products on this device."""
    rows = []
    for precision in dict.fromkeys(("bf16", bench.precision)):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = torch.randn(2, side, side, device=bench.device).to(dtype)
        found = bench.time({precision: lambda a=a, b=b: a @ b})
        rows.append(row("matmul", f"{precision} {side}-cube", found[precision], flops=2.0 * side**3))
    return rows


def forward(bench: Bench, width: int, batches: list[int], mode: str) -> list[Row]:
    """Forward passes of ours and diffusers' network, in the form that a sampler runs; mode: "eager" or "compiled"."""
    networks, flops = {}, {}
    for name in names():
        denoiser = denoiser_of(name, width, bench.resolution, bench.unet, bench.device)
        flops[name] = flops_per_evaluation(denoiser, bench.resolution)
        fast = mode == "compiled"
        compile = "on" if fast else "off"
        networks[name] = FastDenoiser(denoiser, bench.precision, compile, f"w{width}", max(batches), graphs=fast)
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, bench.resolution, bench.resolution, device=bench.device)
        logsnr = torch.zeros((), device=bench.device)
        with torch.no_grad():
            found = bench.time({k: lambda net=net, x=x, at=logsnr: net(x, at) for k, net in networks.items()})
        label = f"{bench.precision} {mode}"
        rows += [row(_what("forward", k), label, m, width=width, batch=batch, flops=flops[k]) for k, m in found.items()]
    return rows


def train(bench: Bench, cfg: Any, precision: str) -> list[Row]:
    """One training step: forward, backward, clipping, Adam and the moving average. FLOPs: three forward passes."""
    shape = (cfg.batch, 3, bench.resolution, bench.resolution)
    x0, logsnr = torch.rand(shape, device=bench.device) * 2 - 1, torch.linspace(-8, 8, cfg.batch, device=bench.device)
    batch = (x0, torch.randn(shape, device=bench.device), logsnr)
    rows, flops = [], {}
    steps: dict[str, Callable[[], object]] = {}
    for name in names():
        denoiser = denoiser_of(name, cfg.width, bench.resolution, bench.unet, bench.device)
        flops[name] = 3 * flops_per_evaluation(denoiser, bench.resolution)
        ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        step = TrainStep(denoiser, ema, precision=precision)
        steps[name] = lambda step=step: step(batch, 1e-5, 0.999)
    for name, found in bench.time(steps).items():
        rows.append(row(_what("train", name), precision, found, width=cfg.width, batch=cfg.batch, flops=flops[name]))
    return rows


def _what(kind: str, name: str) -> str:
    return kind if name == "ours" else f"{kind}_{name}"


def noise(bench: Bench, process: Process, steps: int, batch: int) -> list[Row]:
    """The random numbers of a batch: increments of the path on two grids, and two kinds of coins."""
    shape, seeds = (3, bench.resolution, bench.resolution), range(batch)
    clock = step_rule("sde/ddpm").clock
    table = _probabilities()[None].repeat(steps, axis=0)
    functions: dict[str, Callable[[], object]] = {}
    for count in (steps, process.base_steps):
        path, grid = BrownianPath(seeds, shape, bench.device), process.grid(count)
        functions[f"path, {count} steps"] = lambda path=path, grid=grid: path.increments(grid, clock)
    for coins in ("independent", "systematic"):
        functions[f"coins {coins}, {steps} steps"] = lambda coins=coins: draw_coins(table, seeds, coins)
    return [row("noise", name, m, batch=batch) for name, m in bench.time(functions).items()]


def sampler(bench: Bench, process: Process, steps: int, batch: int) -> list[Row]:
    """One step of the sampling loop with networks that cost nothing: what the sampler adds to its networks.

    DDIM draws no noise after the start; DDPM draws the noise of each step.
    """
    shape, grid = (3, bench.resolution, bench.resolution), process.grid(steps)
    levels = tuple(Level(f"free{k}", lambda x, logsnr: x, flops) for k, flops in enumerate(_FLOPS))
    estimators = {
        "one level": SingleLevel(levels[-1]),
        "ML-EM": Multilevel(levels, _probabilities(), "independent"),
    }
    functions: dict[str, Callable[[], object]] = {}
    for key in ("ode/ddim", "sde/ddpm"):
        for name, estimator in estimators.items():
            functions[f"{key}, {name}, a step of {steps}"] = lambda rule=step_rule(key), estimator=estimator: sample(
                estimator, rule, grid, BrownianPath(range(batch), shape, bench.device)
            )
    return [row("sampler", name, m, batch=batch, repeats=steps) for name, m in bench.time(functions).items()]


def _probabilities() -> np.ndarray:
    return constant_probabilities(_FLOPS, gamma=2.5, c=4.0)
