"""Denoising errors of a family on held-out images, gamma from them, and the answer to gamma > 2: gamma.json."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.stats import sem
from torch import Tensor

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level
from ..diffusion.process import Process, add_noise, alpha2_weights, gain_weights, uniform_weights
from ..errors import UserError
from ..models.family import identity_of
from ..multilevel.diagnostics import differences_fall
from .estimates import LevelErrors, estimate, pooled
from .verdict import interval_text, mixed_architectures

Metadata = Sequence[Mapping[str, Any]]
Load = Callable[[Mapping[str, Any], int], Level]
Progress = Callable[[int, int], object]
Bar = Callable[[str, int, str], AbstractContextManager[Progress]]
Pair = tuple[int, int | None]  # two levels, by index; None is the clean image


def measure(
    family: Metadata, again: Metadata, load: Load, held_out: Tensor, process: Process, settings: Any, bar: Bar,
    gains: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a family, given the metadata of its levels and of levels trained `again` from other seeds.
    load(metadata, snapshot) returns a level after a part of its training (snapshot -1: at the end). held_out
    [M,3,S,S] in [-1, 1]. settings: noise_levels, batch, seed, bootstrap. bar(label, total, unit) is a context whose
    value is called with (done, total). gains: by step rule, the `density` at `logsnr` of `gain_weights`."""
    if len(family) < 3:
        raise UserError("gamma needs at least three levels (family.widths), better seven.")
    k, every, widths = len(family), [*family, *again], [m["width"] for m in family]
    groups = seed_pairs(k, [widths.index(m["width"]) for m in again])
    pairs = list(dict.fromkeys([*family_pairs(k), *(pair for _, own in groups for pair in own)]))
    logsnr = noise_levels(process, settings.noise_levels)
    weights, names, mixture = uniform_weights(logsnr), [m["name"] for m in family], mixed_architectures(family)
    flops = np.array([m["flops"] for m in family], dtype=np.float64)
    lengths, losses = [], []
    count = min(len(m["snapshots"]) for m in every)
    for i in range(-count, 0):  # counted from the end: the last snapshot of every level is its final one
        levels, images = [load(m, i) for m in every], [m["snapshots"][i]["images"] for m in family]
        with bar(f"training length {i + count + 1}", settings.noise_levels, "noise level") as progress:
            found = squared_differences(levels, pairs, held_out, logsnr, settings.seed, settings.batch, progress)
        loss, to_previous, to_largest, _ = np.split(found, [k, 2 * k - 1, 3 * k - 2])
        errors = LevelErrors(widths, names, flops, images, logsnr, weights, loss, to_previous, to_largest)
        by_seed = [(form, [found[pairs.index(p)] for p in own]) for form, own in groups]
        between = seed_variances(by_seed, weights)
        result = estimate(errors, settings.seed, settings.bootstrap, between)
        drawn = {key: result[key] for key in ("estimates", "levels", "points")}
        lengths.append({"fraction": round(images[0] / family[0]["images"], 3), "images": images, **drawn})
        losses.append(loss @ weights)
    by_gains = {}  # of the final levels
    for rule, where in (gains or {}).items():
        own = replace(errors, weights=gain_weights(logsnr, *(np.array(where[key]) for key in ("logsnr", "density"))))
        by_gains[rule] = pooled(own, settings.seed, settings.bootstrap, seed_variances(by_seed, own.weights))
    if mixture:
        for entry in [result, *by_gains.values()]:
            entry |= {"htmc": "no verdict", "htmc_reason": mixture}
        for own in (e for entry in [result, *by_gains.values(), *lengths] for e in entry["estimates"].values()):
            own["applicable"] = False
    falls, warnings = differences_fall(errors), hierarchy_warnings(errors)
    if falls["violations"]:
        count = f"{len(falls['violations'])} of {falls['checks']} checks"
        warnings.append(f"Squared differences between levels rise with the level in {count} (differences_fall).")
    warnings += overfitting_warnings(names, [e["images"] for e in lengths], losses)
    facts: dict[str, Any] = {"made_with": identity_of(family), "held_out_images": len(held_out)}
    if again:  # standard deviations of the logarithm of a root-mean-square error: half those for the squared error
        facts["between_seeds"] = {"log_error_sd": {form: float(np.sqrt(v)) / 2 for form, v in between.items()}}
    if by_gains:
        facts["weighted_by_gains"] = by_gains
    return {**result, "differences_fall": falls, "warnings": warnings, **facts, "training_lengths": lengths}


def taught_errors(levels: Sequence[Level], held_out: Tensor, process: Process, settings: Any) -> list[dict[str, Any]]:
    """Losses of levels with a teacher, and their squared distances from it, on the images and noise of `measure`.

    levels: these, and their teacher last. Pooled uniformly in log-SNR, with alpha^2 d(logsnr), and by noise level."""
    logsnr, count = noise_levels(process, settings.noise_levels), len(levels) - 1
    pairs: list[Pair] = [*((k, None) for k in range(count)), *((k, count) for k in range(count))]
    found = squared_differences(levels, pairs, held_out, logsnr, settings.seed, settings.batch).mean(axis=1)
    rows = []
    for level, loss, apart in zip(levels, found[:count], found[count:], strict=False):
        row: dict[str, Any] = {"name": level.name, "teacher": level.teacher, "gflop": level.flops / 1e9}
        for name, weights in (("", uniform_weights(logsnr)), ("_alpha2", alpha2_weights(logsnr))):
            row |= {f"loss{name}": float(loss @ weights), f"to_teacher{name}": float(apart @ weights)}
        rows.append(row | {"logsnr": logsnr.tolist(), "to_teacher_by_noise_level": apart.tolist()})
    return rows


def family_pairs(levels: int) -> list[Pair]:
    """The pairs of a family: each level with the clean image, with the level below, and with the largest level."""
    loss: list[Pair] = [(k, None) for k in range(levels)]
    return loss + [(k, k - 1) for k in range(1, levels)] + [(k, levels - 1) for k in range(levels - 1)]


def seed_pairs(levels: int, repeated: Sequence[int]) -> list[tuple[str, list[Pair]]]:
    """Values of the laws that differ by training seed: a law, and one pair per seed. repeated: the index k of each
    level trained again; these follow the family's `levels` in the list of levels."""
    groups: list[tuple[str, list[Pair]]] = []
    for k in sorted(set(repeated)):
        own = [k, *(i for i, level in enumerate(repeated, start=levels) if level == k)]
        groups += [("loss_fit", [(i, None) for i in own]), ("to_largest", [(i, levels - 1) for i in own])]
        groups.append(("differences", [(k + 1, i) for i in own]))
        if k > 0:
            groups.append(("differences", [(i, k - 1) for i in own]))
    return groups


def noise_levels(process: Process, count: int) -> np.ndarray:
    """`count` ascending log-SNRs: the midpoints of equal parts of the sampler's path, and its two ends."""
    inner = process.logsnr_at((np.arange(count - 2) + 0.5) / (count - 2))
    return np.concatenate([[process.logsnr_min], inner, [process.logsnr_max]])


@torch.no_grad()
def squared_differences(
    levels: Sequence[Level], pairs: Sequence[Pair], images: Tensor, logsnr: np.ndarray, seed: int = 0, batch: int = 128,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:  # fmt: skip
    """Per-image mean squared differences [pairs, M, S] of the levels' outputs, means over channels and pixels.
    images [M,C,H,W] in [-1, 1], log-SNRs [S]. Each level is evaluated once for all pairs, on the same noise."""
    m, s = len(images), len(logsnr)
    out = np.zeros((len(pairs), m, s))
    for j, value in enumerate(logsnr):
        level_logsnr = torch.tensor(float(value), dtype=torch.float32, device=images.device)
        for start in range(0, m, batch):
            part = slice(start, min(start + batch, m))
            x0 = images[part]
            # the noise of image i at noise level j does not depend on the batch size
            seeds = [seed * 1_000_003 + j * m + i for i in range(m)[part]]
            x = add_noise(x0, BrownianPath(seeds, tuple(x0.shape[1:]), x0.device).initial(), level_logsnr)
            outputs = [level.denoise(x, level_logsnr).float() for level in levels]
            for i, (first, second) in enumerate(pairs):
                other = x0 if second is None else outputs[second]
                out[i, part, j] = (outputs[first] - other).double().square().flatten(1).mean(1).cpu().numpy()
        progress(j + 1, s)
    return out


def seed_variances(groups: Sequence[tuple[str, Sequence[np.ndarray]]], weights: np.ndarray) -> dict[str, float]:
    """The variance of a value's logarithm between training seeds, by law; it excludes what they share (data, recipe).
    Each group holds one value of a law per seed, as squared errors [M, S], for a level that was trained again. Usually
    these are the cheapest levels, and their spread stands for that of all. Two separately trained levels enter a value
    of `differences`, so its variance is twice that of retraining one of them."""
    squares, dof = {}, {}
    for form, values in groups:
        logs = np.log([float((value @ weights).mean()) for value in values])
        squares[form] = squares.get(form, 0.0) + float(((logs - logs.mean()) ** 2).sum())
        dof[form] = dof.get(form, 0) + len(logs) - 1
    return {form: (2 if form == "differences" else 1) * squares[form] / dof[form] for form in dof}


def summary(result: Mapping[str, Any]) -> str:
    """The estimates, the answer to gamma > 2 and the warnings of gamma.json, as lines of text."""
    lines = _lines(result, "")
    for pair in result.get("nestedness", ()):
        ratio = "the loss does not drop" if pair["ratio"] is None else f"{pair['ratio']:.2f} (s.e. {pair['se']:.2f})"
        lines.append(f"squared difference / drop in loss, {' to '.join(pair['names'])}: {ratio}")
    for rule, own in result.get("weighted_by_gains", {}).items():
        lines += _lines(own, f" weighted by gains of {rule}")
    for own in result.get("taught", ()):
        text = f"{own['name']}, taught by {own['teacher']}: loss {own['loss']:.5f}"
        lines.append(f"{text}, mean squared distance from it {own['to_teacher']:.5f}")
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])


def _lines(result: Mapping[str, Any], how: str) -> list[str]:
    lines = []
    for name, e in result["estimates"].items():
        gamma = "none" if e["gamma"] is None else f"{e['gamma']:.2f}"
        note = "" if e.get("applicable", True) else ", NOT APPLICABLE"
        lines.append(f"gamma ({name}){how}: {gamma}, 95% interval {interval_text(e['interval'])}{note}")
    return [*lines, f"harder than Monte Carlo (gamma > 2){how}: {result['htmc']}. {result['htmc_reason']}"]


def hierarchy_warnings(errors: LevelErrors) -> list[str]:
    """Sentences about neighbours whose loss does not fall, or whose E|f^k - f^(k-1)|^2 is more than twice the drop in
    loss (nested levels: equal to it); pooled, beyond two standard errors over the same images."""
    found, drops = [], -np.diff(errors.loss @ errors.weights, axis=0)  # [K-1, M]
    for k, (drop, difference) in enumerate(zip(drops, errors.to_previous @ errors.weights, strict=True)):
        low, high = errors.names[k : k + 2]
        if not _is_positive(drop):
            found.append(f"{high} is not measurably better than {low} in loss.")
        if _is_positive(difference - 2 * drop):
            found.append(f"{low} and {high} differ by more than twice the drop in loss: they are not nested.")
    return found


def _is_positive(values: np.ndarray) -> bool:
    """Whether the mean of values [M] is above two standard errors."""
    return bool(values.mean() > 2 * sem(values))


def overfitting_warnings(names: Sequence[str], images: list[list[int]], losses: list[np.ndarray]) -> list[str]:
    """Sentences about levels whose held-out loss rises from one training length to a later one, by more than two
    standard errors over the same images; the largest rise of each. images [lengths][K]; losses [lengths][K, M]."""
    found = []
    for k, name in enumerate(names):
        pairs = combinations(range(len(losses)), 2)
        rises = [(losses[j][k] - losses[i][k], images[j][k], images[i][k]) for i, j in pairs]
        rises = [(rise.mean(), later, earlier) for rise, later, earlier in rises if _is_positive(rise)]
        if rises:
            mean, later, earlier = max(rises)
            text = f"{later:,} images is above that after {earlier:,} by {mean:.3g}"
            found.append(f"The held-out loss of {name} after {text}: it overfits, or its learning rate is too high.")
    return found
