"""The content of gamma.json: errors and estimates of a trained family at all its training lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.level import Level
from ..diffusion.process import Process
from ..errors import UserError
from ..models.family import identity_of
from . import denoising_errors as errors_of
from .estimate import LevelErrors, estimate
from .level_quality import differences_fall, hierarchy_warnings, overfitting_warnings
from .training_seeds import Repeat, repeat_pairs, seed_spread

Metadata = Sequence[Mapping[str, Any]]
Load = Callable[[Mapping[str, Any], int], Level]
Bar = Callable[[str, int, str], AbstractContextManager[Any]]


def measure(
    family: Metadata,
    again: Metadata,
    load: Load,
    held_out: Tensor,
    process: Process,
    settings: Any,
    bar: Bar = lambda *_: nullcontext(),
) -> dict[str, Any]:
    """Measure a family, given the metadata of its levels and of levels trained `again` from other seeds.

    load(metadata, snapshot) returns a level after a part of its training (snapshot -1: at the end). held_out
    [M,3,S,S] in [-1, 1]. settings: noise_levels, batch, seed, bootstrap. bar(label, total, unit) is a context whose
    value is called with (done, total)."""
    if len(family) < 3:
        raise UserError("gamma needs at least three levels (family.widths), better seven.")
    lengths, losses = [], []
    count = min(len(m["snapshots"]) for m in [*family, *again])
    for i in range(count):  # counted from the end: the last snapshot of every level is its final one
        with bar(f"training length {i + 1}", settings.noise_levels, "noise level") as progress:
            errors, repeats = level_errors(family, again, load, held_out, process, settings, i - count, progress)
        losses.append(errors.pool(errors.loss))
        fraction = round(errors.images[0] / family[0]["images"], 3)
        lengths.append({"fraction": fraction, "images": errors.images, **_estimates(errors, repeats, settings)})
    result = {k: v for k, v in lengths[-1].items() if k not in ("fraction", "images")}
    overfitting = overfitting_warnings([m["name"] for m in family], [e["images"] for e in lengths], losses)
    return result | {
        "warnings": [*result["warnings"], *overfitting],
        "pooling": errors_of.POOLING,
        "weights_used": "EMA",
        "made_with": identity_of(family),
        "held_out_images": len(held_out),
        "training_lengths": [{k: v for k, v in e.items() if k != "per_noise_level"} for e in lengths],
    }


def level_errors(
    family: Metadata,
    again: Metadata,
    load: Load,
    held_out: Tensor,
    process: Process,
    settings: Any,
    snapshot: int = -1,
    progress: errors_of.Progress = None,
) -> tuple[LevelErrors, list[Repeat]]:
    """Errors of the family and of the levels trained again, at one training length; arguments as in `measure`."""
    levels, k = [load(m, snapshot) for m in [*family, *again]], len(family)
    repeated = [[m["width"] for m in family].index(m["width"]) for m in again]
    own = repeat_pairs(k, repeated)
    pairs = [*errors_of.family_pairs(k), *chain(*own)]
    logsnr = errors_of.noise_levels(process, settings.noise_levels)
    options = {"seed": settings.seed, "batch": settings.batch, "progress": progress}
    found = iter(errors_of.squared_differences(levels, pairs, held_out, logsnr, **options))
    errors = LevelErrors(
        widths=[m["width"] for m in family],
        names=[m["name"] for m in family],
        flops=np.array([m["flops"] for m in family], dtype=np.float64),
        images=[m["snapshots"][snapshot]["images"] for m in family],
        logsnr=logsnr,
        weights=errors_of.pooling_weights(process, logsnr),
        loss=np.stack(list(islice(found, k))),
        to_previous=np.stack(list(islice(found, k - 1))),
        to_largest=np.stack(list(islice(found, k - 1))),
    )
    seeds = [m["train_seed"] for m in again]
    return errors, [Repeat(i, s, list(islice(found, len(p)))) for i, s, p in zip(repeated, seeds, own, strict=True)]


def _estimates(errors: LevelErrors, repeats: Sequence[Repeat], settings: Any) -> dict[str, Any]:
    """gamma at one training length, including the spread between training seeds, and checks of the hierarchy."""
    options = {"seed": settings.seed, "bootstrap": settings.bootstrap}
    found = estimate(errors, **options)
    if repeats:
        without, (variance, entry) = found["estimates"], seed_spread(errors, repeats)
        found = estimate(errors, between=variance, **options) | {"between_seeds": entry}
        for name, one in found["estimates"].items():
            one["interval_without_seeds"] = without[name]["interval"]
            one["log_error_sd_between_seeds"] = entry["log_error_sd"][name]
    falls, warnings = differences_fall(errors), hierarchy_warnings(errors)
    if falls["violations"]:
        count = f"{len(falls['violations'])} of {falls['checks']} checks"
        warnings.append(f"Squared differences between levels rise with the level in {count} (differences_fall).")
    return {**found, "differences_fall": falls, "warnings": warnings}


def summary(result: Mapping[str, Any]) -> str:
    """The estimates, the answer to gamma > 2 and the warnings of gamma.json, as lines of text."""
    lines = []
    for name, e in result["estimates"].items():
        gamma = "none" if e["gamma"] is None else f"{e['gamma']:.2f}"
        spread = "log_error_sd_between_seeds"
        seeds = f", log error between training seeds {e[spread]:.2g}" if spread in e else ""
        lines.append(f"gamma ({name}): {gamma}, 95% interval {e['interval']}{seeds}")
    lines.append(f"harder than Monte Carlo (gamma > 2): {result['htmc']}. {result['htmc_reason']}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
