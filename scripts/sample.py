"""Levels -> PNGs and a grid, one image per sample seed, with the best sampler of the comparison or a given one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from mlem_diffusion import parallel
from mlem_diffusion.comparison.settings import SamplerSetting, setting_from
from mlem_diffusion.comparison.table import describe
from mlem_diffusion.data.pixels import to_uint8
from mlem_diffusion.diffusion.estimator import Estimator
from mlem_diffusion.diffusion.ledger import Ledger
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import sampler_runs
from mlem_diffusion.experiment.stage import Config, Stage, bar, entry_point, is_mapping, run_stage, shown, to_plain
from mlem_diffusion.figures.image_grid import save_grid
from mlem_diffusion.files import atomic_write, expect_content, read_json, write_json
from mlem_diffusion.models.family import identity_of, level_name, load_family, read_metadata
from mlem_diffusion.multilevel.plan import Plan, load_plans


def parse_seeds(text: str) -> list[int]:
    """ "0-63" or "3,7,100-120" -> sample seeds; UserError for anything else."""
    seeds: list[int] = []
    try:
        for part in str(text).split(","):
            first, dash, last = part.strip().partition("-")
            found = range(int(first), int(last if dash else first) + 1)
            if not found:
                raise ValueError(part)
            seeds += found
    except ValueError as error:
        raise UserError(f"SEEDS={text} is not a list of seeds; write 0-63 or 3,7,100-120.") from error
    return list(dict.fromkeys(seeds))


def choose(stage: Stage) -> tuple[SamplerSetting, float]:
    """The setting to sample with, and the gamma of its probabilities."""
    given = stage.cfg.sampler
    if given != "best":
        if not is_mapping(given):
            raise UserError("sampler must be best, or a setting such as sampler='{dynamics: ode, ...}'.")
        values: Any = to_plain(given)
        try:
            return setting_from(values), float(values.get("gamma", 2.5))
        except KeyError as error:
            raise UserError(f"sampler lacks the key {error}; it takes the columns of compare.csv.") from error
    path = stage.find("best.json")
    if path.is_file():
        again = "run make sample-compare again"
        best = read_json(path, again)
        if stage.cfg.family.callable is None:
            levels = identity_of(read_metadata(stage.checkpoints, stage.cfg.family.widths))
            sampler_runs.check_made_with(stage, best, levels, path, "make sample-compare")
        with expect_content(path, again):
            return setting_from(best), float(best["gamma"])
    print("sample: no comparison has been run, so the sampler is DPM-Solver++(2M) with 20 steps of the largest level.")
    return SamplerSetting("ode", "dpmpp_2m", "single", (level_name(stage.cfg.family.widths[-1]),), 20), 2.5


def plans_of(stage: Stage, setting: SamplerSetting) -> dict[str, Plan]:
    """All plans if the setting names one, else none; UserError if the plans are missing."""
    return load_plans(stage.find("plans.json"))[0] if setting.plan else {}


def load_levels(stage: Stage, setting: SamplerSetting) -> tuple[dict[str, Level], Any, tuple[int, ...]]:
    """The levels by name, their identity, and the shape of an image.

    The training images are needed only if the setting uses the Gaussian denoiser.
    """
    cfg = stage.cfg
    if cfg.family.callable is not None or sampler_runs.GAUSSIAN in setting.levels:
        levels, inputs, shape, _ = sampler_runs.load_levels(stage)
    else:
        loaded = load_family(
            stage.checkpoints,
            cfg.family.widths,
            stage.device,
            cfg.precision,
            compile=cfg.compile,
            batch=cfg.compare.batch,
        )
        inputs = [m["weights_sha256"] for m in read_metadata(stage.checkpoints, cfg.family.widths)]
        levels, shape = {level.name: level for level in loaded}, (3, cfg.data.size, cfg.data.size)
    if shape[0] != 3:
        raise UserError(f"Samples of shape {list(shape)} are not pictures in RGB.")
    return levels, inputs, shape


def draw(
    stage: Stage,
    setting: SamplerSetting,
    estimator: Estimator,
    shape: tuple[int, ...],
    seeds: list[int],
    take: Callable[[dict[int, tuple[torch.Tensor, Ledger]]], object],
) -> None:
    """Sample in batches; collective (parallel.py).

    take(batch number -> uint8 images [B, 3, H, W] and ledger) receives them in order.
    """
    grid, batch = stage.process().grid(setting.steps), stage.cfg.compare.batch

    def one(batch: list[int]) -> tuple[torch.Tensor, Ledger]:
        images, ledger = sample(estimator, grid, setting.dynamics, setting.step_rule, batch, shape, stage.device)
        return to_uint8(images.cpu()), ledger

    parallel.deal([seeds[start : start + batch] for start in range(0, len(seeds), batch)], one, take, stage.should_stop)


def help_draw(stage: Stage, setting: SamplerSetting, gamma: float, seeds: list[int]) -> None:
    """Run `draw` in a process that helps the main one."""
    levels, _, shape = load_levels(stage, setting)
    estimator = setting.build(levels, gamma, plans_of(stage, setting))
    draw(stage, setting, estimator, shape, seeds, lambda found: None)


def work(stage: Stage) -> None:
    cfg, seeds = stage.cfg, parse_seeds(stage.cfg.seeds)
    setting, gamma = choose(stage)
    levels, inputs, shape = load_levels(stage, setting)
    estimator = setting.build(levels, gamma, plans_of(stage, setting))
    fingerprint = stage.fingerprint(("process", "precision"), setting=setting, gamma=gamma, seeds=seeds, inputs=inputs)
    outputs = ["samples/grid.png", *(f"samples/{seed:06d}.png" for seed in seeds)]
    if stage.finished(fingerprint, outputs):
        return
    stage.catch_signals()
    folder, total, parts = stage.results / "samples", Ledger([v.flops for v in estimator.levels]), []
    folder.mkdir(parents=True, exist_ok=True)
    with bar("sample", len(seeds)) as progress:

        def take(found: dict[int, tuple[torch.Tensor, Ledger]]) -> None:
            for number, (pixels, ledger) in found.items():
                for seed, image in zip(seeds[number * cfg.compare.batch :], pixels, strict=False):
                    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                    atomic_write(folder / f"{seed:06d}.png", lambda p, picture=picture: picture.save(p, format="PNG"))
                total.add(ledger)
                parts.append(pixels)
            progress(total.images, len(seeds))

        parallel.ask(help_draw, setting, gamma, seeds)
        draw(stage, setting, estimator, shape, seeds, take)
    save_grid(torch.cat(parts)[:1024], folder / "grid.png", scale=None)
    facts = {
        "gflops": total.flops_per_image / 1e9,
        "seconds": total.seconds_per_image,
        "calls": total.calls_per_image,
    }
    row = {**setting.__dict__, "levels": "+".join(setting.levels)}
    write_json(folder / "samples.json", {"setting": row, "gamma": gamma, "seeds": seeds, "per_image": facts})
    stage.mark_done(fingerprint, stage.hashes(outputs))
    where = shown(folder)
    print(f"sample: {len(seeds)} images in {where}/ with {describe(row)}: ", end="")
    print(f"{facts['gflops']:.3g} GFLOP and {facts['seconds']:.3g} s per image; grid.png shows them.")


def cost(stage: Stage) -> list[tuple[str, float, float]]:
    """Cost of the requested images with the chosen sampler."""
    seeds, (setting, gamma) = parse_seeds(stage.cfg.seeds), choose(stage)
    levels, seconds = sampler_runs.priced_levels(stage)
    estimator, evaluations = (
        setting.build(levels, gamma, plans_of(stage, setting)),
        setting.evaluations(stage.process()),
    )
    counts = zip(estimator.levels, estimator.expected_evaluations(evaluations) * len(seeds), strict=True)
    return [(f"sample with {v.name}", v.flops * count, seconds[v.name] * count) for v, count in counts]


@entry_point("sample")
def main(cfg: Config) -> None:
    run_stage("sample", cfg, work, cost)


if __name__ == "__main__":
    main()
