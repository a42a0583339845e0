"""The chain gauss + t6 + w24 from two training seeds: how much do S and the gain of coins depend on chance in training?

Writes training_seeds.json beside it. Each family is planned on 16 sample seeds and judged on 32 others, against its own
reference, as `make optimise` and `make sample-compare` do; only independent coins and DDPM. From the root, after

    make train-levels EXPERIMENT=celeba32 ARGS="name=seed1 train.seed=1 only=[w6,w24]"
    make train-levels EXPERIMENT=celeba32 ARGS="name=seed1 train.seed=1 only=t6"

(in training_seeds.json t6 of seed 1 started from the w6 of seed 0):

    python results/telescope/training_seeds.py checkpoints/celeba32 checkpoints/seed1
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level, base_of
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.reference import sample_reference
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.models.family import load_level, read_metadata
from mlem_diffusion.multilevel.outlook import variance_cost
from mlem_diffusion.multilevel.planner import calibrate
from mlem_diffusion.statistics import squared_errors

PROCESS, RULE, SHAPE = Process(LinearSchedule()), step_rule("sde/ddpm"), (3, 32, 32)
PLANNED, JUDGED = range(500000, 500016), range(1000, 1032)
STEPS, COSTS, ALONE = (16, 32), (0.7, 1.3, 2.5), (4, 8, 12, 16, 24, 32)
REFERENCE = 257  # noise levels


def family(folder: Path) -> list[Level]:
    found = [load_level(folder / m["name"], m, compile="off") for m in read_metadata(folder, ["t6", "w24"])]
    base = base_of(found)
    return [base, *found] if base else found


def judge(folder: Path) -> dict[str, Any]:
    levels = family(folder)
    facts: dict[str, Any] = {
        m["name"]: float(np.mean(m["held_out"]["loss"])) for m in read_metadata(folder, ["t6", "w24"])
    }
    found = calibrate(
        levels, PROCESS, RULE, SHAPE, steps=STEPS, seeds=PLANNED, calibrate_steps=(32,), reference_steps=REFERENCE
    )
    path = BrownianPath(JUDGED, SHAPE)
    fine = sample_reference(levels[-1], "sde", PROCESS, REFERENCE, path)[0]

    def error(estimator: Any, steps: int) -> float:
        return float(squared_errors(sample(estimator, RULE, PROCESS.grid(steps), path)[0], fine).mean())

    alone = {n: error(SingleLevel(levels[-1]), n) for n in ALONE}
    rows = []
    for cost in COSTS:
        plan = found.plan("independent", cost=cost * found.unit)
        squared = error(plan.build(levels), plan.steps)
        # steps of the largest level alone at this error, on straight lines in logarithms
        needed = np.exp(np.interp(-np.log(squared), -np.log(list(alone.values())), np.log(list(alone))))
        rows.append({"cost": plan.cost / found.unit, "levels": plan.levels, "steps": plan.steps, "error": squared,
                     "speedup": float(needed / (plan.cost / found.unit))})  # fmt: skip
    s = {len(e.logsnr): variance_cost(e, found.costs, found.unit)[0] for e in (*found.coarser, found.effects)}
    return {"held_out_loss": facts, "S": s, "largest_alone": alone, "coins": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = []
    for name in sys.argv[1:]:
        results.append({"folder": Path(name).parts[-1] if "seed" in name else "celeba32", **judge(Path(name))})
        print(json.dumps(results[-1]), flush=True)
    (Path(__file__).parent / "training_seeds.json").write_text(json.dumps(results, indent=1) + "\n")
