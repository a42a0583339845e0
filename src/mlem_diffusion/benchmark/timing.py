"""Timing with CUDA events or the wall clock; functions to be compared are timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

_BLOCK_MS = 30.0  # short calls are timed in blocks, so that clock resolution and launch time do not matter
_MOST = 200


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_ms(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, until the device has finished."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def measure(functions: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds per call of each function, taken in turns so that a warm or busy machine favours none of them.

    The functions must have been called before (compiled, captured). CUDA: median of `repeats` pairs of events. CPU: the
    smallest of `repeats` wall-clock times, because other programs can only add time.
    """
    calls = [max(1, min(_MOST, int(_BLOCK_MS / max(wall_ms(f, device), 1e-3)))) for f in functions]
    if device.type == "cuda":
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in functions]
        for _ in range(repeats):
            for function, count, own in zip(functions, calls, pairs, strict=True):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                for _ in range(count):
                    function()
                stop.record()
                own.append((start, stop))
        torch.cuda.synchronize(device)
        return [statistics.median(a.elapsed_time(b) for a, b in own) / n for own, n in zip(pairs, calls, strict=True)]
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, own in zip(functions, calls, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                function()
            own.append(1e3 * (time.perf_counter() - start) / count)
    return [min(own) for own in times]


def described(device: torch.device, repeats: int) -> str:
    """A description of how `measure` times functions."""
    if device.type == "cuda":
        return f"CUDA events, median of {repeats}, random weights and data, compared networks in turns"
    return f"wall clock, smallest of {repeats}, random weights and data, compared networks in turns"
