"""Seconds per image of the parts of a sampler, each timed apart and repeatedly on an otherwise idle machine.
The seconds of a sampler setting are the sum of (how often each part occurs) times (the seconds of that part). So all
settings are timed under the same conditions, and the spread of each timing enters the bounds of speed-ups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..diffusion.brownian import BrownianPath, now
from ..diffusion.conditions import bound
from ..diffusion.level import Level, base_of, runs_base, with_base
from ..diffusion.process import TimeGrid
from ..diffusion.sampler import Estimator, SingleLevel, sample
from ..diffusion.step_rules import StepRule, step_rule
from ..errors import UserError
from .estimators import Multilevel
from .plan import Progress

Work = Mapping[str, float]  # how often each part occurs per image
Call = Callable[[], object]
SPREAD = 0.01  # the least spread of a timing: none is more exact
CALL = "call"  # the part for each network call beyond the first in an estimate
START, NOISE, COINS = "start", "noise", "coins"  # parts that random numbers take


@dataclass(frozen=True)
class Timing:
    """parts: {name: (median seconds per image and occurrence, standard deviation of its logarithm over repetitions)}.
    A level's part has its name; other parts are the sampler's own work, see `measure_timing`."""

    parts: Mapping[str, tuple[float, float]]

    def seconds(self, work: Work) -> float:
        """Seconds per image."""
        return sum(count * self.parts[name][0] for name, count in work.items())

    def draws(self, works: list[Work], replicates: int, seed: int) -> np.ndarray:
        """Seconds per image [S, 1 + R] of S settings: by the medians, then by R random draws shared by all settings."""
        names = list(self.parts)
        median, spread = np.array([self.parts[name] for name in names]).T
        normal = np.random.default_rng(seed).standard_normal((len(names), replicates))
        normal = np.concatenate([np.zeros((len(names), 1)), normal], axis=1)
        if unknown := {name for work in works for name in work} - set(names):
            raise UserError(f"The timing lacks {', '.join(sorted(unknown))}: run the stage again with ARGS=force=true.")
        counts = np.array([[work.get(name, 0.0) for name in names] for work in works]).reshape(len(works), len(names))
        return counts @ (median[:, None] * np.exp(spread[:, None] * normal))


def few(batch: int) -> int:
    """The smaller number of images on which levels are timed."""
    return max(1, batch // 8)


def work_of(
    weights: Sequence[np.ndarray], levels: Sequence[Level], rule: StepRule, batch: int, logsnr: Sequence[float]
) -> dict[str, float]:
    """How often each part occurs per image in batches with these weights [n, B, K] of the levels, at log-SNRs [n]. A
    base that they share runs once on all samples in every estimate; a guide does so where there is guidance.

    batch: that of the timing. The time of a call on r images is taken as affine in r from `few` to `batch` images, and
    as constant below: so it counts as some images of a full batch, under the level's name, and some of `few`."""
    small, images, base = few(batch), sum(table.shape[1] for table in weights), base_of(levels)
    names = [level.name for level in levels if base is None or level.name != base.name]
    own = [k for k, level in enumerate(levels) if level.name in names]
    names += [] if base is None else [base.name]
    out, further = dict.fromkeys([part for name in names for part in (name, f"few {name}")], 0.0), 0
    runs = np.array([runs_base(levels, value) for value in logsnr])
    for table in weights:
        rows = np.count_nonzero(table[:, :, own], axis=1)  # [n, K]
        if base is not None:
            rows = np.concatenate([rows, table.shape[1] * runs[:, None]], axis=1)
        full = np.clip((rows - small) / max(batch - small, 1), 0.0, None)
        least = np.where(rows > 0, 1.0 - full, 0.0)
        for k, name in enumerate(names):
            out[name] += float(full[:, k].sum()) * batch / images
            out[f"few {name}"] += float(least[:, k].sum()) * small / images
        further += int(np.count_nonzero(rows)) - len(rows)
    step = {f"step {rule.key}": float(len(weights[0])), CALL: further / images}
    return {part: count for part, count in (out | step).items() if count}


def random_work(estimator: Estimator, rule: StepRule, grid: TimeGrid, path: BrownianPath) -> dict[str, float]:
    """The parts that random numbers take per image: the starting point, the increments of the grid, the coins."""
    drawn = path.numbers(grid, rule.clock) if rule.clock else 0
    coins = len(estimator.levels) - 1 if isinstance(estimator, Multilevel) else 0
    return {START: 1.0, NOISE: float(drawn), COINS: float(coins)}


class _Halves(Estimator):
    """Two levels, of which the second runs on every other sample."""

    def __init__(self, first: Level, second: Level):
        self.levels = [first, second]

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        table = np.stack([np.ones(len(seeds)), np.arange(len(seeds)) % 2], axis=1)
        return np.broadcast_to(table, (evaluations, *table.shape))


@torch.no_grad()
def measure_timing(
    levels: Sequence[Level], rules: Sequence[StepRule], grid: TimeGrid,
    path_of: Callable[[Sequence[int]], BrownianPath], batch: int, *, rounds: int = 7, at_least: float = 0.1,
    progress: Progress = lambda done, total: None,
) -> Timing:  # fmt: skip
    """The timing of batches of samples with paths path_of(seeds), by torch's present number of threads.
    The parts, in seconds per image: "<level>", one evaluation in a full batch (beyond a shared base, which is one of
    the levels); "few <level>", in a batch of `few`, since coins select some images; "step <rule>", one evaluation of
    the rule's program on `grid` with a network that costs nothing, without noise; "start", a starting point; "noise", a
    random number per pixel of the increments; "coins", the coins of one level. "call": seconds per batch of the
    sampler's own work for each network call beyond the first in an estimate. at_least: seconds a part and round."""
    levels = with_base(levels)
    free = [Level(f"free{k}", lambda x, logsnr: x, k + 1.0) for k in range(2)]
    path, ready, few_paths = path_of(range(batch)), path_of(range(batch)), path_of(range(few(batch)))
    start, device = path.initial(), path.device
    ready.initial, ready.increment = lambda: start, lambda grid, clock, step: start  # draws nothing
    tossed = Multilevel(free, np.array([1.0, 0.5]))

    def run(estimator: Estimator, rule: StepRule) -> Callable[[], object]:
        return lambda: sample(estimator, rule, grid, ready)

    plain = step_rule("ode/ddim")
    programs = {f"step {rule.key}": len(rule.program(grid)) for rule in rules}
    calls = _evaluations(levels, path)
    calls |= {f"few {name}": call for name, call in _evaluations(levels, few_paths).items()}
    calls |= {f"step {rule.key}": run(SingleLevel(free[0]), rule) for rule in rules}
    calls |= {START: path.initial, NOISE: lambda: path.increments(grid, "snr")}
    calls |= {COINS: lambda: tossed.weights(len(grid.index), range(batch))}
    calls |= {"plain": run(SingleLevel(free[0]), plain), CALL: run(_Halves(*free), plain)}
    found = _rounds(calls, device, rounds, at_least, progress)
    alone = found.pop("plain")
    found[CALL] = np.maximum(found[CALL] - alone, SPREAD * alone) / len(plain.program(grid))  # never negative
    images = dict.fromkeys(found, batch) | {f"few {level.name}": few(batch) for level in levels} | {CALL: 1}
    images |= {name: batch * count for name, count in programs.items()} | {NOISE: batch * path.numbers(grid, "snr")}
    return summarised({name: values / images[name] for name, values in found.items()})


def seconds_per_image(family: Sequence[Level], path: BrownianPath) -> list[float]:
    """A quick look: seconds per image of one evaluation of each level on these samples."""
    found = _rounds(_evaluations(family, path), path.device, rounds=3, at_least=0.0)
    return [float(np.median(values)) / len(path.seeds) for values in found.values()]


def _evaluations(levels: Sequence[Level], path: BrownianPath) -> dict[str, Call]:
    x = torch.randn(len(path.seeds), *path.shape, generator=torch.Generator().manual_seed(0)).to(path.device)
    logsnr, levels = torch.zeros((), device=path.device), bound(levels, path.conditions)
    base = base_of(levels)
    known = () if base is None else (base.denoise(x, logsnr),)
    given = {level.name: (x, logsnr, *(known if level.base else ())) for level in levels}
    return {level.name: lambda level=level: level.denoise(*given[level.name]) for level in levels}


@torch.no_grad()
def _rounds(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, at_least: float,
    progress: Progress = lambda done, total: None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The median seconds [rounds] of each call in each round after a first; in turns, so a load slows all alike."""
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for k, (name, call) in enumerate(calls.items()):
            times: list[float] = []
            while not times or sum(times) < (at_least if turn else 0.0):
                began = now(device)
                call()
                times.append(now(device) - began)
            medians[name].append(float(np.median(times)))
            progress(turn * len(calls) + k + 1, (rounds + 1) * len(calls))
    return {name: np.array(values[1:]) for name, values in medians.items()}


def summarised(rounds: Mapping[str, np.ndarray]) -> Timing:
    """The timing of parts with these seconds [rounds] in each round.
    What slows all parts alike in a round cancels in every speed-up, so each round is first divided by its common
    factor: the median over parts of their ratios to their own medians. A spread is at least SPREAD."""
    logs = np.log(np.stack(list(rounds.values())))  # [parts, rounds]
    logs = logs - np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
    spreads = logs.std(axis=1, ddof=1) if logs.shape[1] > 1 else np.zeros(len(logs))
    parts = zip(np.exp(np.median(logs, axis=1)).tolist(), np.maximum(SPREAD, spreads).tolist(), strict=True)
    return Timing(dict(zip(rounds, parts, strict=True)))
