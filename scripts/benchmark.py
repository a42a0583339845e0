"""Speed of this repository on this device -> results/benchmark/<device model>.json and a table."""

import re
import time

import torch

from mlem_diffusion.benchmark.parts import measure, parts_of
from mlem_diffusion.benchmark.table import Row, compared, report
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.environment import commit, device_model, package_version, shown
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.files import write_json


@stage(folder="benchmark")
def main(exp: Experiment) -> None:
    usual, name = "full" if exp.device.type == "cuda" else "small", exp.cfg.benchmark.size
    name = usual if name == "auto" else name
    if name not in ("full", "small"):
        raise UserError(f"benchmark.size={name} is unknown; expected auto, full or small.")
    size = exp.cfg.benchmark[name]
    head = {
        "device": device_model(exp.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if exp.device.type == "cuda" else None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "size": name,
        "settings": exp.plain("benchmark")["benchmark"][name],
        "resolution": size.resolution,
        "timing": "torch.utils.benchmark, median, random weights and data, compared networks in turns",
        "diffusers": package_version("diffusers"),
    }
    words = head["device"] if name == usual else f"{head['device']} {name}"
    path = exp.results / f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')}.json"
    old = exp.read(path.name, "delete it") if path.is_file() and not exp.cfg.force else {}
    same = all(old.get(key) == head[key] for key in ("torch", "cuda", "settings"))

    def save(rows: list[Row]) -> None:
        write_json(path, {**head, "rows": compared(rows)})
        exp.print(f"{rows[-1]['part']}: measured")

    parts = parts_of(size, exp.process, exp.device)
    rows = measure(parts, old["rows"] if same else [], save, exp.should_stop)
    exp.print(report({**head, "rows": compared(rows)}))
    exp.print(f"benchmark: see {shown(path)} (ARGS=force=true measures finished parts again).")


if __name__ == "__main__":
    main()
