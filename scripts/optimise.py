"""Levels -> gains.png, diagnostics.json, plans.json, ablation.json: measure gains, select plans, ablate levels.
Calibration, selection and the comparison have sample seeds of their own."""

from dataclasses import replace

from mlem_diffusion import parallel
from mlem_diffusion.comparison.settings import telescope
from mlem_diffusion.experiment import plan_search
from mlem_diffusion.experiment.runs import make_runner, run_all
from mlem_diffusion.experiment.seeds import sample_seeds
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.levels import plot_ablation, plot_diagnostics, plot_gains
from mlem_diffusion.multilevel import ablation, diagnostics
from mlem_diffusion.multilevel.candidates import select
from mlem_diffusion.multilevel.plan import save_plans

OUTPUTS = ["plans.json", "plans.npz", "gains.json", "gains.png", "diagnostics.json", "ablation.json", "ablation.png"]


@stage(OUTPUTS, depends=["process", "precision", "optimise", "timing"], reads=["levels"], cost=plan_search.cost)
def main(exp: Experiment) -> None:
    selecting = make_runner(exp)
    levels, seeds = telescope(selecting.levels), list(sample_seeds(exp.cfg).calibration[: exp.cfg.optimise.calibrate])
    runner = replace(selecting, levels=levels, seeds=seeds)  # of the calibration
    timing = plan_search.timing(exp, selecting.levels)  # before workers use the machine
    diagnosed = plan_search.diagnostics(exp, levels)
    alone = plan_search.errors_alone(exp, runner)
    plan_search.outlooks(exp, levels, alone, diagnosed)
    exp.save("diagnostics.json", diagnosed)
    for dynamics, content in diagnosed.items():
        exp.print(diagnostics.table(content))
        if "pooled" in content:
            exp.figure(f"diagnostics-{dynamics}.png", plot_diagnostics(content))

    searched = plan_search.search(exp, runner, alone, timing["seconds"])
    exp.save("gains.json", plan_search.densities(exp, searched))
    ablated = plan_search.ablate(exp, levels, searched, timing["seconds"])
    exp.save("ablation.json", ablated)
    exp.figure("ablation.png", plot_ablation(ablated, exp.cfg.title))
    exp.print(ablation.table(ablated))
    # run all candidates; select those on the frontiers of measured errors
    every = [(s, plan) for s in searched for group in s.candidates for plan in group]
    selecting = replace(selecting, plans={plan.id: plan for _, plan in every})
    tried = list(dict.fromkeys(s.setting(plan) for s, plan in every))
    measured = dict(zip(tried, run_all(exp, selecting, tried, "plans"), strict=True))
    chosen = []
    for s in searched:
        errors = {plan.id: measured[s.setting(plan)].row["error"] for at, plan in every if at is s}
        chosen += plan_search.described(s, select(s.candidates, errors), errors, selecting)
    ledger = plan_search.ledger(exp, runner, selecting, alone, searched, tried, diagnosed)
    if parallel.is_main():
        save_plans(exp.results / "plans.json", chosen, **ledger, timing=timing)
    exp.note("plans.json", "plans.npz")
    exp.figure("gains.png", plot_gains([s.inputs.effects for s in searched], exp.cfg.title))
    exp.log({"plans": len(chosen), "calibration_pflops": ledger["calibration"]["flops"] / 1e15})
    exp.print(f"{len(chosen)} of {len(tried)} plans selected.")


if __name__ == "__main__":
    main()
