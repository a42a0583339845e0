"""Levels and gamma -> compare.csv, compare.png, paper.png, speedup.json, best.json, grids: EM, ML-EM and baselines."""

from typing import Any

from mlem_diffusion.comparison import choice, planned, speedup, verdicts
from mlem_diffusion.comparison.bias import bias_text, reference_bias
from mlem_diffusion.comparison.settings import describe, for_figures, frame_of, to_text
from mlem_diffusion.experiment import protocols
from mlem_diffusion.experiment.runs import make_runner, own_plans, real_images, timing_record
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.paper import plot_paper
from mlem_diffusion.figures.style import comparison_grid


@stage(
    outputs=["compare.csv", "speedup.json"],
    depends=["process", "precision", "compare", "metrics", "timing", "compile", "protocol"],
    reads=["levels", "images", "gamma.json", "plans.json", "plans.npz"], cost=protocols.cost,
)  # fmt: skip
def main(exp: Experiment) -> None:
    cfg, plans = exp.cfg.compare, own_plans(exp)
    runner = make_runner(exp, plans)
    real = real_images(exp, runner.extractor) if runner.extractor else None
    found = protocols.run_protocols(exp, runner, plans)
    protocols.add_distances(exp, runner, found, real)
    measured = [m for _, m in found]
    frame, sound = frame_of(m.row for m in measured), [m for m in measured if "diverged" not in m.row]
    taught = [name for name, level in runner.levels.items() if level.teacher]
    result = speedup.speedups(sound, runner.timing, cfg.bootstrap, cfg.seed, taught)
    strict = [m for m in sound if m.row["protocol"] == "strict"]
    exp.save("compare.csv", to_text(frame))
    exp.save("timing.json", timing_record(exp, runner.timing))
    exp.save("speedup.json", result)
    rows: Any = for_figures(frame)
    bias = reference_bias(sound, runner)
    exp.save("reference.json", bias)
    if "paper" in result:
        exp.figure("paper.png", plot_paper(rows[rows.protocol == "paper"], exp.cfg.title, result["paper"]))
    if strict:
        exp.figure("compare.png", plot_compare(rows[rows.protocol == "strict"], exp.cfg.title, result))
    if strict and plans.settings:
        exp.save("verdicts.json", verdicts.verdicts(strict, plans.flops, cfg.seed, plans.unit, runner.timing))
    if strict and runner.has_pictures:
        best = planned.frontiers([m.row for m in strict]).values()
        chosen = choice.candidates([strict[i] for own in best for i in own])
        exp.save("best.json", chosen | {"gamma": runner.gamma, "made_with": exp.identity})
        for name in result["strict"]:
            exp.figure(f"grids/{name}.png", comparison_grid(planned.examples(strict, name, runner)))
    exp.log({"settings": len(measured), "diverged": len(measured) - len(sound), **speedup.lower_bounds(result)})
    lost = [f"{describe(m.row)}: {m.row['diverged']} samples diverged." for m in measured if "diverged" in m.row]
    exp.print("\n".join([*lost, bias_text(bias), speedup.summary(result)]))


if __name__ == "__main__":
    main()
