"""Speed of this repository on this device -> results/benchmark/<device model>.json and a table."""

import re
import time

import torch

from mlem_diffusion.benchmark import measure, parts_of, report
from mlem_diffusion.experiment.config import commit, device_model, package_version
from mlem_diffusion.experiment.stage import Experiment, stage


@stage(folder="benchmark")
def main(exp: Experiment) -> None:
    usual, size = "full" if exp.device.type == "cuda" else "small", exp.cfg.benchmark.size
    size = usual if size == "auto" else size
    cfg = exp.cfg.benchmark[size]
    head = {
        "device": device_model(exp.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if exp.device.type == "cuda" else None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "size": size,
        "settings": exp.plain("benchmark")["benchmark"][size],
        "resolution": cfg.resolution,
        "timing": "torch.utils.benchmark, median, random weights and data, compared networks in turns",
        "diffusers": package_version("diffusers"),
    }
    words = head["device"] if size == usual else f"{head['device']} {size}"
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')}.json"
    parts = parts_of(cfg, exp.process, exp.device)
    with exp.progress("benchmark", len(parts), unit="part") as progress:
        rows = measure(parts, progress, lambda rows: exp.save(name, {**head, "rows": rows}))
    exp.print(report({**head, "rows": rows}))


if __name__ == "__main__":
    main()
