"""Levels and gamma -> compare.csv, compare.png, speedup.json, best.json, grids: EM, ML-EM and baselines compared."""

from mlem_diffusion.comparison import frechet, planned, speedup, table
from mlem_diffusion.comparison.settings import best_setting
from mlem_diffusion.comparison.verdicts import verdicts
from mlem_diffusion.data.pixels import to_uint8
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.figures.image_grid import comparison_grid


def real_images(exp: Experiment, extractor: frechet.Extractor) -> frechet.RealImages | None:
    """Feature moments of the training images; without images the published ones."""
    n, seed, images = exp.cfg.compare.num_samples, exp.cfg.compare.seed, exp.images_if_needed()
    if images is None:
        return frechet.published_images(exp.published, exp.checkpoints, extractor, n, seed)
    rows = images.train()
    with exp.progress("features of the real images", len(rows)) as progress:
        features = exp.cached(
            "real.npz", [images.manifest["sha256"], extractor.key], frechet.read_features,
            lambda path: frechet.write_features(path, extractor, images.images, rows, progress),
        )  # fmt: skip
    return frechet.RealImages.of(extractor.name, features, n, seed)


def cost(exp: Experiment) -> list[tuple[str, dict[str, float]]]:
    family = exp.cfg.family
    levels = exp.levels() if family.callable is not None else planned.unweighted(exp.describe_levels(), family.gaussian)
    plans = planned.read_planned(exp.results / "plans.json", exp.cfg.compare)
    return planned.expected_costs(exp.plain("compare")["compare"], levels, exp.process, plans)


@stage(
    outputs=["compare.csv", "compare.png", "speedup.json"], depends=["process", "precision", "compare", "metrics"],
    reads=["levels", "images", "gamma.json", "plans.json", "plans.npz"], cost=cost,
)  # fmt: skip
def main(exp: Experiment) -> None:
    cfg, runner = exp.cfg.compare, exp.runner()
    plans = planned.read_planned(exp.results / "plans.json", cfg)
    settings = planned.all_settings(exp.plain("compare")["compare"], runner.levels, exp.process.base_steps, plans)
    real = real_images(exp, runner.extractor) if runner.extractor else None
    results = exp.run(runner, settings, "compare")
    measured = planned.complete(dict(zip(settings, results, strict=True)), runner.seeds, real, plans)
    frame, sound = table.frame_of(m.row for m in measured), [m for m in measured if "diverged" not in m.row]
    result = speedup.speedups(
        sound,
        real and real.moments,
        replicates=cfg.bootstrap,
        distance_replicates=cfg.distance_bootstrap,
        seed=cfg.seed,
    )
    left_out = {dynamics: entry.pop("left_out") for dynamics, entry in result.items()}
    exp.facts |= {"made_with": runner.made_with, "gamma_used": runner.gamma, "left_out": left_out}
    exp.save("compare.csv", table.to_text(frame))
    exp.figure("compare.png", plot_compare(table.for_figures(frame), exp.cfg.title))
    exp.save("speedup.json", result)
    if plans.settings:
        exp.save("verdicts.json", verdicts(sound, plans.flops, cfg.seed, plans.unit))
    if real is not None:
        best = best_setting(m.row for m in measured) | {"gamma": runner.gamma, "made_with": runner.made_with}
        exp.save("best.json", {key: value for key, value in best.items() if key != "seed"})
        for name in result:
            reference = to_uint8(runner.reference(name)[: runner.grid_images])
            rows = [("reference: largest level, finest grid", reference), *planned.examples(sound, name)]
            exp.figure(f"grids/{name}.png", comparison_grid(rows))
    for row in (m.row for m in measured if "diverged" in m.row):
        exp.print(
            f"{table.describe(row)} diverged in {row['diverged']} of {row['num_samples']} samples: it has no error."
        )
    exp.print(speedup.summary(result))


if __name__ == "__main__":
    main()
