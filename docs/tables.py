"""Writes the tables of numbers in README.md and docs/, from the committed runs in results/."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mlem_diffusion.benchmark import report
from mlem_diffusion.comparison.settings import read_table
from mlem_diffusion.comparison.speedup import AGAINST, METHODS, UNITS

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, SPEED = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "speed.md"
PAPER, GUIDANCE = ROOT / "docs" / "paper-and-ours.md", ROOT / "docs" / "guidance.md"


def load(name: str) -> Any:
    return json.loads((ROOT / "results" / name).read_text())


def table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]])


def gamma(result: dict, name: str) -> str:
    estimate = result["estimates"][name]
    low, high = estimate["interval"]
    value = "no finite value" if estimate["gamma"] is None else f"{estimate['gamma']:.1f}"
    return f"{value} [{low:.1f}, {'unbounded' if high is None else f'{high:.1f}'}]"


def window(entry: dict) -> str:
    """The headline of an entry of speedup.json, and in parentheses its largest single point."""
    found, best = entry["window"], entry["max"]
    text = "no window" if found is None else "at least {:.2f} from {:.2g} to {:.2g}".format(
        found["lower95"], *found["rms_error"])  # fmt: skip
    return f"{text} ({best['speedup']:.2f})" if best else f"{text} (never reached)"


STEP = {"sde": "DDPM", "ode": "DDIM"}
ESTIMATES = {"loss_fit": "losses", "drops": "drops in loss", "differences": "neighbouring levels"}
ESTIMATES |= {"to_largest": "against the largest"}


def gamma_table() -> str:
    folders = ("demo", "celeba32")
    results = [load(f"{folder}/gamma.json") for folder in folders]
    rows = [("measured", *(f"`{folder}`" for folder in folders))]
    for name, words in ESTIMATES.items():
        rows.append((f"gamma, {words}", *(gamma(result, name) for result in results)))
    ratios = ([e["ratio"] for e in result["nestedness"] if e["ratio"] is not None] for result in results)
    rows.append(("squared difference over drop in loss", *(f"{min(r):.2f} to {max(r):.2f}" for r in ratios)))
    return table([*rows, ("harder than Monte Carlo", *(result["htmc"] for result in results))])


TWINS = {"demo": "demo_scalar", "celeba32": "celeba32_scalar"}  # the same family with standard preconditioning
FAMILIES = {"demo_scalar": "`demo`, standard", "demo": "`demo`, Gaussian", "celeba32_scalar": "`celeba32`, standard",
            "celeba32_data": "`celeba32`, Gaussian", "celeba32": "`celeba32`, Gaussian and taught"}  # fmt: skip


def levels_table() -> str:
    """Losses of both preconditionings, and distances from the largest level, pooled with alpha^2 d(logsnr)."""
    rows: list[tuple[str, ...]] = [
        ("level", "FLOPs over the largest's", "loss, standard", "loss, Gaussian",
         "E\\|f - f^K\\|^2, standard", "E\\|f - f^K\\|^2, Gaussian"),
    ]  # fmt: skip
    for ours, twin in TWINS.items():
        content, before = load(f"{ours}/gamma.json"), load(f"{twin}/gamma.json")["levels"]
        levels = content["levels"]
        for level, old in zip(levels, before, strict=True):
            apart = (f"{m.get('to_largest_alpha2', 0):.5f}" if m["name"] != levels[-1]["name"] else "–"
                     for m in (old, level))  # fmt: skip
            share = f"1/{levels[-1]['gflop'] / level['gflop']:.1f}"
            losses = (f"{m['loss_alpha2']:.5f}" for m in (old, level))
            rows.append((f"`{ours}` {level['name']}", share, *losses, *apart))
        for level in content.get("taught", ()):
            share = f"1/{levels[-1]['gflop'] / level['gflop']:.1f}"
            numbers = f"{level['loss_alpha2']:.5f}", f"{level['to_teacher_alpha2']:.5f}"
            rows.append((f"`{ours}` {level['name']}, taught", share, "–", numbers[0], "–", numbers[1]))
    return table(rows)


def outlook_table() -> str:
    """What coins add, and the windows that were predicted and judged, for both preconditionings."""
    rows: list[tuple[str, ...]] = [
        ("family", "S (steps)", "chain", "D / N^q", "predicted, over the largest level",
         "judged, over EM with it", "over EM with any level"),
    ]  # fmt: skip
    for folder, words in FAMILIES.items():
        found, judged = load(f"{folder}/diagnostics.json"), load(f"{folder}/speedup.json")["strict"]
        for dynamics in ("sde", "ode"):
            own, coins = found[dynamics], judged[dynamics]["coins"]
            ahead, by_steps = own["window"], own.get("S_by_steps", {"32": own["S"]})
            text = "{:.2f} from {:.2g} to {:.2g}".format(ahead["speedup"], *ahead["rms_error"]) if ahead else "–"
            cost = ", ".join(f"{s:.3g} ({steps})" for steps, s in by_steps.items())
            rows.append((f"{words}, {dynamics.upper()}", cost, " + ".join(own["chain"]),
                         f"{own['D']:.3g} / N^{own['q']:.2f}", text,
                         *(window(coins[against]["flops"]) for against in ("em_largest", "em_any"))))  # fmt: skip
    return table(rows)


def seeds_table() -> str:
    """Losses, distances, S and V of two trainings of the chain, pooled with alpha^2 d(logsnr)."""
    rows: list[tuple[str, ...]] = [
        ("training seed", "loss of t6, w24", "E\\|t6 - w24\\|^2", "SDE: S; V of t6, w24", "ODE: S; V of t6, w24"),
    ]
    for i, run in enumerate(load("telescope/training_seeds.json")):
        losses = ", ".join(f"{loss:.5f}" for loss in run["loss"].values())
        own = (f"{run[d]['S']:.4f}; {run[d]['V_t6']:.3f}, {run[d]['V_w24']:.4f}" for d in ("sde", "ode"))
        rows.append((str(i), losses, f"{run['to_teacher']:.5f}", *own))
    return table(rows)


def trials_table() -> str:
    """Losses, distances and S of the trials at 16x16; S of the best chain through the narrow level."""
    rows: list[tuple[str, ...]] = [
        ("trial", "variant", "loss, narrow", "loss, largest", "E\\|f - f^K\\|^2 of the narrow", "S, SDE", "S, ODE"),
    ]
    for name, words in (("residual", "residual levels"), ("ema", "moving average"), ("noise", "noise levels")):
        for run in load(f"telescope/{name}.json"):
            if "S" in run:
                s = (f"{run['S'][rule]['three']:.4f}" for rule in ("sde/ddpm", "ode/dpmpp_2m"))
                losses = f"{run['narrow_loss']:.5f}", f"{run['loss']:.5f}", f"{run['to_largest']:.6f}"
                rows.append((words, run["variant"], *losses, *s))
    return table(rows)


def forms_table() -> str:
    """Losses and S of each form of a network that knows the Gaussian part, by training length."""
    paths = sorted((ROOT / "results" / "preconditioning").glob("train-*.json"))
    runs = [run for path in paths for run in json.loads(path.read_text())]
    lengths = sorted({run["images"] for run in runs})
    of = {(run["size"], run["form"], run["images"]): run for run in reversed(runs)}  # the shorter training's
    rows = [("size", "form", *(f"{images:,} images" for images in lengths))]
    for size, form in dict.fromkeys((run["size"], run["form"]) for run in runs):
        found = [of.get((size, form, images)) for images in lengths]
        rows.append((f"{size}x{size}", form, *(form_cell(run) if run else "" for run in found)))
    return table(rows)


def form_cell(run: dict) -> str:
    """Losses of the two networks, and S."""
    _, small, large = run["loss"].values()
    return f"{small:.5f}, {large:.5f}; {run['S']:.3f}"


def local_table() -> str:
    """Errors of linear denoisers of windows of pixels, over that of the global one, by log-SNR."""
    runs = load("preconditioning/local.json")
    where, size = sorted({run["logsnr"] for run in runs}), max(run["size"] for run in runs)
    error = {(run["window"], run["logsnr"]): run["error"] for run in runs if run["size"] == size}
    rows = [
        ("log-SNR", *(str(u) for u in where)),
        ("global Gaussian, error", *(f"{error[None, u]:.4f}" for u in where)),
    ]
    for side in sorted({run["window"] for run in runs if run["window"]}):
        rows.append((f"{side}x{side} pixels, over it", *(f"{error[side, u] / error[None, u]:.2f}" for u in where)))
    return table(rows)


def fit_table() -> str:
    """Rank, time and memory of the fit at 64x64."""
    rows = [("images", "rank", "seconds", "more memory", "held-out loss by rank")]
    for run in load("preconditioning/fit.json"):
        losses = ", ".join(f"{rank}: {loss:.5f}" for rank, loss in run["loss_by_rank"].items())
        rows.append((f"{run['images']:,} of {run['size']}x{run['size']}", str(run["rank"]), f"{run['seconds']:.0f}",
                     f"{run['more_memory_gb']:.1f} GB", losses))  # fmt: skip
    return table(rows)


def speedup_table() -> str:
    folders = ("demo", "celeba32", "analytic")
    results = [load(f"{folder}/speedup.json")["strict"] for folder in folders]
    rows = [("speed-up", *(f"`{folder}`" for folder in folders))]
    for dynamics, method, against, unit in product(("sde", "ode"), METHODS, AGAINST, UNITS):
        label = f"{dynamics.upper()}, {METHODS[method]} over {AGAINST[against]}, {UNITS[unit]}"
        entries = [result[dynamics].get(method, {}).get(against, {}).get(unit) for result in results]
        if not any(entries):
            continue
        cells = [window(entry) if entry else "–" for entry in entries]
        if unit == "seconds":
            cells[-1] = "–"  # the levels in closed form all take about the same time
        rows.append((label, *cells))
    return table(rows)


ESTIMATORS = {
    "independent, constant p": "independent coins, constant p",
    "independent, measured p": "independent coins, p from measured differences",
    "independent, learned p": "independent coins, learned p",
    "independent, optimal p": "independent coins, optimal p",
    "nested, optimal p": "nested coins, optimal p",
    "systematic, constant p": "systematic coins, constant p",
    "systematic, optimal p": "systematic coins, optimal p",
    "quadrature": "quadrature",
}


def bounds(found: dict[str, Any]) -> str:
    """The window's lower bound, and in brackets the largest one at a point; empty if the method was not run."""
    points = [p["lower95"] for p in found.get("curve", []) if p["lower95"] is not None]
    wide = found.get("window")
    return f"{format(wide['lower95'], '.3g') if wide else '–'} ({max(points):.3g})" if points else ""


def estimator_table() -> str:
    content = load("analytic/verdicts.json")
    columns = [
        (f"{rule}: {words}", content[rule][key])
        for rule in ("sde/ddpm", "ode/dpmpp_2m")
        for key, words in (("against_em", "EM"), ("against_all_baselines", "all"))
    ]
    rows = [("estimator", *(title for title, _ in columns))]
    for key, words in ESTIMATORS.items():
        cells = [bounds(found.get(key, {})) for _, found in columns]
        if any(cells):
            rows.append((words, *cells))
    return table(rows)


def bound(entry: dict | None) -> str:
    """The lower bound of a window in FLOPs, in two digits after the point at most."""
    found = entry and entry["flops"]["window"]
    return f"{found['lower95']:.3g}" if found else "no window"


def each(result: dict, method: str, against: str) -> str:
    """The windows of a method for both dynamics."""
    return ", ".join(f"{words} {bound(result[d][method][against])}" for d, words in STEP.items())


def peaks(result: dict, method: str, against: str) -> str:
    """The largest single speed-up in FLOPs of a method for both dynamics, with its bound."""
    found = {words: result[d][method][against]["flops"]["max"] for d, words in STEP.items()}
    return ", ".join(f"{words} {e['speedup']:.2g} (≥ {e['lower95'] or 0:.2g})" for words, e in found.items())


def ratios(result: dict, method: str, against: str = "em_largest") -> str:
    """The largest ratios of squared errors at equal cost, with their bounds."""
    found = {words: result[d][method][against]["flops"]["equal_cost"] for d, words in STEP.items()}
    return ", ".join(f"{words} {e['ratio']:.2g} (≥ {e['lower95']:.2g})" for words, e in found.items() if e)


def verdict(bounds: Sequence[float | None], least: float) -> str:
    """Whether the lower bounds reach a claim for both dynamics, one, or none."""
    count = sum(x is not None and x >= least for x in bounds)
    return ("**not reproduced**", "**in part**", "**reproduced**")[count]


def claims() -> list[tuple[str, str, str, str]]:
    """Each claim of the paper, what was measured, the verdict, and the command that repeats it."""
    speeds, rates, at_32, on_gpu = map(load, (
        "celeba32/speedup.json", "rates/rates.json", "celeba32/gamma.json", "celeba64_sprint_short/gamma.json",
    ))  # fmt: skip
    both, data = speeds["paper"], speeds["paper_data"]
    worst = {
        method: max(abs(rates[d][g][method]["exponent"] - rates[d][g][method]["predicted"])
                    for d in ("sde", "ode") for g in ("2.5", "3", "4"))
        for method in ("em", "ml_em")
    }  # fmt: skip

    def row(
        claim: str, result: dict, method: str, against: str, command: str = "the same"
    ) -> tuple[str, str, str, str]:
        text = f"up to {peaks(result, method, against)}; window {each(result, method, against)}"
        bounds = [result[d][method][against]["flops"]["max"]["lower95"] for d in STEP]
        return claim, text, verdict(bounds, 4), command

    equal = [both[d]["pattern"]["em_largest"]["flops"]["equal_cost"]["lower95"] for d in STEP]
    return [
        row("up to 4 times less compute than EM with the largest network at equal error: best of 15 coin patterns",
            both, "pattern", "em_largest", "`make sample-compare EXPERIMENT=celeba32`"),
        row("the same, fresh coins for each image", both, "coins", "em_largest"),
        row("best pattern, all levels trained on data alone", data, "pattern", "em_largest"),
        row("best pattern over EM with *any* level, t6 alone too", both, "pattern", "em_any"),
        ("up to 10 times less error at equal compute", f"best pattern: {ratios(both, 'pattern')}; fresh coins: "
         f"{ratios(both, 'coins')}", verdict(equal, 10), "the same"),
        ("gamma about 2.5: harder than Monte Carlo (above 2)", f"from losses: {gamma(at_32, 'loss_fit')}",
         f"**{at_32['htmc']}**", "`make measure-gamma EXPERIMENT=celeba32`"),
        ("EM costs error^-(gamma + 1), ML-EM error^-gamma",
         f"known answers: exponents within {worst['em']:.2f} and {worst['ml_em']:.2f} of theory", "**reproduced**",
         "`make verify-rates`"),
        ("all of this on CelebA 64x64", f"gamma after 3 minutes of training: {gamma(on_gpu, 'loss_fit')}",
         "not yet measured", "`EXPERIMENT=celeba64`, a day of one GPU"),
    ]  # fmt: skip


def claims_table() -> str:
    return table([("the paper claims", "measured here, CelebA 32x32", "verdict", "repeat with"), *claims()])


def paper_table() -> str:
    """All windows of the paper's protocol, and the largest ratios of errors at equal cost."""
    speeds = load("celeba32/speedup.json")
    rows = [("CelebA 32x32, the paper's protocol", "at equal error, FLOPs", "at equal error, seconds",
             "at equal compute, largest ratio of errors")]  # fmt: skip
    for levels, against, d in product(("paper", "paper_data"), ("em_largest", "em_any"), ("sde", "ode")):
        for method, words in METHODS.items():
            entry = speeds[levels][d][method][against]
            best = entry["flops"]["equal_cost"]
            label = f"{STEP[d]}, {words} over {AGAINST[against]}"
            label += "" if levels == "paper" else ", levels trained on data"
            ratio = f"{best['ratio']:.2f} (≥ {best['lower95']:.2f}) at {best['gflop']:.2g} GFLOP" if best else "–"
            rows.append((label, window(entry["flops"]), window(entry["seconds"]), ratio))
    return table(rows)


def distances_table() -> str:
    """Distances to real images of settings on frontiers, by two kinds of features."""
    keys = ["dynamics", "levels", "steps", "coins", "gflops_realised", "error"]
    light, inception = (
        read_table(ROOT / "results" / folder / "compare.csv") for folder in ("celeba32", "celeba32_inception")
    )
    both = light[light.distance.notna()].merge(inception[inception.distance.notna()], on=keys, suffixes=("", "_other"))
    floors = both.distance_floor.iloc[0], both.distance_floor_other.iloc[0]
    rows: list[tuple[str, ...]] = [
        ("CelebA 32x32, n = 1,000", "GFLOP per image", "squared error", "FD-random-conv", "FD-InceptionV3-nsfwjs",
         "kernel distance, the same features"),
    ]  # fmt: skip
    for r in both.sort_values(["dynamics", "gflops_realised"], ascending=[False, True]).to_dict("records"):
        coins = {"independent": "fresh coins", "": "alone"}.get(r["coins"], r["coins"])
        other = f"{r['distance_other']:.2f} [{r['distance_low_other']:.2f}, {r['distance_high_other']:.2f}]"
        name = f"{STEP[r['dynamics']]}, {r['steps']} steps, {r['levels'].replace('+', ' + ')}, {coins}"
        numbers = f"{r['gflops_realised']:.3g}", f"{r['error']:.2g}", f"{r['distance']:.3f}", other
        rows.append((name, *numbers, f"{r['kid_other']:.4f}"))
    return table([*rows, ("real images against real ones", "–", "–", f"{floors[0]:.3f}", f"{floors[1]:.2f}", "0")])


def strict_table() -> str:
    """Speed-ups over stronger rivals than the paper's, from this repository's own protocol."""
    faces, demo = (load(f"{name}/speedup.json")["strict"] for name in ("celeba32", "demo"))
    rows: list[tuple[str, ...]] = [("lower bound of the speed-up in FLOPs", "CelebA 32x32", "demo")]
    for words, method, against in (
        ("fresh coins over EM with the largest level", "coins", "em_largest"),
        ("fresh coins over every solver on any level", "coins", "all"),
        ("ours over every solver on levels trained on data alone", "any", "em_data"),
        ("ours over every solver on any level", "any", "all"),
    ):
        cells = (each(r, method, against) if against in r["sde"][method] else "–" for r in (faces, demo))
        rows.append((words, *(cell.replace("DDPM", "SDE").replace("DDIM", "ODE") for cell in cells)))
    return table(rows)


def guidance_table() -> str:
    """One guide for all levels against a guide per level, by problem, step rule and scale; toys at one scale only."""
    rows: list[tuple[str, ...]] = [
        ("problem", "w", "V / V(w = 1), common", "per level", "cosine", "S, common", "per level",
         "error, few firings, common", "per level", "error, many firings, common", "per level", "apart"),
    ]  # fmt: skip
    columns = load("guidance/guidance.json")["columns"]
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for one, other in zip(found[::2], found[1::2], strict=True):
        if one["problem"] != "portraits" and (one["rule"] != "sde/ddpm" or one["w"] != 4):
            continue
        both = one, other
        rows.append((
            f"{one['problem']}, {STEP[one['rule'][:3]]}",
            f"{one['w']:g}" + ("" if one["everywhere"] else ", inside"),
            *(f"{r['growth']:.3g}" for r in both), f"{other['cosine']:.2f}", *(f"{r['s']:.2g}" for r in both),
            *(f"{r[f'{n}_error']:.2g} ± {r[f'{n}_error_se']:.1g}" for n in ("few", "many") for r in both),
            f"{one['apart']:.2g}",
        ))  # fmt: skip
    return table(rows)


def benchmark_tables() -> str:
    paths = sorted((ROOT / "results" / "benchmark").glob("*.json"))
    return "\n\n".join(report(json.loads(path.read_text())) for path in paths)


TABLES = {
    (README, "claims"): claims_table,
    (README, "strict"): strict_table,
    (PAPER, "claims"): claims_table,
    (PAPER, "protocol"): paper_table,
    (PAPER, "distances"): distances_table,
    (RESULTS, "gamma"): gamma_table,
    (RESULTS, "levels"): levels_table,
    (RESULTS, "outlook"): outlook_table,
    (RESULTS, "seeds"): seeds_table,
    (RESULTS, "trials"): trials_table,
    (RESULTS, "forms"): forms_table,
    (RESULTS, "local"): local_table,
    (RESULTS, "fit"): fit_table,
    (RESULTS, "speedups"): speedup_table,
    (RESULTS, "estimators"): estimator_table,
    (GUIDANCE, "guidance"): guidance_table,
    (SPEED, "benchmark"): benchmark_tables,
}


def between(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the two markers of this name."""
    before, rest = text.split(f"<!-- {name}:begin -->\n")
    inner, after = rest.split(f"<!-- {name}:end -->")
    return f"{before}<!-- {name}:begin -->\n", inner, f"<!-- {name}:end -->{after}"


if __name__ == "__main__":
    for (page, name), make in TABLES.items():
        before, _, after = between(page.read_text(), name)
        page.write_text(f"{before}{make()}\n{after}")
