"""A problem with a known answer -> results/rates/: exponents of cost against error for EM, ML-EM and jump process."""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np

from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import side_by_side
from mlem_diffusion.experiment.stage import Config, Stage, bar, entry_point, run_stage
from mlem_diffusion.experiment.tracking import Tracker
from mlem_diffusion.figures.rates import plot_rates
from mlem_diffusion.files import write_json, write_text
from mlem_diffusion.rates import settings as rates
from mlem_diffusion.rates.exponents import MIN_POINTS, bars, exponent_entry, point, step_size_entry, towards_limit
from mlem_diffusion.rates.settings import RateSetting

Squared = dict[str, dict[RateSetting, np.ndarray]]  # dynamics -> setting -> squared errors of all replicates

OUTPUTS = ["rates.json", "rates.png", "rates.csv"]


def check(cfg: Config) -> None:
    r = cfg.rates
    if set(r.choose_seeds) & set(r.judge_seeds):
        raise UserError("rates.choose_seeds and rates.judge_seeds must have no seed in common.")
    if not (len(r.choose_seeds) and len(r.judge_seeds) and len(r.gammas) and len(r.dynamics)):
        raise UserError("rates needs at least one dynamics, one gamma, and one seed to choose and one to judge on.")
    if (
        not set(r.dynamics) <= {"sde", "ode"}
        or min(r.gammas) <= 0
        or r.paths < 2
        or r.levels < 12
        or r.poisson.seeds < 1
    ):
        raise UserError(
            "rates needs dynamics sde or ode, gammas above 0, at least 2 paths, 12 levels and 1 poisson.seeds."
        )
    if r.grid % 4096:
        raise UserError(f"rates.grid must be a multiple of 4096, not {r.grid}.")


def work_of(settings: Sequence[RateSetting]) -> int:
    """Rough effort of a run, in EM steps on one replicate: an event counts as five, an ML-EM step as three."""
    return sum(
        int(5 * s.rates.sum()) if s.method == "poisson" else s.steps * (1 if s.method == "em" else 3) for s in settings
    )


def simulate(stage: Stage, label: str, wanted: list[tuple[str, Sequence[int], list[RateSetting]]]) -> Squared:
    """Run (dynamics, seeds, settings) in parts on several processes; replicates are in the order of the seeds."""
    r, tasks = stage.cfg.rates, []
    for dynamics, seeds, settings in wanted:
        unique = list(dict.fromkeys(s.run for s in settings))
        parts = [[s for s in unique if s.steps > 4096], [s for s in unique if s.steps == 0]]
        parts.append([s for s in unique if 0 < s.steps <= 4096])
        tasks += [(dynamics, seed, part) for part in parts if part for seed in seeds]
    workers = min(len(tasks), os.cpu_count() or 1) if stage.cfg.workers == "auto" else int(stage.cfg.workers)
    done, found = 0, {}
    total = sum(work_of(part) for _, _, part in tasks)
    context = multiprocessing.get_context("spawn")
    with (
        bar(label, total, unit="step") as progress,
        ProcessPoolExecutor(workers, context, side_by_side.begin_worker) as pool,
    ):
        futures = {
            pool.submit(rates.measure, d, s, r.paths, r.levels, r.grid, part): (d, s, part) for d, s, part in tasks
        }
        try:
            for future in as_completed(futures):
                dynamics, seed, part = futures[future]
                for setting, squared in future.result().items():
                    found.setdefault((dynamics, setting), {})[seed] = squared
                done += work_of(part)
                progress(done, total)
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:
            side_by_side.kill_workers()
            raise
    out: Squared = {}
    for (dynamics, setting), by_seed in found.items():
        out.setdefault(dynamics, {})[setting] = np.concatenate([by_seed[seed] for seed in sorted(by_seed)])
    return out


def choose(r: Config, pilot: Sequence[RateSetting], squared: dict[RateSetting, np.ndarray]) -> tuple[dict, np.ndarray]:
    """Settings by (gamma, method), and the error model's constants, from the pilot runs."""
    mse = np.array([squared[s.run].mean() for s in pilot])
    constants = rates.calibrate(pilot, mse)
    em = [i for i, s in enumerate(pilot) if s.method == "em"]
    targets = rates.target_errors(r.targets.coarsest, r.targets.finest, r.targets.per_octave)
    chosen = {}
    for gamma in r.gammas:
        own = [replace(pilot[i], gamma=gamma) for i in em]
        chosen[gamma, "em"] = rates.cheapest(own, np.sqrt(mse[em]), targets)
        options = rates.ml_em_settings(gamma, r.grid, r.levels)
        chosen[gamma, "ml_em"] = rates.cheapest(options, rates.model_errors(options, constants), targets)
        options = rates.poisson_settings(gamma, r.levels, r.poisson.events)
        errors = rates.model_errors(options, constants)
        reached = rates.target_errors(r.poisson.coarsest, errors.min(), r.poisson.per_octave)
        chosen[gamma, "poisson"] = rates.cheapest(options, errors, reached * (1 + 1e-9))
    for (gamma, method), settings in chosen.items():
        if len(settings) < MIN_POINTS:
            raise UserError(
                f"gamma = {gamma:g}, {method}: only {len(settings)} settings to fit; "
                "widen rates.targets or rates.poisson."
            )
    return chosen, constants


def summarise(r: Config, chosen: dict, constants: dict, squared: Squared, jumps: list, curves: dict) -> dict:
    result: dict[str, Any] = {}
    for dynamics in r.dynamics:
        result[dynamics] = {}
        for gamma in r.gammas:
            result[dynamics][f"{gamma:g}"] = {
                method: exponent_entry(
                    chosen[dynamics][gamma, method], squared[dynamics], constants[dynamics], r.bootstrap, seed=0
                )
                for method in rates.METHODS
            }
    return result | {
        "step_size": {d: step_size_entry(curves, jumps, squared[d]) for d in r.dynamics},
        "bars": {d: {g: bars(e) for g, e in result[d].items() if float(g) > 2} for d in r.dynamics},
        "model": {
            d: dict(zip(("1/n^2", "4^-K", "coins", "coins_level_1"), constants[d].tolist(), strict=True))
            for d in r.dynamics
        },
        "towards_limit": {d: {f"{g:g}": towards_limit(g, constants[d]) for g in r.gammas} for d in r.dynamics},
        "reference_difference": {d: rates.reference_error(d, r.judge_seeds[0], r.paths, r.grid) for d in r.dynamics},
        "interval": "95% percentile bootstrap over replicates and points",
    }


def write_csv(path: Any, rows: list[dict[str, Any]]) -> None:
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def say(result: dict[str, Any], dynamics: Sequence[str]) -> None:
    print(
        f"{'dynamics':<9}{'gamma':<7}{'method':<9}{'exponent':>9}  {'95% interval':<17}{'predicted':>9}  "
        f"{'in this range':>13}  decades"
    )
    for d in dynamics:
        for gamma, entries in result[d].items():
            for method, e in entries.items():
                low, high = e["interval"]
                print(
                    f"{d:<9}{gamma:<7}{method:<9}{e['exponent']:>9.2f}  [{low:.2f}, {high:.2f}]{'':<3}"
                    f"{e['predicted']:>9.2f}  {e['expected_in_range']:>13.2f}  {e['decades']:.1f}"
                )
    for d in dynamics:
        for name, curve in result["step_size"][d]["curves"].items():
            print(f"{d}: {name}: error ~ steps^{curve['order']:.2f}")
        for e in result["step_size"][d]["agreement"]:
            low, high = e["interval"]
            print(
                f"{d}: jump process / ML-EM with {e['steps']} steps, {e['levels']} levels: "
                f"error ratio {e['error_ratio']:.3f} [{low:.3f}, {high:.3f}], cost ratio {e['cost_ratio']:.3f}"
            )
        for gamma, windows in result["towards_limit"][d].items():
            text = ", ".join(f"{w['exponent']:.2f} to error {w['error_range'][0]:.0e}" for w in windows)
            print(f"{d}: gamma {gamma}: ML-EM by the error model: {text}")
        for gamma, checks in result["bars"][d].items():
            missed = [name for name, fine in checks.items() if not fine and name != "met"]
            print(
                f"{d}: gamma {gamma}: rates as claimed: {'yes' if checks['met'] else 'no (' + ', '.join(missed) + ')'}"
            )


def work(stage: Stage) -> None:
    r = stage.cfg.rates
    check(stage.cfg)
    fingerprint = stage.fingerprint(("rates",))
    if stage.finished(fingerprint, OUTPUTS):
        return
    judge_seeds = sorted(r.judge_seeds)
    pilot = rates.pilot_settings(r.grid, r.levels, r.poisson.events)
    measured = simulate(stage, "choosing", [(d, r.choose_seeds, pilot) for d in r.dynamics])
    chosen, constants = {}, {}
    for d in r.dynamics:
        chosen[d], constants[d] = choose(r, pilot, measured[d])
    jumps, curves = rates.limit_settings(r.grid)
    wanted = []
    for d in r.dynamics:
        stepped = [s for (_, m), found in chosen[d].items() for s in found if m != "poisson"]
        wanted.append((d, judge_seeds, [*stepped, *jumps, *(s for c in curves.values() for s in c)]))
        events = [s for (_, m), found in chosen[d].items() for s in found if m == "poisson" and s not in jumps]
        wanted.append((d, judge_seeds[: r.poisson.seeds], events))
    squared = simulate(stage, "measuring", wanted)
    result = summarise(r, chosen, constants, squared, jumps, curves)
    rows = [point(s, squared[d], d) for d in r.dynamics for found in chosen[d].values() for s in found]
    write_json(stage.results / "rates.json", result)
    write_csv(stage.results / "rates.csv", rows)
    plot_rates(result, rows, stage.results / "rates.png")
    with Tracker(stage.results, stage.name, stage.plain(), **stage.cfg.tracking, fresh=True) as tracker:
        found = {
            f"{d}/{g}/{m}": e["exponent"] for d in r.dynamics for g, es in result[d].items() for m, e in es.items()
        }
        tracker.log({f"exponent/{name}": value for name, value in found.items()})
        tracker.image("rates", stage.results / "rates.png")
    say(result, r.dynamics)
    stage.record(fingerprint, OUTPUTS)


@entry_point("verify_rates")
def main(cfg: Config) -> None:
    cfg.name = "rates"  # the results are independent of the experiment
    run_stage("verify_rates", cfg, work)


if __name__ == "__main__":
    main()
