"""Levels -> PNGs and a grid, one image per sample seed, with the best sampler of the comparison or a given one."""

from mlem_diffusion.comparison.runner import draw, parse_seeds
from mlem_diffusion.comparison.settings import SamplerSetting, describe, setting_from
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.experiment.runs import check_levels
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.style import image_grid
from mlem_diffusion.files import expect_content, read_json
from mlem_diffusion.models.family import level_name
from mlem_diffusion.multilevel.plan import Plan, load_plans

AGAIN = "run make sample-compare again"


def chosen(exp: Experiment) -> tuple[SamplerSetting, float]:
    """The setting to sample with, and the gamma of its probabilities."""
    given, path = exp.plain("sampler")["sampler"], exp.results / "best.json"
    if given != "best":
        return setting_from(given), float(given.get("gamma", 2.5))
    if path.is_file():
        best = read_json(path, AGAIN)
        with expect_content(path, AGAIN):
            check_levels(exp, "best.json", best.get("made_with"), "make sample-compare")
            return setting_from(best), float(best["gamma"])
    exp.print("sample: no comparison has been run, so the sampler is DPM-Solver++(2M), 20 steps of the largest level.")
    return SamplerSetting("ode", "dpmpp_2m", "single", (level_name(exp.cfg.family.widths[-1]),), 20), 2.5


def plans_of(exp: Experiment, setting: SamplerSetting) -> dict[str, Plan]:
    return load_plans(exp.results / "plans.json")[0] if setting.plan else {}


def cost(exp: Experiment, levels: dict[str, Level]) -> dict[str, float]:
    (setting, gamma), count = chosen(exp), len(parse_seeds(exp.cfg.seeds))
    one = setting.expected_evaluations(levels, gamma, plans_of(exp, setting), exp.process)
    return {name: evaluations * count for name, evaluations in one.items()}


@stage(
    outputs=["samples/grid.png", "samples/samples.json"], depends=["process", "precision", "seeds", "sampler"],
    reads=["levels", "best.json", "plans.npz"], cost=cost,
)  # fmt: skip
def main(exp: Experiment) -> None:
    seeds, (setting, gamma) = parse_seeds(exp.cfg.seeds), chosen(exp)
    estimator, grid = setting.build(exp.levels(), gamma, plans_of(exp, setting)), exp.process.grid(setting.steps)
    with exp.progress("sample", len(seeds)) as progress:
        where = (exp.shape, exp.device, exp.results / "samples", progress)
        total, pixels = draw(estimator, setting.rule, grid, seeds, exp.cfg.compare.batch, *where)
    exp.note(*(f"samples/{seed:06d}.png" for seed in seeds))
    exp.figure("samples/grid.png", image_grid(pixels))
    exp.save("samples/samples.json", {"setting": setting.row, "gamma": gamma})
    gflops = total.flops_per_image / 1e9
    exp.print(f"sample: {len(seeds)} images with {describe(setting.row)}, {gflops:.3g} GFLOP per image.")


if __name__ == "__main__":
    main()
