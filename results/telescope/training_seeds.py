"""The chain gauss + t6 + w24 from two training seeds: how much do S and E|t6 - w24|^2 depend on chance in training?

Writes training_seeds.json beside it. From the root, after

    make train-levels EXPERIMENT=celeba32
    make train-levels EXPERIMENT=celeba32 ARGS="name=seed1 train.seed=1 only=[w6,w24]"
    make train-levels EXPERIMENT=celeba32 ARGS="name=seed1 train.seed=1 only=t6"

(in the committed training_seeds.json t6 of seed 1 started from the w6 of seed 0):

    python results/telescope/training_seeds.py data/celeba32 checkpoints/celeba32 checkpoints/seed1
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlem_diffusion.data import images as datasets
from mlem_diffusion.data.pixels import to_float
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import base_of, shared_costs
from mlem_diffusion.diffusion.process import LinearSchedule, Process, alpha2_weights
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.gamma.measurement import noise_levels, squared_differences
from mlem_diffusion.models.family import load_level, read_metadata
from mlem_diffusion.multilevel.gains import measure_effects
from mlem_diffusion.multilevel.outlook import variance_cost

PROCESS, SHAPE, NAMES = Process(LinearSchedule()), (3, 32, 32), ["t6", "w24"]
SEEDS, STEPS, IMAGES = range(500000, 500032), 32, 256


def measured(folder: Path, held_out: torch.Tensor) -> dict[str, Any]:
    networks = [load_level(folder / m["name"], m, compile="off") for m in read_metadata(folder, NAMES)]
    base, where = base_of(networks), noise_levels(PROCESS, 12)
    assert base is not None
    pairs = [(0, None), (1, None), (0, 1)]
    t6, w24, apart = squared_differences(networks, pairs, held_out, where, seed=1).mean(1) @ alpha2_weights(where)
    levels = [base, *networks]
    path = BrownianPath(SEEDS, SHAPE)
    costs, shared = shared_costs(levels)
    found: dict[str, Any] = {"loss": {"t6": t6, "w24": w24}, "to_teacher": apart, "steps": STEPS}
    for dynamics, rule in (("sde", "ddpm"), ("ode", "dpmpp_2m")):
        effects = measure_effects(levels, step_rule(dynamics, rule), PROCESS.grid(STEPS), path)
        s, _ = variance_cost(effects, costs, float(costs[-1]) + shared)
        v = [np.sqrt((effects.difference(a, a + 1) ** 2).mean(axis=0)).sum() ** 2 for a in (0, 1)]
        found[dynamics] = {"S": s, "V_t6": v[0], "V_w24": v[1]}
    return found


if __name__ == "__main__":
    data, results = datasets.load(Path(sys.argv[1])), []
    images = to_float(data.images[data.held_out()[:IMAGES]], torch.device("cpu"))
    for name in sys.argv[2:]:
        results.append(measured(Path(name), images))
        print(json.dumps(results[-1]), flush=True)
    (Path(__file__).parent / "training_seeds.json").write_text(json.dumps(results, indent=1) + "\n")
