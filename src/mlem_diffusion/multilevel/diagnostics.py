"""Diagnostics of a family before it is used: statistics per level, the telescope check, and findings.

Multilevel Monte Carlo codes (Giles 2015, section 3) first report the mean, variance and kurtosis of each level
difference, its cost, and a consistency check. In a diffusion model the differences depend on the state and the noise
level, so they are measured along the largest level's own trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..diffusion.brownian import initial_noise
from ..diffusion.level import Level, check_family
from ..diffusion.process import Process
from ..diffusion.step_rules import step_rule_of
from ..errors import UserError
from .estimators import Multilevel
from .findings import best_chain, judge
from .level_checks import Finding, Telescope, check_contract, check_telescope, telescope_finding
from .level_statistics import LevelStatistics, Progress, kurtosis, measure, standard_error


@dataclass(frozen=True)
class Diagnostics:
    """Result of `diagnose`; statistics and telescope are None if a level violates the contract."""

    names: list[str]
    flops: list[float]  # per evaluation of one image
    dynamics: str
    step_rule: str
    samples: int
    findings: list[Finding]
    statistics: LevelStatistics | None = None
    telescope: Telescope | None = None
    firings: list[float] | None = None  # [K] expected firings per image of one sampling run, for the given p
    evaluations: list[float] | None = None  # [K] expected evaluations per image of one sampling run, for the given p
    flops_spent: float = 0.0  # by the measurement of all samples, without the checks

    @property
    def failed(self) -> bool:
        """Whether any finding is an error; samples of such a family are meaningless."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def best_levels(self) -> list[str] | None:
        """The levels of findings.best_chain, the first and the largest included; None without finite statistics."""
        if self.statistics is None or not np.isfinite(self.statistics.pairs).all():
            return None
        return [self.names[k] for k in best_chain(self.statistics)[0]]

    def to_json(self) -> dict[str, Any]:
        """The diagnostics as JSON values without NaN; arrays have axes (levels, noise levels).

        Lists start at the cheapest level, whose difference is its own output. pair_mean_square [i][j] is E|f^j - f^i|^2
        for i < j, else 0."""
        out: dict[str, Any] = {
            "levels": self.names,
            "flops": self.flops,
            "dynamics": self.dynamics,
            "step_rule": self.step_rule,
            "samples": self.samples,
            "findings": [asdict(finding) for finding in self.findings],
            "telescope": None if self.telescope is None else asdict(self.telescope) | {"holds": self.telescope.holds},
            "firings": self.firings,
            "evaluations": self.evaluations,
            "flops_spent": self.flops_spent,
        }
        if self.statistics is not None:
            s = self.statistics
            out |= {
                "logsnr": s.logsnr,
                "weights": s.weights,
                "per_noise_level": {
                    "mean": s.signed.mean(1),
                    "mean_se": standard_error(s.signed),
                    "mean_square": s.mean_square,
                    "mean_square_se": standard_error(s.square),
                    "variance": s.spread,
                    "kurtosis": kurtosis(s.square),
                    "pair_mean_square": s.pairs[1:].mean(2),
                    "largest_variance": s.top_spread,
                },
                "pooled": pooled(s),
                "best_levels": self.best_levels,
            }
        return _plain(out)


def pooled(s: LevelStatistics) -> dict[str, np.ndarray]:
    """Statistics per level [K], pooled over noise levels with s.weights; standard errors are over samples."""
    signed = s.signed @ s.weights
    return {
        "mean": signed.mean(1),
        "mean_se": standard_error(signed),
        "mean_square": s.pooled.mean(1),
        "mean_square_se": standard_error(s.pooled),
        "variance": s.spread @ s.weights,
        "kurtosis": kurtosis(s.pooled),
        "firing_cost": s.firing_costs,
        "variance_cost": s.pooled.mean(1) * s.firing_costs,
        "pair_mean_square": s.pairs[1:].mean(2) @ s.weights,
        "seconds": s.seconds,
    }


def diagnose(
    family: Sequence[Level],
    process: Process,
    dynamics: str,
    step_rule: str,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    steps: int = 24,
    batch: int = 64,
    p: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Diagnostics:
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.

    steps: number of visited noise levels. p: [K], or [n, K] over the n evaluations of a sampling run (for [K], n is
    that of `steps`); adds the expected firings and evaluations per image. progress: called with (images done, all
    images), counted over noise levels. Cost: len(seeds) * steps evaluations of every level, and 64 to 256 of each for
    the checks.

    A violated contract, a wrong telescope or a poor hierarchy is a finding, not an exception. Raises UserError for
    fewer than two levels, levels not ordered by cost, fewer than two seeds, and probabilities that do not fit.
    """
    check_family(family)
    if len(family) < 2 or len(seeds) < 2:
        raise UserError("Diagnostics need at least two levels and two seeds.")
    base: dict[str, Any] = {
        "names": [level.name for level in family],
        "flops": [float(level.flops) for level in family],
        "dynamics": dynamics,
        "step_rule": step_rule,
        "samples": len(seeds),
    }
    evaluations = len(step_rule_of(dynamics, step_rule).program(process.grid(steps)))
    if p is not None:
        table = np.asarray(p, dtype=np.float64)
        n = len(table) if table.ndim == 2 else evaluations
        expected = Multilevel(tuple(family), table).expected_evaluations(n)
        base["firings"] = np.broadcast_to(table, (n, len(family))).sum(0).tolist()
        base["evaluations"] = expected.tolist()
    x = initial_noise(list(seeds)[: min(8, batch)], shape, torch.device(device))
    # states in the middle of the path are nearly standard normal too, so one set of states serves all checks
    middle = float(process.logsnr_at(np.array(0.5)))
    broken = check_contract(family, x, process.logsnr_min) or check_contract(family, x, middle)
    if any(finding.severity == "error" for finding in broken):
        return Diagnostics(**base, findings=broken)
    telescope = check_telescope(family, x, middle, batch=batch)
    statistics, ledger = measure(family, process, dynamics, step_rule, seeds, shape, device, steps, batch, progress)
    spent = float(np.dot(ledger.evaluations, ledger.flops))
    checked = telescope_finding(telescope)
    found = [*broken, *judge(statistics)]
    found = [*found, checked] if checked.severity == "ok" else [checked, *found]
    return Diagnostics(**base, findings=found, statistics=statistics, telescope=telescope, flops_spent=spent)


def _plain(value: Any) -> Any:
    """Convert arrays to lists, numbers to Python numbers, and values that are not finite to None."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


# ------------------------------------------------------------------------------------------------------- table

_COLUMNS = ("level", "MFLOP", "ms", "mean", "(s.e.)", "mean sq", "(s.e.)", "variance", "kurt", "V c", "fires", "runs")


def table(d: Diagnostics, noise_levels: int = 12) -> str:
    """The diagnostics as text: statistics per level, mean squares at up to `noise_levels` noise levels, findings."""
    lines = [f"Levels along {d.samples} trajectories of {d.names[-1]} ({d.dynamics}, {d.step_rule}), images in [-1, 1]"]
    if d.statistics is not None:
        lines += ["", *_grid(_COLUMNS, _level_rows(d, d.statistics))]
        lines += [
            "Rows: the level minus the level above it in the table (first row: its own output), "
            "pooled over noise levels with weights alpha^2 d(logsnr).",
            "mean sq: V; variance: over samples; kurt: 3 if all differences have the same size; "
            "V c: V times the GFLOP of one firing; per image: ms, fires, runs.",
            "",
            *_grid(("log-SNR", *d.names, "kurt", f"var {d.names[-1]}"), _noise_rows(d.statistics, noise_levels)),
            "Mean square difference to the level before, per noise level; kurt: largest kurtosis of the differences;",
            "last column: variance over samples of the largest level's output.",
        ]
    lines += ["", *(f"{finding.severity:<8}{finding.text}" for finding in d.findings)]
    return "\n".join(lines)


def _level_rows(d: Diagnostics, s: LevelStatistics) -> list[list[str]]:
    of = pooled(s)
    rows = []
    for k, name in enumerate(d.names):
        numbers = [f"{of[key][k]:.2e}" for key in ("mean", "mean_se", "mean_square", "mean_square_se", "variance")]
        tail = [f"{of['kurtosis'][k]:.1f}", f"{of['variance_cost'][k] / 1e9:.2e}" if k else "-"]
        counts = [f"{v[k]:.2f}" if v is not None else "-" for v in (d.firings, d.evaluations)]
        rows.append([name, f"{d.flops[k] / 1e6:.4g}", f"{1e3 * s.seconds[k]:.3g}", *numbers, *tail, *counts])
    return rows


def _noise_rows(s: LevelStatistics, most: int) -> list[list[str]]:
    which = np.unique(np.round(np.linspace(0, len(s.logsnr) - 1, most)).astype(int))
    tails = kurtosis(s.square)[1:].max(0)
    return [
        [f"{s.logsnr[j]:.2f}", *(f"{v:.2e}" for v in s.mean_square[:, j]), f"{tails[j]:.1f}", f"{s.top_spread[j]:.2e}"]
        for j in which
    ]


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
