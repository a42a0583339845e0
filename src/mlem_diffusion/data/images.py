"""Pack images into one memory-mapped uint8 array [N,3,H,W] with a manifest, which every later stage reads.
A prepared folder holds images.npy, split.npy and manifest.json. The manifest is removed before the arrays are replaced,
and written last: a failed run leaves earlier data as they were; after any stop the folder is whole or lacks it."""

import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import parallel
from ..errors import UserError
from ..files import atomic_write, locked, read_json, where_possible, write_json
from . import pixels, portraits
from .sources import Source, open_source, parts_of, readable, reason

_FORMAT = 2  # version of the prepared folder; part of the fingerprint, so a change prepares the data again
_READ_AHEAD = 64  # files in memory at a time
_AGAIN = "run `make data SOURCE=...` (portraits, download, or a path) to prepare it again"

Pixels = Iterator[tuple[int, np.ndarray, str]]  # row, image [3,S,S] and what was done to it
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageData:
    """Images, a read-only memory map, uint8 [N,3,H,W] (RGB), and split, uint8 [N]: 0 train, 1 valid, 2 test."""

    images: np.ndarray
    split: np.ndarray
    manifest: dict[str, Any]

    def train(self) -> np.ndarray:
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


def prepare(source: str, destination: Path, cfg: Mapping[str, Any], workers: int, progress: Progress) -> dict[str, Any]:
    """Pack the images of `source` into `destination` and return the manifest; a folder prepared alike is reused.
    source: "portraits" (embedded; drawn by `workers` processes), "download" (CelebA through torchvision), or the path
    of a zip, tar or folder of images. cfg: name, size, count (the first by name are used; None: all), crop, holdout,
    seed, within the bounds of experiment/checks.py. crop: "celeba" (aspect ratio 178:218 gives the centred square of
    148/178 of the width, another the largest), "square" (largest centred square) or "none" (squashed). CelebA's
    official partition is used if its list is inside or next to the source and both sides get images. Otherwise
    `holdout` images drawn with `seed` are held out, half valid and half test. The manifest's `notes` say why a list is
    not used, and what files are passed over. Raises UserError for wrong input, a full disk, or a destination in use."""
    name, size, seed = cfg["name"], cfg["size"], cfg["seed"]
    settings = {"format": _FORMAT, **{key: cfg[key] for key in ("name", "size", "crop", "holdout", "seed")}}
    drawn, count = source == "portraits", cfg["count"]
    if drawn:
        count = count or 8000
        sha256 = _sha256_of([portraits.VERSION, count, size, seed])
        names = [f"{i:06d}" for i in range(count)]
        opening: Any = nullcontext(Source(source, f"portraits, version {portraits.VERSION}", names, sha256))
    else:
        opening = open_source(source, destination.parent / "celeba-download")
    with opening as opened, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # on metadata, without the name of the file
        names = sorted(opened.images)[:count]
        if len(names) < (count or 0):
            raise UserError(f"data.count={count} is more than the {len(names)} images in {opened.name}.")
        if not drawn:
            settings["partition"] = hashlib.sha256(opened.partition[1]).hexdigest() if opened.partition else None
        if not opened.plain:  # other images than earlier versions found in the same archive
            settings["images"] = names
        split, method, note = _split(names, opened.partition, cfg["holdout"], seed)
        manifest: dict[str, Any] = {"name": name, "count": len(names), "size": [size, size], "crop": cfg["crop"]}
        manifest["source"] = {"kind": opened.kind, "name": opened.name, "sha256": opened.sha256}
        sides = zip(("train", "valid", "test"), np.bincount(split, minlength=3).tolist(), strict=True)
        manifest["split"] = {"method": method, **dict(sides)}
        manifest["notes"] = [text for text in (note, opened.passed_over) if text]
        manifest["fingerprint"] = _sha256_of({**settings, "count": count, "source": manifest["source"]})
        if finished := _finished(destination, manifest):
            return finished
        found = _drawn(count, size, seed, workers) if drawn else _decoded(opened, names, size, cfg["crop"])
        with locked(destination, "prepare_data"):
            if finished := _finished(destination, manifest):  # by another process in the meantime
                return finished
            _pack(destination, manifest, split, found, progress)
        return manifest


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _split(names: list[str], partition: Any, holdout: int, seed: int) -> tuple[np.ndarray, str, str]:
    """Split uint8 [N], its method (official if CelebA's list gives both sides images, else seeded), and why not."""
    label, content = partition or ("", b"")
    official = parts_of(names, content, label) if partition else []
    if 0 < np.count_nonzero(official) < len(names):
        return np.asarray(official, np.uint8), "official", ""
    if 2 * holdout >= len(names):
        raise UserError(f"data.holdout={holdout} is half or more of the {len(names)} images: hold out fewer.")
    split = np.zeros(len(names), np.uint8)
    chosen = np.random.default_rng(seed).permutation(len(names))[:holdout]
    split[chosen[: holdout // 2]] = 1
    split[chosen[holdout // 2 :]] = 2
    note = f"{label} {'has these images on one side only' if official else 'has none of these images'}"
    return split, "seeded", note if partition else ""


def _finished(destination: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an earlier preparation with the same result, with the notes of this one, or None."""
    try:
        earlier = load(destination).manifest
    except UserError:
        return None
    same = all(earlier.get(key) == manifest[key] for key in ("fingerprint", "split"))
    return {**earlier, "notes": manifest["notes"]} if same else None


def _drawn(count: int, size: int, seed: int, workers: int) -> Pixels:
    for row, image in parallel.run(partial(portraits.portrait, size=size, seed=seed), range(count), workers):
        yield row, image, f"drawn at {size}x{size}"


def _decoded(source: Source, names: list[str], size: int, crop: str) -> Pixels:
    """Decode the named files of a source; UserError for a broken one."""
    rows = {name: row for row, name in enumerate(names)}
    order = [name for name in source.images if name in rows]

    def decode(name: str, content: bytes) -> tuple[int, np.ndarray, str]:
        with readable(name, source.name):
            return rows[name], *pixels.decode(content, size, crop)

    with ThreadPoolExecutor(8) as pool:  # Pillow releases the interpreter lock
        for start in range(0, len(order), _READ_AHEAD):
            chunk = order[start : start + _READ_AHEAD]
            yield from pool.map(decode, chunk, map(source.read, chunk))  # read by this thread: archives are one stream


def _pack(destination: Path, manifest: dict[str, Any], split: np.ndarray, found: Pixels, progress: Progress) -> None:

    def write(path: Path) -> None:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (len(split), 3, *manifest["size"]))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now; later, in the memory map, it kills
            with path.open("r+b") as file, where_possible():
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        treatment: Counter[str] = Counter()
        for row, image, done in found:
            images[row] = image
            treatment[done] += 1
            progress(treatment.total(), len(split))
        images.flush()
        manifest["treatment"] = dict(sorted(treatment.items()))
        manifest["sha256"] = hashlib.sha256(images.data).hexdigest()
        # root mean square of the training images as values in [-1, 1], from exact sums
        histogram = sum(np.bincount(images[i].ravel(), minlength=256) for i in np.flatnonzero(split == 0))
        n, first, second = (int((histogram * np.arange(256) ** power).sum()) for power in range(3))
        manifest["rms"] = float(np.sqrt(max(0.0, second / n / 127.5**2 - 2 * first / n / 127.5 + 1)))
        np.save(buffer := io.BytesIO(), split)  # numpy's own writing to a file hides the error of a full disk
        (destination / "manifest.json").unlink(missing_ok=True)
        atomic_write(destination / "split.npy", lambda path: path.write_bytes(buffer.getvalue()))

    atomic_write(destination / "images.npy", write)
    write_json(destination / "manifest.json", manifest)
