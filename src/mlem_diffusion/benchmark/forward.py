"""Forward passes: a matrix product as the yardstick, the reference networks, and the levels of an experiment."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import SlowPath
from ..models.compiled import FastDenoiser
from ..models.flops import flops_per_evaluation
from ..models.torch_compile import first_line
from .networks import denoiser_of, fast, has_diffusers, inputs
from .record import Found, row
from .timing import measure

NO_DIFFUSERS = "diffusers is not installed (the test extra), so nothing is compared with it."


@dataclass(frozen=True)
class Bench:
    """Settings of all parts: the device, the image shape [3, size, size], the precision, and the number of repeats."""

    device: torch.device
    size: int
    precision: str
    repeats: int


def matmul(bench: Bench, side: int, precisions: Sequence[str]) -> Found:
    """Time the product of two random square matrices: the best speed for networks of matrix products on this device."""
    found, bench = Found(), replace(bench, repeats=3 * bench.repeats)  # all other parts are compared with it
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        (ms,) = attempt(found, {f"matmul {precision}": lambda a=a, b=b: a @ b}, bench).values()
        found.rows.append(row("matmul", f"{precision} {side}-cube", ms, flops=2.0 * side**3))
    return found


def forward(bench: Bench, width: int, batches: Sequence[int], mode: str, unet: Mapping[str, Any]) -> Found:
    """Time the reference architecture at one width through `FastDenoiser`: ours and diffusers', in turns."""
    found = Found()
    names = {"ours": "forward", "diffusers": "forward_diffusers"}
    networks, flops = {}, {}
    for whose in names:
        if whose == "diffusers" and not has_diffusers():
            found.note(NO_DIFFUSERS)
            continue
        try:
            denoiser = denoiser_of(whose, width, bench.size, unet, bench.device)
            flops[whose] = flops_per_evaluation(denoiser, bench.size)
            networks[whose] = fast(denoiser, bench.precision, mode, f"w{width} ({whose})", max(batches))
        except Exception as error:
            found.note(f"forward w{width}, {whose}: {first_line(error)}.")
    if len(flops) == 2:
        found.add("flops_ratio_diffusers", width=width, ratio=flops["diffusers"] / flops["ours"])
    for batch in batches:
        x, logsnr = inputs(batch, bench.size, bench.device)
        runs = {
            f"{names[whose]} w{width} batch {batch} {mode}": (lambda net=net, x=x, at=logsnr: net(x, at))
            for whose, net in networks.items()
        }
        times = dict(zip(networks, attempt(found, runs, bench).values(), strict=True))
        labels = {whose: label(net, mode) for whose, net in networks.items()}
        times = {whose: ms if as_asked(networks[whose], mode) else None for whose, ms in times.items()}
        for whose, what in names.items():
            ratio, ms = None, times.get(whose)
            ours, theirs = times.get("ours"), times.get("diffusers")
            if whose == "ours" and ours and theirs and labels["ours"] == labels["diffusers"]:
                ratio = theirs / ours
            text = labels.get(whose, f"{bench.precision} {mode}")
            found.rows.append(row(what, text, ms, width=width, batch=batch, flops=flops.get(whose), ratio=ratio))
    return found


def level(bench: Bench, width: int, batches: Sequence[int], mode: str, unet: Mapping[str, Any]) -> Found:
    """Time one level of an experiment's family, with the architecture that the family uses (unet.narrow)."""
    found = Found()
    denoiser = denoiser_of("ours", width, bench.size, unet, bench.device)
    flops = flops_per_evaluation(denoiser, bench.size)
    net = fast(denoiser, bench.precision, mode, f"w{width}", max(batches))
    for batch in batches:
        x, logsnr = inputs(batch, bench.size, bench.device)
        name = f"level w{width} batch {batch} {mode}"
        (ms,) = attempt(found, {name: lambda x=x, at=logsnr: net(x, at)}, bench).values()
        ms = ms if as_asked(net, mode) else None
        found.rows.append(row("level", label(net, mode), ms, width=width, batch=batch, flops=flops))
    return found


def as_asked(net: FastDenoiser, mode: str) -> bool:
    """False if the mode needs a compiled network and this one is not: FastDenoiser runs eagerly if compiling fails."""
    return mode not in ("compiled", "tuned") or "compiled" in net.mode


def label(net: FastDenoiser, mode: str) -> str:
    """Precision and the mode that the network runs in, or the requested mode if it cannot run in it."""
    if not as_asked(net, mode):
        return f"{net.precision} {mode}"
    return net.mode + (", tuned" if mode == "tuned" else "")


def attempt(found: Found, functions: Mapping[str, Callable[[], object]], bench: Bench) -> dict[str, float | None]:
    """Milliseconds of each function, timed in turns; None and a note for one that fails (e.g. out of memory)."""
    times: dict[str, float | None] = dict.fromkeys(functions)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", SlowPath)
        working = {}
        for name, function in functions.items():
            try:
                function()
                function()  # the second call of a compiled network may still recompile
                working[name] = function
            except Exception as error:
                found.note(f"{name}: {first_line(error)}.")
        try:
            times |= dict(zip(working, measure(list(working.values()), bench.device, bench.repeats), strict=True))
        except Exception as error:
            found.note(f"{', '.join(working)}: {first_line(error)}.")
    for warning in caught:
        if issubclass(warning.category, SlowPath):
            found.note(str(warning.message))
    return times
