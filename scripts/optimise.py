"""Levels -> gains.png, diagnostics.json, plans.json, ablation.json: measure gains, select plans, ablate levels.

Plans are selected on seeds that the comparison does not use.
"""

from dataclasses import replace

from mlem_diffusion import parallel
from mlem_diffusion.comparison.settings import setting_of
from mlem_diffusion.experiment import plan_search
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.levels import plot_ablation, plot_diagnostics, plot_gains
from mlem_diffusion.multilevel import ablation, diagnostics, selection
from mlem_diffusion.multilevel.plan import save_plans

OUTPUTS = ["plans.json", "plans.npz", "gains.png", "diagnostics.json", "ablation.json", "ablation.png"]


@stage(OUTPUTS, depends=["process", "precision", "optimise"], reads=["levels"], cost=plan_search.cost)
def main(exp: Experiment) -> None:
    plan_search.check(exp)
    runner, title = exp.runner(select=True), exp.cfg.title
    timing = plan_search.timing(exp, runner.levels)  # before workers use the machine
    diagnosed = plan_search.diagnostics(exp, runner.levels)
    exp.save("diagnostics.json", diagnosed)
    for dynamics, content in diagnosed.items():
        exp.print(diagnostics.table(content))
        if "pooled" in content:
            exp.figure(f"diagnostics-{dynamics}.png", plot_diagnostics(content))

    search = plan_search.candidates(exp, runner, timing["seconds"])
    ablated = plan_search.ablate(exp, search.rules, timing)
    exp.save("ablation.json", ablated)
    exp.figure("ablation.png", plot_ablation(ablated, title))
    exp.print(ablation.table(ablated))

    # run all candidates; select those on the frontiers of measured errors
    every = [(key, plan) for key, found in search.groups.items() for group in found.values() for plan in group]
    runner = replace(runner, plans={plan.id: plan for _, plan in every})
    tried = list(dict.fromkeys(setting_of(plan, *key) for key, plan in every))
    measured = dict(zip(tried, exp.run(runner, tried, "plans"), strict=True))
    chosen = []
    for key, found in search.groups.items():
        errors = {plan.id: measured[setting_of(plan, *key)].row["error"] for at, plan in every if at == key}
        for plan in selection.select(found, errors):
            facts = {"dynamics": key[0], "step_rule": key[1], "selected_error": errors[plan.id]}
            chosen.append((selection.priced(plan, list(runner.levels.values()), timing["seconds"]), facts))
    facts = plan_search.ledger(exp, runner, search, tried, diagnosed)
    if parallel.is_main():
        save_plans(exp.results / "plans.json", chosen, **facts, timing=timing)
    exp.note("plans.json", "plans.npz")
    exp.figure("gains.png", plot_gains([rule.effects for rule in search.rules], title))
    exp.log({"plans": len(chosen), "calibration_pflops": facts["calibration"]["flops"] / 1e15})
    exp.print(f"{len(chosen)} of {len(tried)} plans selected.")


if __name__ == "__main__":
    main()
