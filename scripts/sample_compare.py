"""Levels and gamma -> compare.csv, compare.png, speedup.json, best.json, grids: EM, ML-EM and baselines compared."""

from collections.abc import Mapping

from mlem_diffusion.comparison import choice, planned, speedup, verdicts
from mlem_diffusion.comparison.bias import bias_text, reference_bias
from mlem_diffusion.comparison.settings import describe, for_figures, frame_of, to_text
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.experiment.runs import check_levels, make_runner, real_images, run_all, timing_record
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.style import comparison_grid


def cost(exp: Experiment, levels: dict[str, Level]) -> Mapping[str, float]:
    plans = planned.read_planned(exp.results / "plans.json", exp.cfg.compare)
    return planned.expected_evaluations(exp.cfg.compare, levels, exp.process, plans)


@stage(
    outputs=["compare.csv", "compare.png", "speedup.json"],
    depends=["process", "precision", "compare", "metrics", "timing", "compile"],
    reads=["levels", "images", "gamma.json", "plans.json", "plans.npz"], cost=cost,
)  # fmt: skip
def main(exp: Experiment) -> None:
    cfg, plans = exp.cfg.compare, planned.read_planned(exp.results / "plans.json", exp.cfg.compare)
    if plans.settings:
        check_levels(exp, "plans.json", plans.made_with, "make optimise")
    runner = make_runner(exp, plans)
    settings = planned.all_settings(cfg, runner.levels, exp.process.base_steps, plans)
    real = real_images(exp, runner.extractor) if runner.extractor else None
    found = run_all(exp, runner, settings, "compare")
    measured = planned.complete(settings, found, runner.seeds, real, plans, cfg.distance_bootstrap)
    frame, sound = frame_of(m.row for m in measured), [m for m in measured if "diverged" not in m.row]
    taught = [name for name, level in runner.levels.items() if level.teacher]
    result = speedup.speedups(sound, runner.timing, cfg.bootstrap, cfg.seed, taught)
    bias = reference_bias(sound, runner)
    exp.save("compare.csv", to_text(frame))
    exp.save("timing.json", timing_record(exp, runner.timing))
    exp.save("reference.json", bias)
    exp.figure("compare.png", plot_compare(for_figures(frame), exp.cfg.title, result))
    exp.save("speedup.json", result)
    if plans.settings:
        exp.save("verdicts.json", verdicts.verdicts(sound, plans.flops, cfg.seed, plans.unit, runner.timing))
    if runner.shape[0] == 3:  # pictures, and not functions
        made_with = {"gamma": runner.gamma, "made_with": exp.identity}
        exp.save("best.json", choice.candidates(planned.on_frontiers(sound)) | made_with)
        for name in result["strict"]:
            exp.figure(f"grids/{name}.png", comparison_grid(planned.examples(sound, name, runner)))
    exp.log({"settings": len(measured), "diverged": len(measured) - len(sound), **speedup.lower_bounds(result)})
    lost = [f"{describe(m.row)}: {m.row['diverged']} samples diverged." for m in measured if "diverged" in m.row]
    exp.print("\n".join([*lost, bias_text(bias), speedup.summary(result)]))


if __name__ == "__main__":
    main()
