"""Pictures of chosen sample seeds with one sampler."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.level import Ledger, joined
from ..diffusion.process import TimeGrid
from ..diffusion.sampler import Estimator, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from ..files import atomic_write

GRID = 1024  # the most images in a grid


def parse_seeds(text: str) -> list[int]:
    """ "0-63" or "3,7,100-120" -> sample seeds; UserError for anything else."""
    try:
        parts = [[int(end) for end in part.split("-")] for part in str(text).split(",")]
    except ValueError:
        parts = []
    if not parts or any(len(part) > 2 or part[0] > part[-1] for part in parts):
        raise UserError(f"SEEDS={text} is not a list of seeds; write 0-63 or 3,7,100-120.")
    return list(dict.fromkeys(seed for part in parts for seed in range(part[0], part[-1] + 1)))


def draw(
    estimator: Estimator, rule: StepRule, grid: TimeGrid, seeds: Sequence[int], batch: int, shape: tuple[int, ...],
    device: torch.device, folder: Path, progress: Callable[[int, int], object],
) -> tuple[Ledger, Tensor]:  # fmt: skip
    """Write folder/<seed>.png; the ledger, and the first images as uint8 [at most GRID, 3, H, W].

    Ranks share the batches, and all get the whole result. progress(images done, images of this rank).
    """
    if shape[0] != 3:
        raise UserError(f"Samples of shape {list(shape)} are not pictures in RGB.")
    starts, found = parallel.mine(range(0, len(seeds), batch)), {}
    for start in starts:
        own = seeds[start : start + batch]
        images, ledger = sample(estimator, rule, grid, BrownianPath(own, shape, device))
        pixels = to_uint8(images.cpu())
        for seed, image in zip(own, pixels, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            atomic_write(folder / f"{seed:06d}.png", lambda path, p=picture: p.save(path, format="PNG"))
        found[start] = ledger, pixels[: max(0, GRID - start)]
        progress(len(found) * batch, len(starts) * batch)
    ledgers, parts = zip(*parallel.gather(found).values(), strict=True)
    return joined(ledgers), torch.cat(parts)
