"""Image sources: a zip, tar or folder of JPEG and PNG files, recognised by content, or CelebA by torchvision.

Archives are never unpacked to disk: files are read into memory, one at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from ..files import sha256_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
PARTITION_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")
_CELEBA_PAGE = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"

# An opened archive or folder: names of its files, in the order in which they are read fastest; read(name); close()
Opened = tuple[list[str], Callable[[str], bytes], Callable[[], object]]


@dataclass(frozen=True)
class Source:
    """Where images come from.

    kind: "zip", "tar", "folder", ...; name: for messages and the manifest; files: names in the order of reading;
    images: the images among them, sorted; read(name): the content of a file, or the exception if it is damaged;
    sha256: of the whole source; partition: CelebA's partition list inside or next to the source, else None.
    """

    kind: str
    name: str
    files: list[str]
    images: list[str]
    read: Callable[[str], Any]
    sha256: str
    partition: bytes | None = None


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a zip, tar or folder. Raises UserError if it is missing, damaged or hostile, or has no image inside."""
    kind = _kind_of(path)
    try:
        files, read, close = {"zip": _open_zip, "tar": _open_tar, "folder": _open_folder}[kind](path)
    except UserError:
        raise
    except Exception as error:  # damaged archives raise almost any exception
        what = "cannot be read" if kind == "folder" else f"is no archive, or a truncated or damaged {kind} archive"
        raise UserError(f"{path.name} {what} ({reason(error)}): copy or download it again.") from error

    def read_or_error(name: str) -> bytes | Exception:
        try:
            return read(name)
        except Exception as error:
            return error

    try:
        visible = [name for name in files if not _is_hidden(name)]
        images = sorted(name for name in visible if name.lower().endswith(IMAGE_SUFFIXES))
        if not images:
            raise UserError(f"{path.name} holds no JPEG or PNG image (files seen: {len(visible)}).")
        lists = sorted(name for name in visible if PurePosixPath(name).name in PARTITION_NAMES)
        partition = _partition(path, lists, read)
        sha256 = _folder_sha256(sorted(images + lists), read_or_error) if kind == "folder" else sha256_of(path)
        yield Source(kind, path.resolve().name, visible, images, read_or_error, sha256, partition)
    finally:
        close()


def reason(error: BaseException) -> str:
    """The text of an exception on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a zip, a tar or a folder of JPEG or PNG images.")
    with path.open("rb") as file:
        return "zip" if file.read(2) == b"PK" else "tar"


def _is_hidden(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part == "__MACOSX" or part.startswith(".") for part in parts)


def _open_zip(path: Path) -> Opened:
    archive = zipfile.ZipFile(path)
    for info in archive.infolist():
        _check_member(path, info.filename)
    files = dict.fromkeys(name for name in archive.namelist() if not name.endswith("/"))
    return list(files), archive.read, archive.close  # of members that share a name, read gives the last


def _open_tar(path: Path) -> Opened:
    archive = tarfile.open(path)  # noqa: SIM115
    file: Any = archive.fileobj
    members: dict[str, Any] = {}
    for member in archive:
        _check_member(path, member.name, member.isreg() or member.isdir())
        if member.isreg():
            members[member.name] = member  # of members that share a name, the last counts, as when unpacking
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a cut between two files for the end
        raise tarfile.ReadError("its end marker is missing")
    files = sorted(members, key=lambda name: members[name].offset)  # one pass over a compressed tar
    return files, lambda name: archive.extractfile(members[name]).read(), archive.close  # type: ignore


def _open_folder(path: Path) -> Opened:
    def refuse(error: OSError) -> None:
        raise error

    def read(name: str) -> bytes:
        if not (path / name).is_file():  # to read a pipe would block
            raise OSError("not a regular file or a link to one")
        return (path / name).read_bytes()

    files = []
    for folder, _, names in os.walk(path, onerror=refuse):
        files += [(Path(folder) / name).relative_to(path).as_posix() for name in names]
    return sorted(files), read, lambda: None


def _check_member(path: Path, name: str, plain: bool = True) -> None:
    outside = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name)
    if outside or not plain:
        what = "a path that leads out of the archive" if outside else "a link, a device or a pipe"
        raise UserError(f"{path.name} holds {name!r}, {what}: pack plain image files under relative names.")


def _folder_sha256(names: list[str], read: Callable[[str], Any]) -> str:
    digest = hashlib.sha256()
    for name in names:
        content = read(name)
        known = b"unreadable" if isinstance(content, Exception) else f"{len(content)}\0".encode() + content
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape") + known)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- CelebA


def _partition(path: Path, inside: list[str], read: Callable[[str], bytes]) -> bytes | None:
    """The content of CelebA's partition list inside the source, else beside it, else None."""
    beside = [file for name in PARTITION_NAMES if (file := path.absolute().parent / name).is_file()]
    try:
        if inside:
            return read(inside[0])
        return beside[0].read_bytes() if beside else None
    except Exception as error:  # a seeded split instead would give another data set
        raise UserError(
            f"{(inside or beside)[0]} of {path.name} is broken ({reason(error)}): fetch it again, "
            "or remove it for a seeded split."
        ) from error


def parse_partition(content: bytes, names: list[str]) -> list[int] | None:
    """CelebA's split (0 train, 1 valid, 2 test) of each name, or None if the list has none of these images.

    Names are matched without folder and extension. Raises UserError if only some of the images are listed.
    """
    listed = {}
    for line in content.decode("utf-8", "replace").splitlines():
        fields = re.split(r"[,\s]+", line.strip())
        if len(fields) >= 2 and fields[1] in ("0", "1", "2"):
            listed[PurePosixPath(fields[0]).stem] = int(fields[1])
    split = {name: listed[stem] for name in names if (stem := PurePosixPath(name).stem) in listed}
    if 0 < len(split) < len(names):
        missing = next(name for name in names if name not in split)
        raise UserError(
            f"The partition list has only {len(split)} of {len(names)} images, not {missing!r}: "
            "fetch list_eval_partition.txt again, or remove it for a seeded split."
        )
    return list(split.values()) or None


def download_celeba(folder: Path) -> Path:
    """Fetch CelebA's aligned images and partition list, with torchvision's addresses and checksums.

    Files that are there already are not fetched again. Returns the path of the zip. Raises UserError on any failure.
    """
    wanted = ("img_align_celeba.zip", "list_eval_partition.txt")
    try:
        from torchvision.datasets import CelebA
        from torchvision.datasets.utils import download_file_from_google_drive

        for file_id, md5, name in CelebA.file_list:
            if name in wanted:
                download_file_from_google_drive(file_id, str(folder), name, md5)
    except Exception as error:  # a quota page, no network, no gdown: the remedy is the same
        raise UserError(
            f"CelebA could not be downloaded ({reason(error).rstrip('.')}): fetch {' and '.join(wanted)} from "
            f"{_CELEBA_PAGE} in a browser, and run `make data SOURCE=path/to/{wanted[0]}` (the list beside it)."
        ) from error
    return folder / wanted[0]
