"""The levels that an experiment trains, and their settings: the family, and its cheapest levels from other seeds."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from ..errors import UserError
from ..models.family import at_width, level_name, repeat_name
from ..training.loop import TrainConfig
from .stage import Stage, build


def repeated(stage: Stage) -> list[tuple[int, int]]:
    """(width, training seed) of the levels that are trained again (gamma.repeats); UserError for invalid settings."""
    options, widths = stage.cfg.gamma.repeats, list(stage.cfg.family.widths)
    seeds, count = list(options.seeds), int(options.levels)
    if stage.cfg.train.seed in seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"gamma.repeats.seeds = {seeds} must differ from each other and from train.seed.")
    if seeds and not 0 <= count < len(widths):
        raise UserError(f"gamma.repeats.levels = {count} must be less than the number of levels, {len(widths)}.")
    return [(width, seed) for width in widths[:count] for seed in seeds]


def names(stage: Stage) -> list[str]:
    """Names of the checkpoint folders: the family's levels, cheap to expensive, then the levels trained again."""
    family = [level_name(width) for width in stage.cfg.family.widths]
    return family + [repeat_name(level_name(width), seed) for width, seed in repeated(stage)]


def describe(stage: Stage, data_rms: float = 0.5) -> list[dict[str, Any]]:
    """The facts on each of these levels before training; "train_seed" marks a level that is trained again."""
    family = stage.describe_levels(data_rms)
    by_width = {level["width"]: level for level in family}
    again = [
        {**by_width[width], "name": repeat_name(level_name(width), seed), "train_seed": seed}
        for width, seed in repeated(stage)
    ]
    return family + again


def settings(stage: Stage, level: dict[str, Any]) -> dict[str, Any]:
    """This level's training settings: train, with train.narrow applied."""
    train: Any = OmegaConf.to_container(stage.cfg.train, resolve=True)
    found = at_width(train, level["width"])
    return found | ({"seed": level["train_seed"]} if "train_seed" in level else {})


def train_config(stage: Stage, level: dict[str, Any]) -> TrainConfig:
    return build(OmegaConf.create(settings(stage, level)))
