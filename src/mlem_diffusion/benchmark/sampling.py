"""Complete samplers against the networks that they call, and the random numbers that they need."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..diffusion.brownian import path_increments
from ..diffusion.estimator import Estimator, SingleLevel
from ..diffusion.level import Level
from ..diffusion.process import Process
from ..diffusion.sampler import sample
from ..errors import SlowPath
from ..models.flops import flops_per_evaluation
from ..models.torch_compile import first_line
from ..multilevel.estimators import Multilevel
from ..multilevel.probabilities import constant_probabilities, draw_coins
from .forward import Bench, as_asked, attempt
from .networks import denoiser_of, fast
from .record import Found, row
from .timing import measure

GAMMA = 2.5  # of the probabilities; only the cost of the coins matters for timing, not the resulting error


@dataclass
class _Noting:
    """A level's denoiser that records the number of samples of each call."""

    index: int
    denoise: Callable[[Tensor, Tensor], Tensor]
    calls: list[tuple[int, int]] = field(repr=False)

    def __call__(self, x: Tensor, logsnr: Tensor) -> Tensor:
        self.calls.append((self.index, len(x)))
        return self.denoise(x, logsnr)


def sampler(
    bench: Bench,
    process: Process,
    widths: Sequence[int],
    unet: Mapping[str, Any],
    mode: str,
    steps: int,
    batch: int,
    c: float,
    repeats: int,
) -> Found:
    """Time DDPM with the largest level and ML-EM with two kinds of coins, in three kinds of rows.

    sampler: the complete call, with its random numbers; sampler_loop: without the drawing of noise (ledger.seconds);
    sampler_networks: only the network calls that the sampler made, with the same sizes and in the same order.
    """
    found, bench = Found(), replace(bench, repeats=repeats)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowPath)
        nets, levels = [], []
        for width in widths:
            denoiser = denoiser_of("ours", width, bench.size, unet, bench.device)
            flops = flops_per_evaluation(denoiser, bench.size)
            nets.append(fast(denoiser, bench.precision, mode, f"w{width}", batch))
            levels.append(Level(f"w{width}", nets[-1], flops))
        p = constant_probabilities([level.flops for level in levels], GAMMA, c)

        def all_estimators(family: Sequence[Level]) -> dict[str, Estimator]:
            return {
                f"DDPM with {family[-1].name}": SingleLevel(family[-1]),
                "ML-EM, independent coins": Multilevel(tuple(family), p, "independent"),
                "ML-EM, systematic coins": Multilevel(tuple(family), p, "systematic"),
            }

        for name in all_estimators(levels):
            _one(found, bench, process, levels, nets, all_estimators, name, steps, batch, mode)
    for warning in caught:
        if issubclass(warning.category, SlowPath):
            found.note(str(warning.message))
    return found


def _one(
    found: Found,
    bench: Bench,
    process: Process,
    levels: Sequence[Level],
    nets: Sequence[Any],
    estimators: Callable[[Sequence[Level]], dict[str, Estimator]],
    name: str,
    steps: int,
    batch: int,
    mode: str,
) -> None:
    grid, shape, seeds = process.grid(steps), (3, bench.size, bench.size), range(batch)
    width = int(levels[-1].name[1:]) if name.startswith("DDPM") else None
    times: dict[str, float | None] = dict.fromkeys(("sampler", "sampler_loop", "sampler_networks"))
    flops, text = None, f"{name}, {steps} steps"
    calls: list[tuple[int, int]] = []
    noting = [Level(v.name, _Noting(k, v.denoise, calls), v.flops) for k, v in enumerate(levels)]
    loops: list[float] = []
    try:
        _, ledger = sample(estimators(noting)[name], grid, "sde", "ddpm", seeds, shape, bench.device)
        flops = ledger.flops_per_image
        if len(calls) != sum(ledger.launches):
            raise RuntimeError(f"{len(calls)} calls were recorded, but the ledger counts {sum(ledger.launches)}")
        x = torch.randn(batch, *shape, device=bench.device)
        at = torch.zeros((), device=bench.device)
        estimator = estimators(levels)[name]

        def whole() -> None:
            loops.append(1e3 * sample(estimator, grid, "sde", "ddpm", seeds, shape, bench.device)[1].seconds)

        def networks() -> None:
            with torch.no_grad():
                for k, count in calls:
                    levels[k].denoise(x[:count], at.expand(count))

        networks()
        if all(as_asked(net, mode) for net in nets):
            times["sampler"], times["sampler_networks"] = measure([whole, networks], bench.device, bench.repeats)
            del loops[:1]  # from the call with which measure() estimates the duration
            times["sampler_loop"] = sorted(loops)[len(loops) // 2] if bench.device.type == "cuda" else min(loops)
            overhead = {
                "overhead": times["sampler"] / times["sampler_networks"] - 1,
                "overhead_without_noise": times["sampler_loop"] / times["sampler_networks"] - 1,
            }
            found.add("sampler_overhead", estimator=name, batch=batch, steps=steps, calls=len(calls), **overhead)
    except Exception as error:
        found.note(f"sampler, {name}, batch {batch}: {first_line(error)}.")
    for what, ms in times.items():
        found.rows.append(row(what, f"{bench.precision} {mode}, {text}", ms, width=width, batch=batch, flops=flops))


def noise(bench: Bench, process: Process, steps: int, batches: Sequence[int], levels: int, c: float) -> Found:
    """Time the random numbers of a batch: path increments on two grids (`steps`, base grid) and two kinds of coins."""
    found = Found()
    shape = (3, bench.size, bench.size)
    p = constant_probabilities([6.0**k for k in range(levels)], GAMMA, c)
    table = p[None].repeat(steps, axis=0)
    for batch in batches:
        seeds = range(batch)
        functions: dict[str, Callable[[], object]] = {
            f"coins {kind}, {steps} steps, {levels} levels": lambda kind=kind, seeds=seeds: draw_coins(
                table, seeds, kind
            )
            for kind in ("independent", "systematic")
        }
        for count in dict.fromkeys((steps, process.base_steps)):
            grid = process.grid(count)
            functions[f"path, {count} steps"] = lambda grid=grid, seeds=seeds: path_increments(
                seeds, shape, grid, "snr", bench.device
            )
        for name, function in functions.items():
            (ms,) = attempt(found, {name: function}, bench).values()
            found.rows.append(row("noise", name, ms, batch=batch))
    return found
