"""Pack images into one memory-mapped uint8 array [N,3,H,W] with a manifest, which every later stage reads.

A prepared folder holds images.npy, split.npy (uint8 [N]: 0 train, 1 valid, 2 test) and manifest.json. The manifest is
written last and removed before the array is replaced: a failed run leaves an earlier data set as it was, and after a
stop at any moment the folder is whole or has no manifest.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from ..files import Damaged, atomic_write, locked, read_json, write_json
from . import portraits, sources

CROPS = ("celeba", "square", "none")
RESIZE = "Pillow bicubic, antialiased (the filter widens with the reduction), after cropping"
DEFAULT_PORTRAITS = 8000  # number of images that the embedded source draws if `count` is not given
_FORMAT = 2  # version of the prepared folder; part of the fingerprint, so a change prepares the data again
_ASPECT = 178 / 218  # width : height of aligned CelebA images
_THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_AGAIN = "run `make data SOURCE=...` (portraits, download, or a path) to prepare it again"

Progress = Callable[[int, int], None]
Fill = Callable[[np.ndarray], tuple[Counter[str], list[int]]]


@dataclass(frozen=True)
class ImageData:
    """A prepared data set.

    images: read-only memory map, uint8 [N,3,H,W] (RGB); split: uint8 [N], 0 train, 1 valid, 2 test.
    """

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
    """Open a prepared folder; the images stay on disk, memory-mapped.

    Raises UserError if it is missing, incomplete or damaged, or if its arrays have not the manifest's shapes.
    """
    destination = Path(destination)
    manifest = read_json(destination / "manifest.json", _AGAIN)
    try:
        images = np.load(destination / "images.npy", mmap_mode="r", allow_pickle=False)
        split = np.load(destination / "split.npy", allow_pickle=False)
        shape = (manifest["count"], 3, *manifest["size"])
        found = (images.shape, images.dtype, split.shape, split.dtype)
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        text = f"The prepared data set {destination} is damaged ({sources.reason(error)}): {_AGAIN}."
        raise Damaged(destination / "images.npy", text) from error
    if found != (shape, np.uint8, shape[:1], np.uint8):
        text = f"The prepared data set {destination} does not agree with its manifest {list(shape)}: {_AGAIN}."
        raise Damaged(destination / "images.npy", text)
    return ImageData(images, split, manifest)


# ---------------------------------------------------------------------------------------------- prepare


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

    source: "portraits" (embedded), "download" (CelebA through torchvision), or the path of a zip, tar or
    folder of JPEG or PNG files, read in the order of their names; only the first `count` are used.
    crop: "celeba" (frames of aspect ratio 178:218 give the centred square of 148/178 of the width, others
    their largest centred square), "square" (largest centred square) or "none" (full frame, squashed).
    CelebA's official partition is used if its list is inside or next to the source and both the training and the
    held-out part get images. Otherwise `holdout` images drawn with `seed` are held out, half valid and half test.
    progress(done, total) counts images and is called in the calling thread.
    A destination prepared from the same source with the same settings is reused.
    Raises UserError for wrong input, a full disk, or a destination that cannot be written or is in use.
    """
    destination = Path(destination).resolve()
    if crop not in CROPS:
        raise UserError(f"data.crop={crop} is unknown: use one of {', '.join(CROPS)}.")
    for key, value, least in (("size", size, 4), ("holdout", holdout, 1), ("count", count or 2, 2)):
        if value < least:
            raise UserError(f"data.{key}={value} is too small: it must be at least {least}.")
    settings = {"format": _FORMAT, "name": name, "size": size, "crop": crop, "holdout": holdout, "seed": seed}
    facts = {"name": name, "size": [size, size], "crop": crop, "resize": RESIZE}
    if source == "portraits":
        count = count or DEFAULT_PORTRAITS
        sha256 = _sha256_of([portraits.VERSION, count, size, seed])
        facts["source"] = {"kind": source, "name": f"portraits, version {portraits.VERSION}", "sha256": sha256}
        facts["resize"] = f"none: drawn at {size}x{size}"
        facts["fingerprint"] = _sha256_of({**settings, "count": count, "source": facts["source"]})
        split = _split([str(i) for i in range(count)], None, holdout, seed)
        return _pack(destination, facts, [], *split, functools.partial(_draw, seed, progress), skip_broken)
    path = Path(source).expanduser()
    if source == "download":
        path = sources.download_celeba(destination.parent / "celeba-download")
    with sources.open_source(path) as opened:
        kind = source if source == "download" else opened.kind
        facts["source"] = {"kind": kind, "name": path.resolve().name, "sha256": opened.sha256()}
        settings["partition"] = hashlib.sha256(opened.partition).hexdigest() if opened.partition else None
        facts["fingerprint"] = _sha256_of({**settings, "count": count, "source": facts["source"]})
        if count is not None and count > len(opened.images):
            raise UserError(f"data.count={count} is more than the {len(opened.images)} images in {path.name}.")
        names = opened.images[:count]
        split = _split(names, opened.partition, holdout, seed)
        fill = functools.partial(_treat_all, opened, names, crop, skip_broken, progress)
        return _pack(destination, facts, names, *split, fill, skip_broken)


def _pack(
    destination: Path, facts: dict, names: list[str], split: np.ndarray, split_facts: dict, fill: Fill, skip: bool
) -> dict[str, Any]:
    """Write the three files, unless they are there already; returns the manifest.

    facts: of the manifest, with size and fingerprint; fill(images [N,3,H,W]) writes the images and returns the counts
    of their treatments and the rows of broken images, which are left out.
    """
    if (finished := _finished(destination, facts["fingerprint"], skip)) is not None:
        return finished
    with locked(destination, "prepare_data"):
        if (finished := _finished(destination, facts["fingerprint"], skip)) is not None:  # by another process meanwhile
            return finished
        manifest = dict(facts)

        def write(path: Path) -> None:
            images = _create(path, len(split), facts["size"][0])
            treatment, skipped = fill(images)
            if skipped:
                images = _without(images, skipped, path)
            images.flush()
            kept = np.delete(split, skipped)
            train, valid, test = (int(n) for n in np.bincount(kept, minlength=3))
            manifest.update(
                {
                    "count": len(images),
                    "treatment": dict(sorted(treatment.items())),
                    "split": {**split_facts, "train": train, "valid": valid, "test": test},
                    **_statistics(images, kept),
                    "split_sha256": hashlib.sha256(kept.tobytes()).hexdigest(),
                    "skipped": [names[row] for row in skipped],
                }
            )
            np.save(buffer := io.BytesIO(), kept)  # numpy's own writing to a file hides the error of a full disk
            (destination / "manifest.json").unlink(missing_ok=True)
            atomic_write(destination / "split.npy", lambda path: path.write_bytes(buffer.getvalue()))

        atomic_write(destination / "images.npy", write)
        write_json(destination / "manifest.json", manifest)
    return manifest


def _finished(destination: Path, fingerprint: str, skip_broken: bool) -> dict[str, Any] | None:
    """The manifest of an earlier preparation with the same result, or None."""
    try:
        manifest = load(destination).manifest
    except UserError:
        return None
    same = manifest.get("fingerprint") == fingerprint
    return manifest if same and (skip_broken or not manifest.get("skipped")) else None


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _split(names: list[str], partition: bytes | None, holdout: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Split uint8 [N] and its record: official if the list gives both sides images, else seeded."""
    note = {}
    if partition:
        official = sources.parse_partition(partition, names)
        if official is not None and 0 < np.count_nonzero(official) < len(names):
            return np.asarray(official, np.uint8), {"method": "official", "seed": None}
        one_side = "the official partition puts all these images on one side"
        note = {"note": "the partition list found names other images" if official is None else one_side}
    if 2 * holdout >= len(names):
        raise UserError(f"data.holdout={holdout} is half or more of the {len(names)} images: hold out fewer.")
    split = np.zeros(len(names), np.uint8)
    chosen = np.random.default_rng(seed).permutation(len(names))[:holdout]
    split[chosen[: holdout // 2]] = 1
    split[chosen[holdout // 2 :]] = 2
    return split, {"method": "seeded", "seed": seed, **note}


def _statistics(images: np.ndarray, split: np.ndarray) -> dict[str, Any]:
    """Mean and root mean square of the training values in [-1,1] (exact sums), and the array's SHA256."""
    digest, n, first, second = hashlib.sha256(), 0, 0, 0
    for start in range(0, len(images), 512):
        block = np.ascontiguousarray(images[start : start + 512])
        digest.update(block.tobytes())
        values = block[split[start : start + 512] == 0].astype(np.uint32)
        n, first = n + values.size, first + int(values.sum(dtype=np.uint64))
        second += int((values * values).sum(dtype=np.uint64))
    if n == 0:
        raise UserError("No training image is left: all were held out or skipped.")
    square = second / n / 127.5**2 - 2 * first / n / 127.5 + 1
    return {"sha256": digest.hexdigest(), "mean": first / n / 127.5 - 1, "rms": float(np.sqrt(max(0.0, square)))}


# ------------------------------------------------------------------------------------------ many images


def _create(path: Path, count: int, size: int) -> np.memmap:
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, size, size))
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now; later, in the memory map, it kills the process
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def _without(images: np.ndarray, skipped: list[int], path: Path) -> np.memmap:
    """The array at `path` again, without some rows."""
    good = np.delete(np.arange(len(images)), skipped)
    shorter = path.with_name(f".shorter{path.name}")
    result = _create(shorter, len(good), images.shape[-1])
    for row, old in enumerate(good):
        result[row] = images[old]
    os.replace(shorter, path)
    return result


def _side_by_side(jobs: Iterable[tuple[int, Callable[[], Any]]]) -> Iterator[tuple[int, Future]]:
    """Run (key, job) on threads (numpy and Pillow release the interpreter lock); yields (key, future) in order.

    Few jobs wait at a time, so that large files are not read far ahead."""
    pool = ThreadPoolExecutor(_THREADS)
    waiting: deque[tuple[int, Future]] = deque()
    try:
        for key, job in jobs:
            waiting.append((key, pool.submit(job)))
            if len(waiting) > 4 * _THREADS:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(seed: int, progress: Progress | None, images: np.ndarray) -> tuple[Counter[str], list[int]]:
    """Draw portraits into images [N,3,S,S], in batches of 64."""
    count, size = len(images), images.shape[-1]
    starts = range(0, count, 64)
    jobs = ((i, functools.partial(portraits.render, min(64, count - i), size, seed, i)) for i in starts)
    for start, batch in _side_by_side(jobs):
        end = min(start + 64, count)
        images[start:end] = batch.result()
        if progress:
            progress(end, count)
    return Counter({f"drawn at {size}x{size}": count}), []


def _treat_all(
    source: sources.Source, names: list[str], crop: str, skip: bool, progress: Progress | None, images: np.ndarray
) -> tuple[Counter[str], list[int]]:
    """Decode the named images into images [N,3,S,S]; returns counts of treatments and the rows of broken images."""
    rows = {name: row for row, name in enumerate(names)}
    treatment: Counter[str] = Counter()
    skipped: list[int] = []

    def jobs() -> Iterator[tuple[int, Callable[[], Any]]]:
        for name in source.files:
            if name in rows:
                yield rows[name], functools.partial(_decode, _content(source, name), images.shape[-1], crop)

    for row, result in _side_by_side(jobs()):
        try:
            images[row], done = result.result()
            treatment[done] += 1
        except _BrokenImage as problem:
            if not skip:
                raise UserError(
                    f"{names[row]!r} in {source.path.name} is broken ({problem}): replace it, or leave "
                    f"broken images out with data.skip_broken=true."
                ) from None
            skipped.append(row)
        if progress:
            progress(treatment.total() + len(skipped), len(names))
    if len(skipped) == len(names):
        raise UserError(f"All {len(names)} images in {source.path.name} are broken.")
    return treatment, sorted(skipped)


# -------------------------------------------------------------------------------------------- one image


class _BrokenImage(Exception):
    pass


def _content(source: sources.Source, name: str) -> bytes | Exception:
    try:
        return source.read(name)
    except Exception as error:  # damaged archives raise almost any exception
        return error


def _decode(content: bytes | Exception, size: int, crop: str) -> tuple[np.ndarray, str]:
    """The image [3,size,size] of a file's content and its treatment; _BrokenImage also if the file was not readable."""
    try:
        if isinstance(content, Exception):
            raise content
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            rgb = _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged images raise almost any exception, and Pillow refuses those of absurd size
        raise _BrokenImage(sources.reason(error)) from error
    treated, done = treat(rgb, size, crop)
    return np.asarray(treated).transpose(2, 0, 1), done


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright RGB: apply the EXIF orientation, put transparency on white, scale 16-bit grey to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def treat(image: Image.Image, size: int, crop: str) -> tuple[Image.Image, str]:
    """Crop and resize an RGB image to size x size; returns it with a description of the treatment.

    An image that already has the target size is returned unchanged. Fractional offsets are rounded down.
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image, f"already {size}x{size}: unchanged"
    if crop == "none" and width != height:
        done = "whole frame squashed to a square"
    elif crop == "celeba" and _celeba_shaped(width, height):
        done = "aspect ratio 178:218: centred square of 148/178 of the width"
        image = _centre(image, round(width * 148 / 178))
    elif width == height:
        done = "square: whole frame"
    else:
        done = "largest centred square" if crop == "square" else "other aspect ratio: largest centred square"
        image = _centre(image, min(width, height))
    if image.size == (size, size):
        return image, f"{done}, not resized"
    verb = "enlarged" if min(image.size) < size else "reduced"
    return image.resize((size, size), Image.Resampling.BICUBIC), f"{done}, {verb} to {size}x{size}"


def _celeba_shaped(width: int, height: int) -> bool:
    """True if the ratio is 178:218 within 0.6%, or if rounding a scaled 178x218 to integers can give this size."""
    if abs(width / height / _ASPECT - 1) <= 0.006:
        return True
    low, high = max((width - 0.5) / 178, (height - 0.5) / 218), min((width + 0.5) / 178, (height + 0.5) / 218)
    return low <= high and width != height


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
