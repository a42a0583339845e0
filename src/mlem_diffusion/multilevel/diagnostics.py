"""Diagnostics of a family before it is used: statistics per level, the telescope check, and findings.

Multilevel Monte Carlo codes (Giles 2015, section 3) first report the mean, variance and kurtosis of each level
difference, its cost, and a consistency check. In a diffusion model the differences depend on the state and the noise
level, so they are measured along the largest level's own trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Level, check_family
from ..diffusion.process import Process
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from .estimators import Multilevel
from .findings import best_chain, judge
from .level_checks import (
    LevelStatistics,
    check_contract,
    check_telescope,
    kurtosis,
    measure,
    rise,
    standard_error,
    telescope_finding,
)


def diagnose(
    family: Sequence[Level],
    process: Process,
    rule: StepRule,
    path: BrownianPath,
    steps: int = 24,
    batch: int = 64,
    p: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Check a family's levels and telescope, and measure their differences along the largest level's trajectories.

    steps: number of visited noise levels. p: [K], or [n, K] over the n evaluations of a sampling run (for [K], n is
    that of `steps`); adds the expected firings and evaluations per image. progress: called with (images done, all
    images), counted over noise levels. Cost: one evaluation of every level per seed and step, and 64 to 256 of each for
    the checks.

    Returns JSON values without NaN. Lists start at the cheapest level, whose difference is its own output; arrays have
    axes (levels, noise levels). pair_mean_square [i][j] is E|f^j - f^i|^2 for i < j, else 0. There are no statistics if
    a level violates the contract. A violated contract, a wrong telescope or a poor hierarchy is a finding, not an
    exception. Raises UserError for fewer than two levels, levels not ordered by cost, fewer than two seeds, and
    probabilities that do not fit.
    """
    check_family(family)
    if len(family) < 2 or len(path.seeds) < 2:
        raise UserError("Diagnostics need at least two levels and two seeds.")
    names, flops = [level.name for level in family], [float(level.flops) for level in family]
    out: dict[str, Any] = {"levels": names, "flops": flops, "dynamics": rule.dynamics, "step_rule": rule.name}
    out |= {"samples": len(path.seeds), "telescope": None, "firings": None, "evaluations": None, "flops_spent": 0.0}
    if p is not None:
        n = len(p) if np.ndim(p) == 2 else len(rule.program(process.grid(steps)))
        out["evaluations"] = Multilevel(tuple(family), p).expected_evaluations(n)
        out["firings"] = np.broadcast_to(p, (n, len(family))).sum(0)
    x = BrownianPath(path.seeds[: min(8, batch)], path.shape, path.device).initial()
    # states in the middle of the path are nearly standard normal too, so one set of states serves all checks
    middle = float(process.logsnr_at(np.array(0.5)))
    found = check_contract(family, x, process.logsnr_min) or check_contract(family, x, middle)
    if not any(f["severity"] == "error" for f in found):
        out["telescope"] = check_telescope(family, x, middle, batch=batch)
        statistics, out["flops_spent"] = measure(family, process, rule, path, steps, batch, progress)
        out |= describe(statistics)
        found, checked = [*found, *judge(statistics)], telescope_finding(out["telescope"])
        found = [*found, checked] if checked["severity"] == "ok" else [checked, *found]
    return _plain(out | {"findings": found})


def describe(s: LevelStatistics) -> dict[str, Any]:
    """Statistics per noise level and pooled over them; standard errors are over samples. best_levels: of best_chain."""
    signed, finite = s.signed @ s.weights, np.isfinite(s.pairs).all()
    per_noise_level = {
        "mean": s.signed.mean(1),
        "mean_se": standard_error(s.signed),
        "mean_square": s.mean_square,
        "mean_square_se": standard_error(s.square),
        "variance": s.spread,
        "kurtosis": kurtosis(s.square),
        "pair_mean_square": s.pairs[1:].mean(2),
        "largest_variance": s.top_spread,
    }
    pooled = {
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
    best = [s.names[k] for k in best_chain(s)[0]] if finite else None
    facts = {"logsnr": s.logsnr, "weights": s.weights, "best_levels": best}
    return facts | {"per_noise_level": per_noise_level, "pooled": pooled}


def _plain(value: Any) -> Any:
    """Convert arrays to lists, numbers to Python numbers, and values that are not finite to None."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(content: dict[str, Any]) -> str:
    """Diagnostics as text: statistics per level, pooled over noise levels, and the findings."""
    where = f"{content['samples']} trajectories of {content['levels'][-1]}"
    lines = [f"Levels along {where} ({content['dynamics']}, {content['step_rule']}), images in [-1, 1]"]
    if "pooled" in content:
        of = content["pooled"]
        columns = {"MFLOP": np.array(content["flops"]) / 1e6, "ms": 1e3 * np.array(of["seconds"])}
        columns |= {"V": of["mean_square"], "(s.e.)": of["mean_square_se"], "kurtosis": of["kurtosis"]}
        columns |= {"V c": of["variance_cost"], "fires": content["firings"], "runs": content["evaluations"]}
        frame = pd.DataFrame(columns, index=content["levels"]).astype(float)
        lines += ["", frame.to_string(float_format="{:.3g}".format), ""]
        lines += [
            "V: mean square difference to the level before; V c: times the FLOPs of one firing; fires, runs: times"
        ]
        lines += ["per image. kurtosis: 3 if all differences have the same size.", ""]
    return "\n".join([*lines, *(f"{f['severity']:<8}{f['text']}" for f in content["findings"])])


def differences_fall(errors: Any) -> dict[str, Any]:
    """Whether the differences fall from each level to the next, pooled and at each noise level; ready for JSON.

    errors: names [K], logsnr and weights [S], and the squared differences per held-out image [K-1, M, S]
    E|f^k - f^K|^2 (to_largest) and E|f^k - f^(k-1)|^2 (to_previous). "pairs", per kind: the levels whose values are
    compared (for to_previous, the upper levels of the two differences). "ratio" [pairs][S]: later value / earlier
    value, below 1 if the value falls. "violations": rises by more than two standard errors over the same held-out
    images (logsnr None: pooled).
    """
    kinds: dict[str, Any] = {}
    violations, checks = [], 0
    for kind, array, labels in (
        ("to_largest", errors.to_largest, errors.names[:-1]),
        ("to_previous", errors.to_previous, errors.names[1:]),
    ):
        pairs, ratios = [list(pair) for pair in pairwise(labels)], []
        for pair, before, after in zip(pairs, array[:-1], array[1:], strict=True):
            ratios.append((after.mean(0) / np.maximum(before.mean(0), 1e-300)).tolist())
            places = [(None, before @ errors.weights, after @ errors.weights)]
            places += [(float(u), before[:, j], after[:, j]) for j, u in enumerate(errors.logsnr)]
            for logsnr, earlier, later in places:
                checks += 1
                mean, se = rise(earlier, later)
                unit = max(float(earlier.mean()), 1e-300)
                if mean > 2 * se:
                    where = {"kind": kind, "levels": pair, "logsnr": logsnr}
                    violations.append({**where, "ratio": float(later.mean()) / unit, "ratio_se": float(se) / unit})
        kinds[kind] = {"pairs": pairs, "ratio": ratios}
    criterion = "a rise by more than two standard errors, over the same held-out images, is a violation"
    facts = {"criterion": criterion, "noise_levels": errors.logsnr.tolist(), "checks": checks}
    return {**facts, **kinds, "violations": violations}
