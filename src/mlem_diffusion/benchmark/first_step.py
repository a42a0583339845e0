"""Run one training step in a separate process and print the clock time at its end, for `training.first_step`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.process import LinearSchedule, Process
from ..errors import SlowPath
from ..training.loop import TrainConfig, train_level
from .networks import denoiser_of


def main(task: dict[str, Any]) -> dict[str, Any]:
    device = torch.device(task["device"])
    torch.set_float32_matmul_precision("high")
    denoiser = denoiser_of("ours", task["width"], task["size"], task["unet"], device)
    images = np.random.default_rng(0).integers(0, 256, (task["batch"], 3, task["size"], task["size"]), dtype=np.uint8)
    config = TrainConfig(
        images=task["batch"], batch=task["batch"], log_every=1, snapshots=[1.0], compile=task["compile"]
    )
    finished: list[float] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlowPath)
        train_level(
            denoiser, images, Process(LinearSchedule()), config, Path(folder), width=task["width"], device=device,
            on_first_step=lambda seconds: finished.append(time.time()),
        )  # fmt: skip
    return {"finished": finished[0], "slow": [str(w.message) for w in caught if issubclass(w.category, SlowPath)]}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
