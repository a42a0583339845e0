"""PNGs of samples, in a folder that holds nothing else: tools for FID read whole folders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .. import parallel
from ..data.pixels import to_uint8
from ..diffusion.brownian import BrownianPath
from ..diffusion.process import TimeGrid
from ..diffusion.sampler import Estimator, sample
from ..diffusion.step_rules import StepRule
from ..errors import UserError
from ..files import atomic_write, write_text

_SIGNATURE = PngInfo()
_SIGNATURE.add_text("Software", "mlem-diffusion")
_SIGNED, _HEADER = b"Software\0mlem-diffusion", 128  # the signature is in the first bytes of the file
_MOST = 10_000_000  # seeds


def parse_seeds(text: str) -> list[int]:
    """ "0-63" or "3,7,100-120" -> sample seeds; UserError for anything else."""
    try:
        parts = [[int(end) for end in part.split("-")] for part in str(text).split(",")]
    except ValueError:
        parts = []
    if not parts or any(len(part) > 2 or part[0] > part[-1] for part in parts):
        raise UserError(f"SEEDS={text} is not a list of seeds; write 0-63 or 3,7,100-120.")
    if max(part[-1] for part in parts) >= 1 << 64 or sum(part[-1] - part[0] + 1 for part in parts) > _MOST:
        raise UserError(f"SEEDS={text} is too large: seeds are below 2^64, and at most {_MOST:,} at a time.")
    return list(dict.fromkeys(seed for part in parts for seed in range(part[0], part[-1] + 1)))


def file_names(seeds: Sequence[int]) -> list[str]:
    """The names of the pictures; sorted by name they are sorted by seed."""
    return [f"{seed:0{max(6, len(str(max(seeds))))}d}.png" for seed in seeds]


def begin(folder: Path, grid: Path, started: Path, key: str) -> None:
    """Prepare a folder for `draw`: remove the pictures that it wrote there before, unless this run continues a stopped
    one with the same key. Raises UserError, and removes nothing, if the folder holds a file that `draw` did not write.

    grid: the last file that a run writes; it is removed too. started: the file that keeps the key."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    ours = [path for path in paths if _is_ours(path)]
    if foreign := sorted(path.name for path in set(paths).difference(ours) if not path.name.startswith(".")):
        text = f"{folder} holds files that make sample did not write ({foreign[0]}), and tools for FID would read them"
        raise UserError(f"{text}: move them elsewhere.")
    if started.is_file() and started.read_bytes() == key.encode() and not grid.is_file():
        ours = [path for path in ours if path.suffix == ".partial"]
    for path in (grid, *ours):
        path.unlink(missing_ok=True)
    write_text(started, key)


def _is_ours(path: Path) -> bool:
    if path.suffix == ".partial":  # of a writer that was killed
        return path.name.startswith(".")
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _SIGNED in file.read(_HEADER)


def draw(
    estimator: Estimator, rule: StepRule, grid: TimeGrid, seeds: Sequence[int], batch: int,
    path_of: Callable[[Sequence[int]], BrownianPath], decode: Callable[[Tensor], Tensor] | None,
    folder: Path, progress: Callable[[int, int], object],
) -> None:  # fmt: skip
    """Write the picture of each seed, [3, H, W], but for batches that are there; ranks share the batches. path_of: the
    paths of seeds. decode: as for `sample`.
    progress(images done, images of this rank) may raise Interrupted."""
    names, starts = file_names(seeds), parallel.mine(range(0, len(seeds), batch))
    missing = [i for i in starts if not all((folder / name).is_file() for name in names[i : i + batch])]
    for done, start in enumerate(missing, len(starts) - len(missing) + 1):
        own = slice(start, start + batch)
        pixels = to_uint8(sample(estimator, rule, grid, path_of(seeds[own]), decode)[0].cpu())
        for name, image in zip(names[own], pixels, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            atomic_write(folder / name, lambda path, p=picture: p.save(path, format="PNG", pnginfo=_SIGNATURE))
        progress(done * batch, len(starts) * batch)


def read_pictures(paths: Sequence[Path]) -> np.ndarray:
    """Pictures of one size as uint8 [N, 3, H, W]."""
    return np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
