"""Levels and gamma -> compare.csv, compare.png, speedup.json, best.json, grids: EM, ML-EM and baselines compared."""

from mlem_diffusion.comparison import features, planned, speedup, table, verdicts
from mlem_diffusion.comparison.settings import best_setting
from mlem_diffusion.experiment.costs import unweighted
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.image_grid import comparison_grid
from mlem_diffusion.files import read_arrays


def real_images(exp: Experiment, extractor: features.Extractor) -> features.RealImages | None:
    """Feature moments of the training images; without images the published ones."""
    n, seed, images = exp.cfg.compare.num_samples, exp.cfg.compare.seed, exp.images_if_needed()
    if images is None:
        return features.published_images(exp.published, exp.checkpoints, extractor, n, seed)
    rows = images.train()
    with exp.progress("features of the real images", len(rows)) as progress:
        real = exp.cached(
            "real.npz", [images.manifest["sha256"], extractor.key],
            lambda path: read_arrays(path, "run make sample-compare again")["features"],
            lambda path: features.write_features(path, extractor, images.images, rows, progress),
        )  # fmt: skip
    moments, floor = features.feature_moments(real), features.distance_floor(real, n, seed)
    return features.RealImages(extractor.name, moments, floor)


def cost(exp: Experiment) -> list[tuple[str, dict[str, float]]]:
    plans = planned.read_planned(exp.results / "plans.json", exp.cfg.compare)
    return planned.expected_costs(exp.cfg.compare, unweighted(exp), exp.process, plans)


@stage(
    outputs=["compare.csv", "compare.png", "speedup.json"], depends=["process", "precision", "compare", "metrics"],
    reads=["levels", "images", "gamma.json", "plans.json", "plans.npz"], cost=cost,
)  # fmt: skip
def main(exp: Experiment) -> None:
    cfg, runner = exp.cfg.compare, exp.runner()
    plans = planned.read_planned(exp.results / "plans.json", cfg)
    settings = planned.all_settings(cfg, runner.levels, exp.process.base_steps, plans)
    real = real_images(exp, runner.extractor) if runner.extractor else None
    measured = planned.complete(settings, exp.run(runner, settings, "compare"), runner.seeds, real, plans)
    frame, sound = table.frame_of(m.row for m in measured), [m for m in measured if "diverged" not in m.row]
    result = speedup.speedups(sound, real and real.moments, cfg.bootstrap, cfg.distance_bootstrap, cfg.seed)
    exp.facts |= (made := {"gamma": runner.gamma, "made_with": exp.identity})
    exp.save("compare.csv", table.to_text(frame))
    exp.figure("compare.png", plot_compare(table.for_figures(frame), exp.cfg.title))
    exp.save("speedup.json", result)
    if plans.settings:
        exp.save("verdicts.json", verdicts.verdicts(sound, plans.flops, cfg.seed, plans.unit))
    if real is not None:
        exp.save("best.json", best_setting(m.row for m in sound) | made)
        for name in result:
            exp.figure(f"grids/{name}.png", comparison_grid(planned.examples(sound, name, runner)))
    exp.log({"settings": len(measured), "diverged": len(measured) - len(sound)})
    lost = [f"{table.describe(m.row)}: {m.row['diverged']} samples diverged." for m in measured if "diverged" in m.row]
    exp.print("\n".join([*lost, speedup.summary(result)]))


if __name__ == "__main__":
    main()
