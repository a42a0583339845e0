"""Levels -> a folder of PNGs, one a seed, and a grid, with the comparison's multilevel sampler or a given one."""

from mlem_diffusion import parallel
from mlem_diffusion.comparison.pictures import begin, draw, file_names, parse_seeds, read_pictures
from mlem_diffusion.comparison.settings import describe
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.sampling import chosen
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.style import image_grid

GRID = 64  # the most pictures in the grid


def cost(exp: Experiment, levels: dict[str, Level]) -> dict[str, float]:
    (setting, gamma, plans, _), count = chosen(exp, levels), len(parse_seeds(exp.cfg.seeds))
    one = setting.expected_evaluations(levels, gamma, plans, exp.process)
    return {name: evaluations * count for name, evaluations in one.items()}


@stage(
    outputs=["samples.png", "samples.json"], depends=["process", "precision", "seeds", "sampler", "sample"],
    reads=["levels", "best.json", "plans.npz"], cost=cost,
)  # fmt: skip
def main(exp: Experiment) -> None:
    if exp.shape[0] != 3 and exp.decode is None:
        raise UserError(f"Samples of shape {list(exp.shape)} are not pictures in RGB, and there is no family.decoder.")
    seeds, levels, folder, last = parse_seeds(exp.cfg.seeds), exp.levels(), exp.results / "samples", "samples.png"
    setting, gamma, plans, reason = chosen(exp, levels)
    estimator, grid = setting.build(levels, gamma, plans), setting.grid(exp.process)
    exp.print(f"sample: {reason}")
    if parallel.is_main():
        begin(folder, exp.results / last, exp.results / "cache" / "samples.key", exp.key)
    parallel.barrier()
    with exp.progress("sample", len(seeds)) as progress:
        draw(estimator, setting.rule, grid, seeds, exp.cfg.compare.batch, exp.path, exp.decode, folder, progress)
    parallel.barrier()
    names = file_names(seeds)
    exp.note(*(f"samples/{name}" for name in names))
    exp.save("samples.json", {"seeds": str(exp.cfg.seeds), "setting": setting.row, "gamma": gamma})
    exp.figure(last, image_grid(read_pictures([folder / name for name in names[:GRID]])))
    visits = setting.visits(exp.process)
    gflops = estimator.expected_flops(len(visits), visits) / 1e9
    exp.print(f"sample: {len(seeds)} images with {describe(setting.row)}, {gflops:.3g} GFLOP per image.")


if __name__ == "__main__":
    main()
