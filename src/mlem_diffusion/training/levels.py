"""The levels that an experiment trains, their settings, and the folder of each: checkpoints/<experiment>/<level>/.
A folder holds state.pt (to resume), ema.safetensors, ema-<images>.safetensors at the snapshots, claim.json (what is
trained here) and, once the level is fully trained, metadata.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import expect_content, read_json, write_json
from ..models.family import AGAIN, at_width, check_weights, level_name, load_state, taught_name, weights_of

STATE, CLAIM, METADATA = "state.pt", "claim.json", "metadata.json"


@dataclass(frozen=True)
class TrainConfig:
    """Training settings of one level. Lengths are in images seen, not steps."""

    images: int = 2_000_000
    batch: int = 256
    accumulate: int = 1  # micro-batches per step, if a batch does not fit in memory: same draws, same updates
    lr: float = 2e-3  # with reference_channels in the first layer; else lr * sqrt(reference_channels / channels)
    reference_channels: int = 16
    warmup_images: int = 20_000
    decay_fraction: float = 0.4  # linear decay to zero over this last fraction
    ema_halflife: int = 100_000  # images
    ema_ramp: float = 0.05  # largest half-life as a fraction of the images seen so far (Karras et al. 2022)
    clip: float = 1.0
    flips: bool = True
    # [mean, sd]: half of the noise levels from this normal distribution in log-SNR, half along the sampler's path
    focus: list[float] | None = None
    warm_start: bool = True  # of a level with a teacher: from the level of its width that was trained on data
    seed: int = 0
    snapshots: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # fractions with saved EMA weights
    log_every: int = 10_000  # images
    save_every: float = 120.0  # seconds between resume states
    precision: str = "auto"  # "auto": bf16 on CUDA, else float32; "float32"; "autocast"; "bf16" (see step.py)
    compile: str = "auto"  # "auto": on CUDA only; "on"; "off"; "max": tuned kernels
    graph: str = "auto"  # steps as CUDA graphs; "auto": on CUDA with one process and no dropout; "on"; "off"

    def __post_init__(self) -> None:
        if not self.snapshots or min(self.snapshots) <= 0 or max(self.snapshots) != 1:
            raise UserError(f"train.snapshots = {list(self.snapshots)} must be fractions in (0, 1] that include 1.")
        if self.focus is not None and (len(self.focus) != 2 or self.focus[1] <= 0):
            raise UserError(f"train.focus = {list(self.focus)} must be a mean and a standard deviation above 0.")


def repeated(cfg: Any) -> list[tuple[int, int]]:
    """(width, training seed) of the levels that are trained again (gamma.repeats); UserError for invalid settings."""
    options, widths = cfg.gamma.repeats, list(cfg.family.widths)
    seeds, count = list(options.seeds), int(options.levels)
    if cfg.train.seed in seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"gamma.repeats.seeds = {seeds} must differ from each other and from train.seed.")
    if seeds and not 0 <= count < len(widths):
        raise UserError(f"gamma.repeats.levels = {count} must be less than the number of levels, {len(widths)}.")
    return [(width, seed) for width in widths[:count] for seed in seeds]


def taught_widths(cfg: Any) -> list[int]:
    """The widths of the levels that the largest one teaches; UserError if they are not narrower ones of the family."""
    found, widths = list(cfg.train.teacher.widths), list(cfg.family.widths)
    if not set(found) <= set(widths[:-1]):
        raise UserError(f"train.teacher.widths = {found} must be widths of the family below the largest, {widths}.")
    return found


def level_names(cfg: Any) -> list[str]:
    """The names of a family's levels: those trained on images, cheap to expensive, then those with a teacher."""
    return [*map(level_name, cfg.family.widths), *map(taught_name, taught_widths(cfg))]


def planned(cfg: Any, family: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The levels to train: the described levels of the family, then those trained again from another seed.
    "train_seed" marks a level that is trained again. With cfg.only (names), only these; UserError for unknown names."""
    by_width = {level["width"]: level for level in family if "teacher" not in level}
    again = [{**by_width[width], "name": level_name(width, seed), "train_seed": seed} for width, seed in repeated(cfg)]
    levels = {level["name"]: level for level in family + again}
    if cfg.only is None:
        return list(levels.values())
    only = [cfg.only] if isinstance(cfg.only, str) else list(cfg.only)
    if not only or not levels.keys() >= set(only):
        raise UserError(f"only={cfg.only} must name levels of the family, which has {', '.join(levels)}.")
    return [level for name, level in levels.items() if name in only]


def settings(train: Mapping[str, Any], level: Mapping[str, Any]) -> dict[str, Any]:
    """The training settings of one level: with train.narrow and train.teacher applied, and with its own seed."""
    teacher = {key: value for key, value in train.get("teacher", {}).items() if key != "widths"}
    own = at_width({key: value for key, value in train.items() if key != "teacher"}, level["width"])
    own |= at_width(teacher, level["width"]) if "teacher" in level else {}
    return own | ({"seed": level["train_seed"]} if "train_seed" in level else {})


def training_flops(level: Mapping[str, Any], images: int) -> tuple[float, float]:
    """FLOPs of training a described level on so many images: its own, and its teacher's. A backward pass costs two
    forward passes. A warm start's own training and the Gaussian denoiser are not in them."""
    return 3.0 * level["flops"] * images, level.get("teacher", {}).get("flops", 0.0) * images


def is_trained(folder: Path, fingerprint: str, overwrite: bool = False) -> bool:
    """Whether the level was fully trained with this configuration; UserError for damaged files, unless overwrite."""
    path = folder / METADATA
    if not path.is_file():
        return False
    try:
        metadata = read_json(path, AGAIN)
        with expect_content(path, AGAIN):
            if metadata["fingerprint"] != fingerprint:
                return False
            files = [weights_of(metadata), *(weights_of(metadata, i) for i in range(len(metadata["snapshots"])))]
        for file, sha256 in files:
            check_weights(folder / file, sha256)
    except UserError:
        if not overwrite:
            raise
        return False
    return True


def claim(folder: Path, fingerprint: str, overwrite: bool = False) -> None:
    """Prepare the level's folder to begin training or to resume it; UserError if it holds another level. With
    overwrite, files of another level and damaged files give way. The caller holds the folder's lock."""
    marker = folder / CLAIM
    try:
        if marker.is_file() and read_json(marker, AGAIN)["fingerprint"] != fingerprint:
            text = f"{folder} holds a level of another configuration or data set; give this run another name (name=...)"
            raise UserError(f"{text}, or ARGS=overwrite=true to train it anew.")
        if overwrite:  # what training resumes from
            for file, sha256 in (load_state(folder / STATE) or {}).get("snapshots", {}).items():
                check_weights(folder / file, sha256)
    except UserError:
        if not overwrite:
            raise
        for file in folder.iterdir():
            if file.name != ".lock":
                file.unlink()
    write_json(marker, {"fingerprint": fingerprint})
