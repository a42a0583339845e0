"""The parts of a benchmark, and running them one after the other within a time limit."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..diffusion.process import Process
from ..errors import UserError
from ..models.torch_compile import first_line
from .forward import Bench, forward, level, matmul
from .record import Cached, Found, Results, digest, row
from .sampling import noise, sampler
from .training import first_step, has_compiler, train

GROUPS = ("matmul", "forward", "level", "noise", "sampler", "train", "first_step")


@dataclass(frozen=True)
class Part:
    """Rows that are measured together. seconds: approximate; optional: if time is short, only gives `empty` rows."""

    name: str
    group: str
    seconds: float
    settings: str
    measure: Callable[[], Found]
    empty: tuple[dict[str, Any], ...]
    optional: bool = False


def parts_of(
    size: Mapping[str, Any],
    process: Process,
    unet: Mapping[str, Any],
    widths: Sequence[int],
    device: torch.device,
) -> list[Part]:
    """All parts of one size of configs/benchmark.yaml; unet and widths: an experiment's own family.

    A group whose entry is null is left out. Raises UserError for an unknown group or option.
    """
    unknown = sorted(set(size) - {*GROUPS, "resolution", "precision", "repeats", "minutes", "reference", "levels"})
    if unknown:
        raise UserError(f"benchmark: {', '.join(unknown)} is unknown; expected groups {', '.join(GROUPS)}.")
    bench = Bench(device, size["resolution"], size["precision"], size["repeats"])
    reference, family = dict(size["reference"]), list(size.get("levels") or widths)
    out: list[Part] = []

    def add(name: str, group: str, options: Mapping[str, Any], empty: dict[str, Any], run: Any, *args: Any) -> None:
        # these options do not change the measured values, so they are not part of the digest
        cached = {k: v for k, v in options.items() if k not in ("seconds_about", "optional", "modes")}
        settings = digest([group, repr(bench), cached, repr(args)])
        out.append(
            Part(
                name,
                group,
                float(options["seconds_about"]),
                settings,
                partial(run, bench, *args),
                (empty,),
                bool(options.get("optional")),
            )
        )

    for group in GROUPS:
        o = size.get(group)
        if o is None:
            continue
        if group == "matmul":
            add("matmul", group, o, row("matmul", ""), matmul, o["side"], o["precisions"])
        elif group == "forward":
            for mode, own in o["modes"].items():
                for width in o["widths"]:
                    options = {**o, **own}
                    empty = row("forward", f"{bench.precision} {mode}", width=width)
                    name = f"forward w{width} {mode}"
                    add(name, group, options, empty, forward, width, options["batches"], mode, reference)
        elif group == "level":
            for width in family:
                empty = row("level", f"{bench.precision} {o['mode']}", width=width)
                add(f"level w{width}", group, o, empty, level, width, o["batches"], o["mode"], dict(unet))
        elif group == "noise":
            add("noise", group, o, row("noise", ""), noise, process, o["steps"], o["batches"], len(family), o["c"])
        elif group == "sampler":
            for batch in o["batches"]:
                empty = row("sampler", f"{bench.precision} {o['mode']}", batch=batch)
                shared = (process, family, dict(unet), o["mode"], o["steps"], batch, o["c"], o["repeats"])
                add(f"sampler batch {batch}", group, o, empty, sampler, *shared)
        elif group == "train":
            shape = {**reference, **o.get("unet", {})}
            for precision in o["precisions"]:
                for whose in ("ours", "diffusers"):
                    empty = row("train" if whose == "ours" else "train_diffusers", precision, width=o["width"])
                    add(
                        f"train {precision} {whose}",
                        group,
                        o,
                        empty,
                        train,
                        process,
                        o["width"],
                        o["batch"],
                        o["seconds"],
                        precision,
                        whose,
                        shape,
                        o["compile"],
                        o["images"],
                    )
        else:
            shape, empty = {**reference, **o.get("unet", {})}, row("first_step", "cold", width=o["width"])
            add("first_step", group, o, empty, first_step, o["width"], o["batch"], shape, o["compile"], o["timeout"])
    # optional parts come last
    return sorted(out, key=lambda part: part.optional)


def chosen(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """The parts of these groups, or all parts if none is named. Raises UserError for an unknown group."""
    unknown = [group for group in only if group not in GROUPS]
    if unknown:
        raise UserError(
            f"only: {', '.join(unknown)} is not a group of the benchmark; expected some of {', '.join(GROUPS)}."
        )
    return [part for part in parts if not only or part.group in only]


class _OutOfTime(BaseException):
    """A BaseException, so that no `except Exception` on the way treats it as a failure of a part."""


@contextlib.contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise _OutOfTime after this many seconds, if signals are available."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(
    parts: Sequence[Part],
    results: Results,
    *,
    device: torch.device,
    code: str,
    commit: str,
    spare: Callable[[], float | None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
    seconds_left: Callable[[], float | None] = lambda: None,
    done: Callable[[Part, Found], None] = lambda part, found: None,
) -> bool:
    """Measure the parts that `results` lacks and write it after each part. Returns False if it stopped early.

    spare: seconds for optional parts; parts that would not fit are skipped. seconds_left: seconds until this call must
    end; a part that would not fit is left to the next call (the first part is always tried). A part that raises leaves
    an empty row and a note, and the other parts still run.
    """
    first = True
    for part in parts:
        if results.finished(part.name):
            continue
        left = seconds_left()
        if should_stop() or (left is not None and left < part.seconds and not first):
            return False
        first, start, limit = False, time.perf_counter(), spare() if part.optional else None
        if part.optional and not has_compiler(device):
            found = _empty(part, "torch.compile needs a C++ compiler on this machine, and found none")
        elif limit is not None and limit < part.seconds:
            found = _empty(
                part, f"about {part.seconds:.0f} s did not fit; run the same command again to measure it", True
            )
        else:
            try:
                with _time_limit(limit):
                    found = part.measure()
            except _OutOfTime:
                found = _empty(part, f"not finished after {limit:.0f} s; run the same command to try again", True)
            except UserError:
                raise
            except Exception as error:
                found = _empty(part, first_line(error))
        results.put(part.name, Cached(part.settings, code, commit, round(time.perf_counter() - start, 1), found))
        _forget(device)
        done(part, found)
    return True


def _empty(part: Part, why: str, skipped: bool = False) -> Found:
    found = Found([dict(r) for r in part.empty], skipped=skipped)
    found.note(f"{part.name}: {why}.")
    return found


def _forget(device: torch.device) -> None:
    """Drop compiled programs, graphs and memory of the previous part, so that each part starts as in a new process."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
