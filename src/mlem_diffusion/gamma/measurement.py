"""The content of gamma.json: errors and estimates of a trained family at all its training lengths."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain, combinations
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.level import Level
from ..diffusion.process import Process
from ..errors import UserError
from ..models.family import identity_of
from ..multilevel.level_checks import differences_fall
from .denoising_errors import family_pairs, noise_levels, squared_differences
from .estimate import LevelErrors, estimate, interval_text, standard_errors
from .training_seeds import Repeat, repeat_pairs, seed_spread

POOLING = "mean squared error of the drift in log-SNR: weights alpha^2 d(logsnr) over the sampler's range"
Metadata = Sequence[Mapping[str, Any]]
Load = Callable[[Mapping[str, Any], int], Level]
Bar = Callable[[str, int, str], AbstractContextManager[Any]]


def measure(
    family: Metadata, again: Metadata, load: Load, held_out: Tensor, process: Process, settings: Any, bar: Bar
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
        levels = [load(m, i - count) for m in [*family, *again]]
        images = [m["snapshots"][i - count]["images"] for m in family]
        with bar(f"training length {i + 1}", settings.noise_levels, "noise level") as progress:
            errors, repeats = level_errors(family, again, levels, images, held_out, process, settings, progress)
        losses.append(errors.loss @ errors.weights)
        fraction = round(images[0] / family[0]["images"], 3)
        lengths.append({"fraction": fraction, "images": images, **_estimates(errors, repeats, settings)})
    result = {k: v for k, v in lengths[-1].items() if k not in ("fraction", "images")}
    overfitting = overfitting_warnings([m["name"] for m in family], [e["images"] for e in lengths], losses)
    return result | {
        "warnings": [*result["warnings"], *overfitting],
        "pooling": POOLING,
        "weights_used": "EMA",
        "made_with": identity_of(family),
        "held_out_images": len(held_out),
        "training_lengths": [{k: v for k, v in e.items() if k != "per_noise_level"} for e in lengths],
    }


def level_errors(
    family: Metadata,
    again: Metadata,
    levels: Sequence[Level],
    images: list[int],
    held_out: Tensor,
    process: Process,
    settings: Any,
    progress: Callable[[int, int], object],
) -> tuple[LevelErrors, list[Repeat]]:
    """Errors of the family's levels and of those trained again, which follow them; images: seen in training."""
    k, widths = len(family), [m["width"] for m in family]
    repeated = [widths.index(m["width"]) for m in again]
    own = repeat_pairs(k, repeated)
    pairs = [*family_pairs(k), *chain(*own)]
    logsnr = noise_levels(process, settings.noise_levels)
    found = squared_differences(levels, pairs, held_out, logsnr, settings.seed, settings.batch, progress)
    loss, to_previous, to_largest, rest = np.split(found, [k, 2 * k - 1, 3 * k - 2])
    flops = np.array([m["flops"] for m in family], dtype=np.float64)
    weights, names = process.drift_weights(logsnr), [m["name"] for m in family]
    errors = LevelErrors(widths, names, flops, images, logsnr, weights, loss, to_previous, to_largest)
    values = np.split(rest, np.cumsum([len(group) for group in own]))
    seeds = [m["train_seed"] for m in again]
    return errors, [(k, seed, list(group)) for k, seed, group in zip(repeated, seeds, values, strict=False)]


def _estimates(errors: LevelErrors, repeats: Sequence[Repeat], settings: Any) -> dict[str, Any]:
    """gamma at one training length, including the spread between training seeds, and checks of the hierarchy."""
    found = estimate(errors, settings.seed, settings.bootstrap)
    if repeats:
        without, (variance, entry) = found["estimates"], seed_spread(errors, repeats)
        found = estimate(errors, settings.seed, settings.bootstrap, variance) | {"between_seeds": entry}
        for name, one in found["estimates"].items():
            one["interval_without_seeds"] = without[name]["interval"]
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
        lines.append(f"gamma ({name}): {gamma}, 95% interval {interval_text(e['interval'])}")
    lines.append(f"harder than Monte Carlo (gamma > 2): {result['htmc']}. {result['htmc_reason']}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])


def hierarchy_warnings(errors: LevelErrors) -> list[str]:
    """Sentences about neighbouring levels that do not get better or closer as assumed, beyond two standard errors over
    the same images: the loss falls; E|f^k - f^(k-1)|^2 per unit of log FLOPs falls from one pair to the next (a power
    law is convex in log FLOPs); and it is at most twice the drop in loss (nested levels: equal to it)."""
    found, names = [], errors.names
    per_log = errors.to_previous / np.log(errors.flops[1:] / errors.flops[:-1])[:, None, None]
    for k in range(1, len(names)):
        low, high = names[k - 1], names[k]
        drop = errors.loss[k - 1] - errors.loss[k]
        if where := _where(errors, drop, positive=False):
            worse = _where(errors, -drop, positive=True)
            text = f"{high} is not measurably better than {low} in loss {where}"
            found.append(f"{text}, and worse {worse}." if worse else f"{text}.")
        if k >= 2 and (where := _where(errors, per_log[k - 2] - per_log[k - 1], positive=False)):
            found.append(f"{low} to {high} is not a smaller step than {names[k - 2]} to {low} {where}.")
        if where := _where(errors, errors.to_previous[k - 1] - 2 * drop, positive=True):
            found.append(f"{low} and {high} differ by more than twice the drop in loss {where}: they are not nested.")
    return found


def _where(errors: LevelErrors, values: np.ndarray, *, positive: bool) -> str:
    """The noise levels where the mean over images of values [M, S] is (not) above two standard errors, as text."""

    def hit(x: np.ndarray) -> np.ndarray:
        return (x.mean(0) > 2 * standard_errors(x.T)) == positive

    places = [f"{value:.1f}" for value in errors.logsnr[hit(values)]]
    parts = ["pooled"] if hit(values @ errors.weights) else []
    if places:
        parts.append(f"at log-SNR {', '.join(places)} ({len(places)} of {len(errors.logsnr)} noise levels)")
    return " and ".join(parts)


def overfitting_warnings(
    names: Sequence[str], images: Sequence[Sequence[int]], losses: Sequence[np.ndarray]
) -> list[str]:
    """Sentences about levels whose held-out loss rises from one training length to a later one, by more than two
    standard errors over the same images; the largest rise of each. images [lengths][K]; losses [lengths][K, M]."""
    found = []
    for k, name in enumerate(names):
        rises = []
        for i, j in combinations(range(len(losses)), 2):
            rise = losses[j][k] - losses[i][k]
            mean, se = float(rise.mean()), float(standard_errors(rise))
            if mean > 2 * se:
                rises.append((mean, se, images[j][k], images[i][k]))
        if rises:
            mean, se, later, earlier = max(rises)
            text = f"{later:,} images is above that after {earlier:,} by {mean:.3g} (s.e. {se:.1g})"
            found.append(f"The held-out loss of {name} after {text}: it overfits, or its learning rate is too high.")
    return found
