"""Gains: how much a level difference at one network evaluation moves the final image.
A run that uses F_j + e_j instead of the largest level's estimates F_j ends, to first order, at X + sum_j (dX/dF_j) e_j.
Here e_j = sum_k (w_kj - 1) delta_kj, with differences delta_kj = (f^k - f^{k-1})(x_j) and weights w_kj, such as
B_kj / p_kj. One backward sweep projects the *effects* of all j and k on a random direction v, random signs over
sqrt(dimension): s_kj = <v, (dX/dF_j) delta_kj>. E s_kj^2 is the *gain* A_kj = E |(dX/dF_j) delta_kj|^2 / dimension."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.brownian import BrownianPath, stream_seed
from ..diffusion.conditions import bound
from ..diffusion.level import Level, check_family
from ..diffusion.process import TimeGrid
from ..diffusion.sampler import SingleLevel, combine, sample
from ..diffusion.step_rules import Evaluation, StepRule
from ..errors import UserError
from ..files import expect_content, read_arrays, write_arrays
from .plan import Progress


@dataclass(frozen=True)
class Effects:
    """Projected effects of all level differences along the largest level's own trajectories, and their cost."""

    names: tuple[str, ...]
    flops: np.ndarray  # [K] per evaluation of one image
    dynamics: str
    step_rule: str
    logsnr: np.ndarray  # [n]
    values: np.ndarray  # [S, P, K, n] s_kj for each seed, random direction, level k and evaluation j; f^0 = 0
    squares: np.ndarray  # [K, n] E |delta_kj|^2 / dimension
    flops_spent: float  # on measuring them

    def gains(self) -> tuple[np.ndarray, np.ndarray]:
        """The gains A_kj [K, n] and their standard errors over seeds [K, n]."""
        per_seed = (self.values.astype(np.float64) ** 2).mean(axis=1)
        return per_seed.mean(axis=0), per_seed.std(axis=0, ddof=1) / math.sqrt(len(per_seed))

    def difference(self, low: int, high: int) -> np.ndarray:
        """Projected effects [S P, n] of f^high - f^low, for 0-based levels; low = -1 stands for f^0 = 0."""
        merged = self.values[:, :, low + 1 : high + 1].sum(axis=2, dtype=np.float64)
        return merged.reshape(-1, merged.shape[-1])

    def gain(self, low: int, high: int) -> np.ndarray:
        """The gain [n] of f^high - f^low at each evaluation; levels as in `difference`."""
        return (self.difference(low, high) ** 2).mean(axis=0)

    def between(self) -> np.ndarray:
        """The gains of f^j - f^i, summed over the evaluations, at [i, j] for i < j [K, K], 0 elsewhere."""
        out = np.zeros((len(self.names),) * 2)
        for low, high in itertools.combinations(range(len(out)), 2):
            out[low, high] = self.gain(low, high).sum()
        return out

    def density(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-SNRs [m], and the squared effect of a unit squared difference there, per unit of log-SNR squared [m].
        That is sum_k A_kj / sum_k E|delta_kj|^2 / h_j^2 over the levels above the first, for evaluations j with an
        interval of width h_j: the final denoising has none. Geometric means over three neighbours make it smooth; the
        ends stay, since multistep rules weight them differently. Ones if the levels never differ."""
        gains, squares = (values[1:].sum(axis=0)[:-1] for values in (self.gains()[0], self.squares))
        widths = np.diff(self.logsnr)
        inside = (widths > 0) & (gains > 0) & (squares > 0)
        if not inside.any():
            return self.logsnr[:1], np.ones(1)
        logs = np.log(gains[inside] / squares[inside] / widths[inside] ** 2)
        logs[1:-1] = (logs[:-2] + logs[1:-1] + logs[2:]) / 3
        return self.logsnr[:-1][inside], np.exp(logs)

    def on(self, logsnr: np.ndarray) -> Effects:
        """These effects on another grid with the same ends; both grids need one evaluation per interval.
        The effect per unit of length (`_lengths`) is interpolated; that of the final denoising does not change."""
        if len(logsnr) == len(self.logsnr) and np.allclose(logsnr, self.logsnr):
            return self
        if np.any(np.diff(self.logsnr) <= 0) or np.any(np.diff(logsnr) <= 0):
            raise UserError("Gains carry over to other grids only for step rules with one evaluation per interval.")
        if min(len(logsnr), len(self.logsnr)) < 5:
            raise UserError("Gains carry over only between grids of at least 5 noise levels.")
        density = self.values[..., :-1] / _lengths(self.logsnr)
        # multistep rules weight the first and the last step differently: copy these two, interpolate the others
        left, weight = _interpolation(self.logsnr[1:-2], logsnr[1:-2])
        inner = density[..., left + 1] * (1 - weight) + density[..., left + 2] * weight
        density = np.concatenate([density[..., :1], inner, density[..., -1:]], axis=-1)
        values = np.concatenate([density * _lengths(logsnr), self.values[..., -1:]], axis=-1).astype(np.float32)
        left, weight = _interpolation(self.logsnr, logsnr)
        squares = self.squares[:, left] * (1 - weight) + self.squares[:, left + 1] * weight
        return replace(self, logsnr=logsnr, values=values, squares=squares)

    def save(self, path: Path) -> None:
        facts = json.dumps({name: getattr(self, name) for name in ("names", "dynamics", "step_rule", "flops_spent")})
        arrays = {"flops": self.flops, "logsnr": self.logsnr, "values": self.values, "squares": self.squares}
        write_arrays(path, {"facts": facts, **arrays})

    @staticmethod
    def load(path: Path) -> Effects:
        """The effects in a file of `save`; Damaged if it cannot be read."""
        arrays: dict[str, Any] = read_arrays(path, "measure the gains again")
        with expect_content(path, "measure the gains again"):
            facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
            return Effects(**facts | {"names": tuple(facts["names"])}, **arrays)


def _lengths(logsnr: np.ndarray) -> np.ndarray:
    """The lengths of the intervals [n - 1] in log-SNR; below -9, where an estimate enters with alpha, a unit counts
    as e^((logsnr + 9) / 2), so that the first interval of a flow, from nearly minus infinity, has a length, too."""
    low = np.minimum(logsnr + 9, 0.0)
    return np.diff(np.maximum(logsnr, -9) + 2 * np.expm1(0.5 * low))


def firing_costs(costs: np.ndarray) -> np.ndarray:
    """The cost [K, K] of one firing of f^j - f^i at [i, j], i < j, from the levels' [K]; the first runs anyway."""
    return costs + np.concatenate([[0], costs[1:]])[:, None]


def best_chain(values: np.ndarray, costs: np.ndarray) -> tuple[list[int], float]:
    """The chain of levels, from the cheapest to the largest, with the smallest sum of sqrt(V c) over its steps.
    values: V [K, K] of f^j - f^i at [i, j], squared differences or their gains; costs [K] of the levels. With the best
    constant p, the square of the sum is variance times cost of all random differences; also returned: its ratio to that
    of all levels."""
    roots = np.sqrt(values * firing_costs(costs))
    best = [(0.0, [0])]  # the shortest path to each level
    for j in range(1, len(roots)):
        best.append(min((length + float(roots[i, j]), [*chain, j]) for i, (length, chain) in enumerate(best)))
    shortest, chain = best[-1]
    return chain, (shortest / max(float(np.diag(roots, 1).sum()), 1e-300)) ** 2


def _interpolation(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left neighbours, and weights of the right neighbours, for linear interpolation; constant beyond the ends."""
    left = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    return left, np.clip((wanted - known[left]) / (known[left + 1] - known[left]), 0.0, 1.0)


def measure_effects(
    family: Sequence[Level], rule: StepRule, grid: TimeGrid, path: BrownianPath,
    probes: int = 2, batch: int = 64, progress: Progress = lambda done, total: None,
) -> Effects:  # fmt: skip
    """Measure the effects of a family on a grid: one forward run and one backward sweep per batch of the path's seeds.
    probes: random directions per seed. Memory: one image per evaluation and sample of a batch. Cost per seed and
    evaluation: each level once, the largest two more times, and `probes` backward passes of it, which count as one
    evaluation each. Raises UserError if the largest level cannot be differentiated."""
    check_family(family)
    program, values = rule.program(grid), []
    squares = np.zeros((len(family), len(program)))
    points: list[Tensor] = []  # [n] states [B, ...] of one batch at which the largest level is evaluated

    for start in range(0, len(path.seeds), batch):
        part = path.part(start, start + batch)
        levels = bound(family, part.conditions)
        points.clear()
        sample(SingleLevel(_visiting(levels[-1], points)), rule, grid, part)
        value, square = _sweep(levels, program, points, part.seeds, probes)
        values.append(value)
        squares += square * len(part.seeds) / len(path.seeds)
        progress(start + len(part.seeds), len(path.seeds))
    flops = np.array([level.flops for level in family], dtype=np.float64)
    spent = len(path.seeds) * sweep_flops(family, len(program), probes)
    names, logsnr = tuple(level.name for level in family), np.array([e.logsnr for e in program])
    return Effects(names, flops, rule.dynamics, rule.name, logsnr, np.concatenate(values), squares, spent)


def sweep_flops(family: Sequence[Level], evaluations: int, probes: int = 2) -> float:
    """FLOPs per seed of `measure_effects`."""
    return evaluations * float(sum(level.flops for level in family) + (2 + probes) * family[-1].flops)


def _visiting(level: Level, points: list[Tensor]) -> Level:
    """The level, which notes each x at which it is evaluated."""

    def visit(x: Tensor, logsnr: Tensor) -> Tensor:
        points.append(x)
        return level.denoise(x, logsnr)

    return replace(level, denoise=visit, base=None)


def _sweep(
    family: Sequence[Level], program: Sequence[Evaluation], points: Sequence[Tensor], seeds: Sequence[int], probes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Projected effects [B, P, K, n] and mean squares of the differences [K, n], by one backward sweep."""
    n, m = len(program), len(program[0].update)
    values = np.zeros((len(points[0]), probes, len(family), n), dtype=np.float32)
    squares = np.zeros((len(family), n))
    adjoint: list[Tensor | None] = [_directions(seeds, probes, points[0])] + [None] * (m - 1)
    for j in reversed(range(n)):
        update, x = program[j].update, points[j].detach().requires_grad_(True)
        noise_level = torch.full((), program[j].logsnr, dtype=torch.float32, device=x.device)
        of_estimate = combine(update[:, m], adjoint)
        before = [combine(update[:, i], adjoint) for i in range(m)]
        if of_estimate is not None:
            with torch.enable_grad():
                top = family[-1].denoise(x, noise_level)
            if not top.requires_grad:
                raise UserError(f"{family[-1].name} has no derivative with respect to x (does it run under no_grad?).")
            values[..., j], squares[:, j] = _projections(family, points[j], noise_level, top.detach(), of_estimate)
            back = torch.stack([torch.autograd.grad(top, x, v, retain_graph=True)[0] for v in of_estimate])
            before[0] = back if before[0] is None else before[0] + back
        adjoint = before
    return values, squares


@torch.no_grad()
def _projections(
    family: Sequence[Level], x: Tensor, noise_level: Tensor, top: Tensor, of_estimate: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Projections [B, P, K] of the level differences at x on the estimate's adjoints [P, B, ...]; mean squares [K]."""
    outputs = torch.stack([level.denoise(x, noise_level).flatten(1) for level in family[:-1]] + [top.flatten(1)])
    differences = torch.diff(outputs, dim=0, prepend=torch.zeros_like(outputs[:1]))
    projected = torch.einsum("pbd,kbd->bpk", of_estimate.flatten(2), differences)
    return projected.cpu().numpy(), (differences.double() ** 2).mean(dim=(1, 2)).cpu().numpy()


def _directions(seeds: Sequence[int], probes: int, like: Tensor) -> Tensor:
    """Random directions [P, B, ...], keyed by seed: signs divided by sqrt(dimension)."""
    dim = like[0].numel()
    rows = [np.random.default_rng(stream_seed(seed, 977)).integers(0, 2, (probes, dim)) for seed in seeds]
    signs = torch.as_tensor(np.stack(rows, axis=1) * 2.0 - 1.0, dtype=like.dtype, device=like.device)
    return (signs / math.sqrt(dim)).reshape(probes, len(seeds), *like.shape[1:])
