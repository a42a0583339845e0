"""Pack images into one memory-mapped uint8 array [N,3,H,W] with a manifest, which every later stage reads.

A prepared folder holds images.npy, split.npy (uint8 [N]: 0 train, 1 valid, 2 test) and manifest.json. All three
are written to a temporary folder next to it and moved in place at the end, the manifest last. A failed or
interrupted run leaves no half-written array and does not damage an earlier one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..errors import UserError
from ..files import Damaged, is_the_systems, read_json, write_json
from . import portraits, sources

CROPS = ("celeba", "square", "none")
RESIZE = "Pillow bicubic, antialiased (the filter widens with the reduction), after cropping"
DEFAULT_PORTRAITS = 8000  # number of images that the embedded source draws if `count` is not given
_FORMAT = 2  # version of the prepared folder; part of the fingerprint, so a change prepares the data again
_ASPECT = 178 / 218  # width : height of aligned CelebA images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageData:
    """A prepared data set.

    images: read-only memory map, uint8 [N,3,H,W] (RGB); split: uint8 [N], 0 train, 1 valid, 2 test.
    """

    images: np.ndarray
    split: np.ndarray
    manifest: dict

    def train(self) -> np.ndarray:
        """Indices of the training images."""
        return np.flatnonzero(self.split == 0)

    def held_out(self) -> np.ndarray:
        """Indices of the images that training must not use (valid and test)."""
        return np.flatnonzero(self.split != 0)


# ------------------------------------------------------------------------------------ prepare and load


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
) -> dict:
    """Pack the images of `source` at size x size into `destination` and return the manifest.

    source: "portraits" (embedded), "download" (CelebA through torchvision), or the path of a zip, tar or
    folder of JPEG or PNG files, read in the order of their names; only the first `count` are used.
    crop: "celeba" (frames of aspect ratio 178:218 give the centred square of 148/178 of the width, others
    their largest centred square), "square" (largest centred square) or "none" (full frame, squashed).
    CelebA's official partition is used if its list is inside or next to the source and both the training and the
    held-out part get images. Otherwise `holdout` images drawn with `seed` are held out, half valid and half test.
    progress(done, total) counts images and is called in the calling thread.
    A destination prepared from the same source with the same settings is reused. If several processes prepare one
    destination, one does the work and the others wait.
    Raises UserError for wrong input, a full disk, or a destination that cannot be written.
    """
    destination = Path(destination)
    if destination.is_symlink():  # it may point to another disk, and files can be moved in place only within one
        destination = destination.resolve()
    if crop not in CROPS:
        raise UserError(f"data.crop={crop} is unknown: use one of {', '.join(CROPS)}.")
    for key, value, least in (("size", size, 4), ("holdout", holdout, 1), ("count", count or 2, 2)):
        if value < least:
            raise UserError(f"data.{key}={value} is too small: it must be at least {least}.")
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file: move it away, the prepared data need a folder of that name.")

    settings = {"format": _FORMAT, "name": name, "size": size, "crop": crop, "holdout": holdout, "seed": seed}
    if source == "portraits":
        count = count or DEFAULT_PORTRAITS
        path, kind = None, "portraits"
        sha256 = _sha256_of([portraits.VERSION, count, size, seed])
        origin = {"kind": kind, "name": f"portraits, version {portraits.VERSION}", "sha256": sha256}
    else:
        path = Path(source).expanduser()
        if source == "download":
            path = sources.download_celeba(destination.parent / "celeba-download")
        kind = sources.kind_of(path)
        sha256 = sources.source_sha256(path, kind)
        shown = "download" if source == "download" else kind
        origin = {"kind": shown, "name": path.resolve().name, "sha256": sha256}
        beside = sources.partition_beside(path)
        settings["partition"] = hashlib.sha256(beside.read_bytes()).hexdigest() if beside else None
    fingerprint = _sha256_of({**settings, "count": count, "source": origin})
    manifest = _prepared_before(destination, fingerprint, skip_broken)
    if manifest is not None:
        return manifest

    listed = sources.open_source(path, kind) if path else None
    available = len(listed.names) if listed else (count or 0)
    if count is not None and count > available:
        raise UserError(f"data.count={count} is more than the {available} images in {origin['name']}.")
    names = listed.names[:count] if listed else []
    total = count or available
    split, split_record = _split(names, listed.partition_list if listed else None, total, holdout, seed)

    with _alone(destination):
        manifest = _prepared_before(destination, fingerprint, skip_broken)
        if manifest is not None:  # another process has prepared it in the meantime
            return manifest
        with _workspace(destination, total * (3 * size * size + 1)) as folder:
            if listed:
                treatment, skipped = _pack(folder, listed, names, size, crop, skip_broken, progress)
                split = np.delete(split, skipped)
            else:
                _draw(folder, total, size, seed, progress)
                treatment, skipped = {f"drawn at {size}x{size}": total}, []
            images = np.load(folder / "images.npy.partial", mmap_mode="r")
            np.save(buffer := io.BytesIO(), split)  # numpy's own file writing hides the error of a full disk
            (folder / "split.npy").write_bytes(buffer.getvalue())
            parts = np.bincount(split, minlength=3)
            split_record |= {part: int(n) for part, n in zip(("train", "valid", "test"), parts, strict=True)}
            mean, rms, array_sha256 = _statistics(images, split)
            manifest = {
                "name": name,
                "count": len(images),
                "size": [size, size],
                "source": origin,
                "crop": crop,
                "treatment": dict(sorted(treatment.items())),
                "resize": RESIZE if listed else f"none: drawn at {size}x{size}",
                "split": split_record,
                "sha256": array_sha256,
                "split_sha256": hashlib.sha256(split.tobytes()).hexdigest(),
                "mean": mean,
                "rms": rms,
                "skipped": [names[row] for row in skipped],
                "fingerprint": fingerprint,
            }
            write_json(folder / "manifest.json", manifest)
            _publish(folder, destination)
    return manifest


def load(destination: Path) -> ImageData:
    """Open a prepared folder and check its files by hash; the images stay on disk, memory-mapped.

    Raises UserError if it is missing or incomplete, or if its files do not agree with the manifest.
    """
    destination = Path(destination)
    again = "run `make data SOURCE=...` (portraits, download, or a path) to prepare it again"
    missing = [f for f in ("manifest.json", "images.npy", "split.npy") if not (destination / f).is_file()]
    if missing:
        state = "is incomplete" if len(missing) < 3 else "does not exist"
        raise UserError(f"The prepared data set {destination} {state} (no {', '.join(missing)}): {again}.")
    try:
        manifest = read_json(destination / "manifest.json", again)
        images = np.load(destination / "images.npy", mmap_mode="r")
        split = np.load(destination / "split.npy")
        shape = (manifest["count"], 3, *manifest["size"])
        found = images.shape, images.dtype, split.shape
    except UserError:
        raise
    except Exception as error:  # damaged headers raise almost any exception
        if is_the_systems(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The prepared data set {destination} is damaged ({reason}): {again}.") from error
    if found != (shape, np.uint8, shape[:1]):
        raise UserError(
            f"The prepared data set {destination} does not agree with its manifest (images "
            f"{list(images.shape)} {images.dtype}, split {list(split.shape)}, "
            f"manifest {list(shape)}): {again}."
        )
    for name, array, sha256 in (("images", images, manifest["sha256"]), ("split", split, manifest["split_sha256"])):
        if _array_sha256(array) != sha256:
            file = destination / f"{name}.npy"
            raise Damaged(file, f"{file} is damaged, its SHA256 differs from the manifest: {again}.")
    return ImageData(images, split, manifest)


def _array_sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(array), 512):
        digest.update(array[start : start + 512].tobytes())
    return digest.hexdigest()


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _prepared_before(destination: Path, fingerprint: str, skip_broken: bool) -> dict | None:
    """The manifest of an earlier preparation with the same result, or None."""
    try:
        manifest = load(destination).manifest
    except UserError:
        return None
    same = manifest.get("fingerprint") == fingerprint
    return manifest if same and (skip_broken or not manifest.get("skipped")) else None


# ------------------------------------------------------------------------------------------- one image


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
        done, side = "aspect ratio 178:218: centred square of 148/178 of the width", round(width * 148 / 178)
        image = _centre(image, side)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright RGB: apply the EXIF orientation, put transparency on white, scale 16-bit grey to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class _BrokenImage(Exception):
    pass


# Limits of one image, above any usual camera picture; decoding takes about ten bytes per pixel.
_MAX_PIXELS, _MAX_SIDE = 64_000_000, 32_768
_MAX_WAITING = 256 << 20  # bytes of image files read ahead of the decoders


def _open_image(data: bytes) -> Image.Image:
    """Open a JPEG or PNG image; Image.open would warn about large images, and one thread cannot silence that."""
    if data.startswith(b"\x89PNG"):
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    elif data.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    else:
        raise _BrokenImage("not a JPEG or PNG image")
    width, height = image.size
    if width * height > _MAX_PIXELS or max(width, height) > _MAX_SIDE:
        raise _BrokenImage(f"{width}x{height} pixels are more than the limit for one image")
    return image


def _decode(data: bytes, size: int, crop: str) -> tuple[np.ndarray, str]:
    try:
        image = _open_image(data)
        if image.format == "PNG":
            # Loading ignores the checksums of the pixel data: a flipped bit could give another picture silently.
            image.verify()
            image = _open_image(data)
        with image:
            rgb = _to_rgb(image)
    except (MemoryError, _BrokenImage):
        raise
    except Exception as error:  # damaged files raise almost any exception
        raise _BrokenImage(sources.reason(error)) from error
    treated, done = treat(rgb, size, crop)
    return np.asarray(treated).transpose(2, 0, 1), done


# ----------------------------------------------------------------------------------------- many images


def _workers() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _pack(
    folder: Path,
    source: sources.Source,
    names: list[str],
    size: int,
    crop: str,
    skip_broken: bool,
    progress: Progress | None,
) -> tuple[Counter[str], list[int]]:
    """Decode the named images into folder/images.npy.partial; returns counts of treatments and skipped rows."""
    images = _create(folder / "images.npy.partial", len(names), size)
    rows = {name: row for row, name in enumerate(names)}
    treatment: Counter[str] = Counter()
    skipped: list[int] = []

    def finish(name: str, result: Future | str) -> None:
        try:
            if isinstance(result, str):
                raise _BrokenImage(result)
            images[rows[name]], done = result.result()
            treatment[done] += 1
        except _BrokenImage as problem:
            if not skip_broken:
                raise UserError(
                    f"{sources.shown(name)} in {source.path.name} is broken ({problem}): replace it, or leave "
                    f"broken images out with data.skip_broken=true."
                ) from None
            skipped.append(rows[name])
        except MemoryError as error:
            raise UserError(
                f"{sources.shown(name)} in {source.path.name} cannot be decoded, memory ran out: close other programs."
            ) from error
        if progress:
            progress(treatment.total() + len(skipped), len(names))

    pool = ThreadPoolExecutor(_workers())  # Pillow releases the interpreter lock while it decodes and resizes
    try:
        waiting: deque[tuple[str, Future | str, int]] = deque()
        ahead = 0
        for member in sources.read_members(source, names):
            job = member.problem if member.data is None else pool.submit(_decode, member.data, size, crop)
            waiting.append((member.name, job, len(member.data or b"")))
            ahead += waiting[-1][2]
            while len(waiting) > 16 * _workers() or ahead > _MAX_WAITING:
                name, result, length = waiting.popleft()
                finish(name, result)
                ahead -= length
        while waiting:
            finish(*waiting.popleft()[:2])
    finally:
        pool.shutdown(cancel_futures=True)
    if len(skipped) == len(names):
        raise UserError(f"All {len(names)} images in {source.path.name} are broken.")
    images.flush()
    if skipped:
        _drop_rows(folder / "images.npy.partial", images, skipped)
    return treatment, sorted(skipped)


def _drop_rows(path: Path, images: np.ndarray, skipped: list[int]) -> None:
    good = np.delete(np.arange(len(images)), skipped)
    shorter = path.with_name("images.npy.shorter")
    target = _create(shorter, len(good), images.shape[-1])
    for first in range(0, len(good), 4096):
        target[first : first + 4096] = images[good[first : first + 4096]]
    target.flush()
    os.replace(shorter, path)


def _draw(folder: Path, count: int, size: int, seed: int, progress: Progress | None) -> None:
    images = _create(folder / "images.npy.partial", count, size)
    starts = range(0, count, 64)
    with ThreadPoolExecutor(_workers()) as pool:
        batches = pool.map(lambda start: portraits.render(min(64, count - start), size, seed, start), starts)
        for start, batch in zip(starts, batches, strict=True):
            images[start : start + len(batch)] = batch
            if progress:
                progress(start + len(batch), count)
    images.flush()


def _split(
    names: list[str], partition_list: bytes | None, total: int, holdout: int, seed: int
) -> tuple[np.ndarray, dict]:
    """Split uint8 [total] and its record: official if the list gives both sides images, else seeded."""
    note = ""
    official = sources.parse_partition(partition_list, names) if partition_list else None
    if partition_list and official is None:
        note = "the partition list found names other images"
    if official is not None:
        split = np.asarray(official, np.uint8)
        if 0 < np.count_nonzero(split) < total:
            return split, {"method": "official", "seed": None}
        note = "the official partition puts all these images on one side"
    if 2 * holdout >= total:
        raise UserError(f"data.holdout={holdout} is half or more of the {total} images: hold out fewer.")
    split = np.zeros(total, np.uint8)
    chosen = np.random.default_rng(seed).permutation(total)[:holdout]
    split[chosen[: holdout // 2]] = 1
    split[chosen[holdout // 2 :]] = 2
    return split, {"method": "seeded", "seed": seed} | ({"note": note} if note else {})


def _statistics(images: np.ndarray, split: np.ndarray) -> tuple[float, float, str]:
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
    mean = first / n / 127.5 - 1
    return (
        mean,
        float(np.sqrt(max(0.0, second / n / 127.5**2 - 2 * first / n / 127.5 + 1))),
        digest.hexdigest(),
    )


# --------------------------------------------------------------------------------------- files on disk


def _create(path: Path, count: int, size: int) -> np.memmap:
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, size, size))
    if hasattr(os, "posix_fallocate"):
        # Reserve the blocks now: a full disk raises an error, but later, in the memory map, it kills the process.
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
    return images


@contextmanager
def _workspace(destination: Path, needed: int) -> Iterator[Path]:
    """A temporary folder next to the destination, removed at the end; its write errors become UserErrors."""
    parent, prefix = destination.absolute().parent, f".{destination.name}.partial-{socket.gethostname()}-"
    folder = parent / f"{prefix}{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f"{prefix}*"):  # left by killed runs
            if not _alive(stale.name.removeprefix(prefix)) or stale == folder:
                shutil.rmtree(stale, ignore_errors=True)
        free = shutil.disk_usage(parent).free
        if free < needed + 2**20:
            raise UserError(
                f"Not enough disk space in {parent}: the packed images need slightly more than {needed / 1e6:.1f} MB, "
                f"but {free / 1e6:.1f} MB are free."
            )
        folder.mkdir()
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk that holds {parent} is full: the packed images need {needed / 1e6:.1f} MB."
            ) from error
        raise UserError(f"{destination} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Let one process in at a time, also across machines that share the disk; no lock if the system has none."""
    path = destination.absolute().parent / f".{destination.name}.lock"
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while file is None:
            file = path.open("w")
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            try:  # the previous holder may have removed the file that we locked: open the new one
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False
            if not same:
                file.close()
                file = None
    except OSError:
        pass  # no locks, or no permission to write, which the preparation itself will report
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _publish(folder: Path, destination: Path) -> None:
    """Move the finished files in place.

    The old manifest is removed first and the new one moved last: after a stop in between, the folder is incomplete.
    """
    destination.mkdir(exist_ok=True)
    (destination / "manifest.json").unlink(missing_ok=True)
    os.replace(folder / "images.npy.partial", destination / "images.npy")
    os.replace(folder / "split.npy", destination / "split.npy")
    os.replace(folder / "manifest.json", destination / "manifest.json")
