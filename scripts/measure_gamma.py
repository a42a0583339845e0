"""Trained levels -> gamma.json, gamma.png, gamma_details.png: error against FLOPs, and the exponent."""

from collections import Counter

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.experiment.runs import gain_densities
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.gamma import plot_gamma, plot_gamma_details
from mlem_diffusion.gamma.measurement import measure, summary, taught_errors
from mlem_diffusion.models.family import level_name, load_level, read_metadata
from mlem_diffusion.training.levels import repeated

OUTPUTS = ["gamma.json", "gamma.png", "gamma_details.png"]


def cost(exp: Experiment, levels: dict[str, Level]) -> Counter[str]:
    evaluations = len(exp.cfg.train.snapshots) * exp.cfg.gamma.images * exp.cfg.gamma.noise_levels
    return Counter(dict.fromkeys(levels, evaluations))


@stage(OUTPUTS, ["process", "gamma"], ["levels", "images", "gains.json"], cost, trained=True)
def main(exp: Experiment) -> None:
    again = read_metadata(exp.checkpoints, [level_name(*level) for level in repeated(exp.cfg)])

    def load(metadata, snapshot):
        return load_level(exp.checkpoints / metadata["name"], metadata, exp.device, snapshot, compile="off")

    settings, gains, every, held_out = exp.cfg.gamma, gain_densities(exp), exp.metadata(), exp.held_out()
    family = [m for m in every if "teacher" not in m]  # a taught level's error says little about its size
    result = measure(family, again, load, held_out, exp.process, settings, exp.progress, gains)
    result["made_with"] = exp.identity
    if taught := [m for m in every if "teacher" in m]:
        levels = [load(m, None) for m in [*taught, family[-1]]]
        result["taught"] = taught_errors(levels, held_out, exp.process, settings)
    exp.save("gamma.json", result)
    exp.figure("gamma.png", plot_gamma(result, exp.cfg.title))
    exp.figure("gamma_details.png", plot_gamma_details(result, exp.cfg.title))
    for n, e in result["estimates"].items():
        exp.log({f"gamma/{n}": e["gamma"], f"gamma/{n}/low95": e["interval"][0], f"gamma/{n}/high95": e["interval"][1]})
    exp.print(summary(result))


if __name__ == "__main__":
    main()
