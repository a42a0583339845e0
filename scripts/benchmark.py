"""Speed of this repository on this device -> results/benchmark/<device model>.json and a table."""

from __future__ import annotations

import time
from typing import Any

import torch

from mlem_diffusion.benchmark import record, table
from mlem_diffusion.benchmark.plan import Part, chosen, parts_of, run_parts
from mlem_diffusion.benchmark.timing import described
from mlem_diffusion.errors import Interrupted, UserError
from mlem_diffusion.experiment.stage import (
    Config,
    Stage,
    bar,
    commit,
    device_model,
    duration,
    entry_point,
    package_version,
    run_stage,
    shown,
    to_plain,
    to_yaml,
)


def usual_size(stage: Stage) -> str:
    return "full" if stage.device.type == "cuda" else "small"


def plan(stage: Stage) -> tuple[str, dict[str, Any], list[Part]]:
    """The size's name, its settings, and the parts."""
    cfg = stage.cfg
    name = usual_size(stage) if cfg.size == "auto" else str(cfg.size)
    if name not in cfg.sizes:
        raise UserError(f"size={name} is unknown; expected auto, {' or '.join(map(str, cfg.sizes))}.")
    size: Any = to_plain(cfg.sizes[name])
    unet: Any = to_plain(cfg.unet)
    return name, size, parts_of(size, stage.process(), unet, list(cfg.family.widths), stage.device)


def work(stage: Stage) -> None:
    cfg = stage.cfg
    name, size, parts = plan(stage)
    torch.set_float32_matmul_precision("highest")  # float32 rows use full float32, not TF32
    model = device_model(stage.device)
    head = {
        "device": model,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if stage.device.type == "cuda" else None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "size": name,
        "sizes": size,
        "resolution": size["resolution"],
        "timing": described(stage.device, size["repeats"]),
        "diffusers": package_version("diffusers"),
    }
    file = record.file_name(model, "" if name == usual_size(stage) else name)
    results = record.Results(stage.results / file, head, [p.name for p in parts])
    code = record.code_digest()
    results.load({p.name: p.settings for p in parts}, code, cfg.any_code)
    wanted = chosen(parts, list(cfg.only))
    if cfg.force:
        for part in wanted:
            results.cached.pop(part.name, None)
    todo = [p for p in wanted if not results.finished(p.name)]
    total = round(sum(p.seconds for p in todo))
    if stage.cfg.dry_run:
        for part in wanted:
            when = "measured before" if results.finished(part.name) else f"about {duration(part.seconds)}"
            print(f"{part.name:<28} {when}{', if there is time' if part.optional else ''}")
        print(f"estimated cost of benchmark, size {name}: about {duration(total)} on {model}")
        return
    stage.catch_signals()
    spent = 0.0

    def time_left(minutes: float | None) -> float | None:
        return None if minutes is None else 60 * minutes - (time.monotonic() - stage.started)

    with bar("benchmark", total, unit="s") as progress:

        def done(part: Part, found: record.Found) -> None:
            nonlocal spent
            spent += part.seconds
            progress(min(round(spent), total), total)
            cached = results.cached[part.name]
            progress.tqdm.write(f"{part.name}: {len(found.rows)} rows, {cached.seconds:.0f} s")

        complete = run_parts(
            wanted,
            results,
            device=stage.device,
            code=code,
            commit=head["commit"],
            spare=lambda: time_left(size["minutes"]),
            seconds_left=lambda: time_left(cfg.max_minutes),
            should_stop=stage.should_stop,
            done=done,
        )
    if not complete:
        left = sum(not results.finished(p.name) for p in wanted)
        raise Interrupted(f"stopped with {left} of {len(wanted)} parts left")
    if not todo:
        print("benchmark: everything has been measured before (ARGS=force=true measures again).")
    print(table.report(results.document()))
    print(f"benchmark: see {shown(results.path)}")


@entry_point("benchmark")
def main(cfg: Config) -> None:
    cfg.name = "benchmark"  # one folder for all devices
    planning, cfg.dry_run = cfg.dry_run, False

    def measure_or_plan(stage: Stage) -> None:
        stage.cfg.dry_run = planning
        if planning:
            print(to_yaml(stage.plain()))
        work(stage)

    run_stage("benchmark", cfg, measure_or_plan)


if __name__ == "__main__":
    main()
