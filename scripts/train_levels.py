"""Packed images -> checkpoints/<experiment>/<level>/, training.png: train every level of the family.
On a CPU several levels are trained side by side. On GPUs all ranks train one level after another, each on its part of
every batch: torchrun --nproc-per-node 8 scripts/train_levels.py experiment=celeba64"""

from collections import Counter

import numpy as np

from mlem_diffusion import parallel
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.experiment.level_training import are_published, train_one, training_of, untrained
from mlem_diffusion.experiment.runs import worker_count
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.levels import plot_training
from mlem_diffusion.models.family import level_name, read_metadata
from mlem_diffusion.training.levels import level_names, planned, training_flops


def cost(exp: Experiment, levels: dict[str, Level]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for v in planned(exp.cfg, exp.describe_levels()):
        images = training_of(exp, v)["images"]
        counts[level_name(v["width"])] += 3 * images  # a backward pass costs two forward passes
        if "teacher" in v:
            counts[v["teacher"]["name"]] += images
    return counts


@stage(trained=True, cost=cost)
def main(exp: Experiment) -> None:
    if are_published(exp):
        exp.print("train_levels: the levels are already published (ARGS=overwrite=true trains them anew).")
        return
    levels, trained = planned(exp.cfg, exp.levels_to_train()), 0
    for taught in (False, True):  # a teacher first
        missing = untrained(exp, [v for v in levels if ("teacher" in v) == taught])
        workers = worker_count(exp, len(missing))
        if workers > 1:  # the longest first
            missing.sort(key=lambda v: -sum(training_flops(v, training_of(exp, v)["images"])))
        for _ in parallel.run(train_one, [(exp, v, line) for line, v in enumerate(missing)], workers, exp.should_stop):
            trained += 1
    if not trained and exp.cfg.only is None and exp.is_finished(["training.png"]):
        return
    if exp.cfg.only is not None:
        exp.print(f"train_levels: {', '.join(v['name'] for v in levels)} in {exp.cfg.paths.checkpoints}/ trained.")
    elif parallel.is_main():
        metadata = read_metadata(exp.checkpoints, level_names(exp.cfg))
        for m in metadata:
            loss, (own, teacher) = float(np.mean(m["held_out"]["loss"])), training_flops(m, m["images"])
            exp.log({"level": m["name"], "train/images_seen": m["images"], f"held_out/loss/{m['name']}": loss})
            of = f"{own / 1e12:.3g} TFLOP" + (f" and {teacher / 1e12:.3g} of {m['teacher']['name']}" if teacher else "")
            exp.print(f"{m['name']}: {m['images']:,} images, {of}; held-out loss {loss:.5f}")
        exp.figure("training.png", plot_training(metadata, exp.cfg.title))


if __name__ == "__main__":
    main()
