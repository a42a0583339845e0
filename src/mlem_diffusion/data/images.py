"""Pack images into one memory-mapped uint8 array [N,3,H,W] with a manifest, which every later stage reads.

A prepared folder holds images.npy, split.npy and manifest.json. The manifest is removed before the arrays are
replaced, and written last: a failed run leaves an earlier data set as it was, and after a stop at any moment the
folder is whole or has no manifest.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import atomic_write, locked, read_json, write_json
from . import pixels, portraits
from .sources import Source, attempt, download_celeba, open_source, parse_partition, reason

_RESIZE = "Pillow bicubic, antialiased (the filter widens with the reduction), after cropping"
_FORMAT = 2  # version of the prepared folder; part of the fingerprint, so a change prepares the data again
_READ_AHEAD = 64  # files in memory at a time
_AGAIN = "run `make data SOURCE=...` (portraits, download, or a path) to prepare it again"

Progress = Callable[[int, int], None]
Treat = Callable[[Any], tuple[np.ndarray, str]]  # what a source reads -> image [3,S,S] and what was done to it


@dataclass(frozen=True)
class ImageData:
    """Images, a read-only memory map, uint8 [N,3,H,W] (RGB), and split, uint8 [N]: 0 train, 1 valid, 2 test."""

    images: np.ndarray
    split: np.ndarray
    manifest: dict[str, Any]

    def train(self) -> np.ndarray:
        """Indices of the training images."""
        return np.flatnonzero(self.split == 0)

    def held_out(self) -> np.ndarray:
        """Indices of the images that training must not use (valid and test)."""
        return np.flatnonzero(self.split != 0)


def load(destination: Path) -> ImageData:
    """Open a prepared folder; the images stay on disk. Raises UserError if it is missing, incomplete or damaged."""
    manifest = read_json(destination / "manifest.json", _AGAIN)
    try:
        images = np.load(destination / "images.npy", mmap_mode="r", allow_pickle=False)
        split = np.load(destination / "split.npy", allow_pickle=False)
        shape = (manifest["count"], 3, *manifest["size"])
        if (images.shape, images.dtype, split.shape, split.dtype) != (shape, np.uint8, shape[:1], np.uint8):
            raise ValueError(f"the arrays do not have the manifest's shape {list(shape)}")
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"{destination} is damaged or incomplete ({reason(error)}): {_AGAIN}.") from error
    return ImageData(images, split, manifest)


def prepare(
    source: str,
    destination: Path,
    *,
    name: str,
    size: int,
    crop: str = "celeba",
    holdout: int = 1000,
    seed: int = 0,
    count: int | None = None,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack the images of `source` at size x size into `destination` and return the manifest.

    source: "portraits" (embedded), "download" (CelebA through torchvision), or the path of a zip, tar or folder of
    JPEG or PNG files; the first `count` by name are used. crop: "celeba" (aspect ratio 178:218 gives the centred
    square of 148/178 of the width, another the largest), "square" (largest centred square) or "none" (squashed).
    CelebA's official partition is used if its list is inside or next to the source and both sides get images.
    Otherwise `holdout` images drawn with `seed` are held out, half valid and half test. A destination prepared from
    the same source and settings is reused. Raises UserError for wrong input, a full disk, or a destination in use.
    """
    if crop not in ("celeba", "square", "none"):
        raise UserError(f"data.crop={crop} is unknown: use one of celeba, square, none.")
    for key, value, least in (("size", size, 4), ("holdout", holdout, 1), ("count", count or 2, 2), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"data.{key}={value} is too small: it must be at least {least}.")
    settings = {"format": _FORMAT, "name": name, "size": size, "crop": crop, "holdout": holdout, "seed": seed}
    if drawn := source == "portraits":
        count = count or 8000
    with _open(source, destination, count or 0, size, crop, seed) as (opened, treat):
        if count is not None and count > len(opened.images):
            raise UserError(f"data.count={count} is more than the {len(opened.images)} images in {opened.name}.")
        if not drawn:
            settings["partition"] = hashlib.sha256(opened.partition).hexdigest() if opened.partition else None
        origin = {"kind": source if source == "download" else opened.kind, "name": opened.name, "sha256": opened.sha256}
        names = opened.images[:count]
        split, facts = _split(names, opened.partition, holdout, seed)
        manifest = {
            "name": name,
            "size": [size, size],
            "source": origin,
            "crop": crop,
            "resize": f"none: drawn at {size}x{size}" if drawn else _RESIZE,
            "split": facts,
            "fingerprint": _sha256_of({**settings, "count": count, "source": origin}),
        }
        fill = partial(_fill, source=opened, names=names, treat=treat, skip_broken=skip_broken, progress=progress)
        if not (finished := _finished(destination, manifest, skip_broken)):
            with locked(destination, "prepare_data"):  # in the meantime another process may have prepared it
                finished = _finished(destination, manifest, skip_broken) or _pack(destination, manifest, split, fill)
        return finished


@contextmanager
def _open(
    source: str, destination: Path, count: int, size: int, crop: str, seed: int
) -> Iterator[tuple[Source, Treat]]:
    if source == "portraits":
        names = [f"{i:06d}" for i in range(count)]
        sha256 = _sha256_of([portraits.VERSION, count, size, seed])
        drawn = Source(source, f"portraits, version {portraits.VERSION}", names, names, int, sha256)
        yield drawn, lambda i: (portraits.portrait(i, size, seed), f"drawn at {size}x{size}")
        return
    path = download_celeba(destination.parent / "celeba-download") if source == "download" else Path(source)
    with open_source(path.expanduser()) as opened:
        yield opened, partial(pixels.decode, size=size, crop=crop)


def _finished(destination: Path, manifest: dict[str, Any], skip_broken: bool) -> dict[str, Any] | None:
    """The manifest of an earlier preparation with the same result, or None."""
    try:
        earlier = load(destination).manifest
    except UserError:
        return None
    same = earlier.get("fingerprint") == manifest["fingerprint"]
    return earlier if same and (skip_broken or not earlier.get("skipped")) else None


def _pack(destination: Path, manifest: dict[str, Any], split: np.ndarray, fill: Callable) -> dict[str, Any]:
    """Write the three files and return the complete manifest; fill(images): see `_fill`."""

    def write(path: Path) -> None:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (len(split), 3, *manifest["size"]))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now; later, in the memory map, it kills
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        treatment, skipped = fill(images)
        images.flush()
        kept = np.delete(split, list(skipped))
        if skipped:
            images = np.delete(images, list(skipped), axis=0)  # in memory
            with path.open("wb") as file:
                np.save(file, images)
        manifest["split"].update(zip(("train", "valid", "test"), np.bincount(kept, minlength=3).tolist(), strict=True))
        manifest.update(
            count=len(images),
            treatment=treatment,
            split_sha256=hashlib.sha256(kept.tobytes()).hexdigest(),
            skipped=list(skipped.values()),
            **_statistics(images, kept),
        )
        np.save(buffer := io.BytesIO(), kept)  # numpy's own writing to a file hides the error of a full disk
        (destination / "manifest.json").unlink(missing_ok=True)
        atomic_write(destination / "split.npy", lambda path: path.write_bytes(buffer.getvalue()))

    atomic_write(destination / "images.npy", write)
    write_json(destination / "manifest.json", manifest)
    return manifest


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _fill(
    images: np.ndarray, source: Source, names: list[str], treat: Treat, skip_broken: bool, progress: Progress | None
) -> tuple[dict[str, int], dict[int, str]]:
    """Read and treat the named images into images [N,3,S,S]; returns counts of treatments, and broken rows' names."""
    rows = {name: row for row, name in enumerate(names)}
    order = [name for name in source.files if name in rows]
    treatment: Counter[str] = Counter()
    skipped: dict[int, str] = {}
    with ThreadPoolExecutor(8) as pool:  # Pillow and numpy release the interpreter lock
        for start in range(0, len(order), _READ_AHEAD):
            chunk = order[start : start + _READ_AHEAD]
            contents = map(partial(attempt, source.read), chunk)  # by this thread alone: archives are one stream
            for name, result in zip(chunk, pool.map(partial(attempt, treat), contents), strict=True):
                if not isinstance(result, Exception):
                    images[rows[name]], done = result
                    treatment[done] += 1
                elif skip_broken:
                    skipped[rows[name]] = name
                else:
                    raise UserError(
                        f"{name!r} in {source.name} is broken ({reason(result)}): replace it, "
                        "or leave broken images out with data.skip_broken=true."
                    )
                if progress is not None:
                    progress(treatment.total() + len(skipped), len(names))
    if len(skipped) == len(names):
        raise UserError(f"All {len(names)} images in {source.name} are broken.")
    return dict(sorted(treatment.items())), dict(sorted(skipped.items()))


def _split(names: list[str], partition: bytes | None, holdout: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Split uint8 [N] and its record: official if the list gives both sides images, else seeded."""
    note = {}
    if partition:
        official = parse_partition(partition, names)
        if official and 0 < np.count_nonzero(official) < len(names):
            return np.asarray(official, np.uint8), {"method": "official", "seed": None}
        one_side = "the official partition puts all these images on one side"
        note["note"] = one_side if official else "the partition list found names other images"
    if 2 * holdout >= len(names):
        raise UserError(f"data.holdout={holdout} is half or more of the {len(names)} images: hold out fewer.")
    split = np.zeros(len(names), np.uint8)
    chosen = np.random.default_rng(seed).permutation(len(names))[:holdout]
    split[chosen[: holdout // 2]] = 1
    split[chosen[holdout // 2 :]] = 2
    return split, {"method": "seeded", "seed": seed, **note}


def _statistics(images: np.ndarray, split: np.ndarray) -> dict[str, Any]:
    """Mean and rms of the training values in [-1,1] (exact sums, by a histogram), and the SHA256 of the array."""
    training = np.flatnonzero(split == 0)
    if len(training) == 0:
        raise UserError("No training image is left: all were held out or skipped.")
    histogram = sum(np.bincount(images[i].ravel(), minlength=256) for i in training)
    n, first, second = (int((histogram * np.arange(256) ** power).sum()) for power in range(3))
    square = second / n / 127.5**2 - 2 * first / n / 127.5 + 1
    sha256 = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return {"sha256": sha256, "mean": first / n / 127.5 - 1, "rms": float(np.sqrt(max(0.0, square)))}
