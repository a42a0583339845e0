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
from mlem_diffusion.training.levels import planned


def cost(exp: Experiment, levels: dict[str, Level]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for v in planned(exp.cfg, exp.describe_levels()):
        counts[level_name(v["width"])] += 3 * training_of(exp, v)["images"]  # a backward pass costs two forward passes
    return counts


@stage(trained=True, cost=cost)
def main(exp: Experiment) -> None:
    if are_published(exp):
        exp.print("train_levels: the levels are already published (ARGS=overwrite=true trains them anew).")
        return
    levels = planned(exp.cfg, exp.levels_to_train())
    missing = untrained(exp, levels)
    if not missing and exp.cfg.only is None and exp.is_finished(["training.png"]):
        return
    workers = worker_count(exp, len(missing))
    if workers > 1:  # the longest first
        missing.sort(key=lambda level: -level["flops"] * training_of(exp, level)["images"])
    for _ in parallel.run(train_one, [(exp, v, line) for line, v in enumerate(missing)], workers, exp.should_stop):
        pass
    if exp.cfg.only is not None:
        exp.print(f"train_levels: {', '.join(v['name'] for v in levels)} in {exp.cfg.paths.checkpoints}/ trained.")
    elif parallel.is_main():
        metadata = read_metadata(exp.checkpoints, map(level_name, exp.cfg.family.widths))
        for m in metadata:
            loss = float(np.mean(m["held_out"]["loss"]))
            exp.log({"level": m["name"], "held_out_loss": loss, "images": m["images"]})
        exp.figure("training.png", plot_training(metadata, exp.cfg.title))


if __name__ == "__main__":
    main()
