"""Image sources: a zip, tar or folder of JPEG and PNG files, recognised by content, or CelebA by torchvision.

Archives are never unpacked to disk, so the names inside are only names: files are read into memory, one at a time.
"""

import hashlib
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError, is_out_of_memory
from ..files import sha256_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
PARTITION_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")
Opened = tuple[list[str], Callable[[str], bytes]]  # names of files, in the order of fastest reading, and read(name)


@dataclass(frozen=True)
class Source:
    """Where images come from: files are all names in the order of reading, images those of images, sorted.

    name: for messages and the manifest; sha256: of the whole; partition: CelebA's list inside or beside, else None.
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
    """Open a zip, tar or folder. Raises UserError if it is missing or damaged, or has no image inside."""
    kind = _kind_of(path)
    with ExitStack() as stack:
        try:
            files, read = {"zip": _open_zip, "tar": _open_tar, "folder": _open_folder}[kind](path, stack)
        except Exception as error:  # damaged archives raise almost any exception
            what = "cannot be read" if kind == "folder" else f"is no archive, or a truncated or damaged {kind} archive"
            raise UserError(f"{path.name} {what} ({reason(error)}): copy or download it again.") from error
        visible = [name for name in files if not _is_hidden(name)]
        images = sorted(name for name in visible if name.lower().endswith(IMAGE_SUFFIXES))
        if not images:
            raise UserError(f"{path.name} holds no JPEG or PNG image (files seen: {len(visible)}).")
        lists = sorted(name for name in visible if PurePosixPath(name).name in PARTITION_NAMES)
        partition = _partition(path, lists, read)
        sha256 = _folder_sha256(sorted(images + lists), read) if kind == "folder" else sha256_of(path)
        yield Source(kind, path.resolve().name, visible, images, read, sha256, partition)


def reason(error: BaseException) -> str:
    """The text of an exception on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def attempt(function: Callable[[Any], Any], argument: Any) -> Any:
    """function(argument), or the exception that it raises; an exception as the argument is passed on."""
    if isinstance(argument, Exception):
        return argument
    try:
        return function(argument)
    except Exception as error:  # damaged files raise almost any exception
        if is_out_of_memory(error):
            raise
        return error


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a zip, a tar or a folder of JPEG or PNG images.")
    with path.open("rb") as file:
        return "zip" if file.read(2) == b"PK" else "tar"


def _is_hidden(name: str) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def _open_zip(path: Path, stack: ExitStack) -> Opened:
    archive = stack.enter_context(zipfile.ZipFile(path))
    files = dict.fromkeys(name for name in archive.namelist() if not name.endswith("/"))
    return list(files), archive.read  # of members that share a name, read gives the last


def _open_tar(path: Path, stack: ExitStack) -> Opened:
    archive: Any = stack.enter_context(tarfile.open(path))  # noqa: SIM115
    # Links are followed inside the archive. Of members that share a name, the last counts, as when unpacking.
    members = {member.name: member for member in archive if member.isreg() or member.issym() or member.islnk()}
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end marker is missing")  # tarfile takes a cut between two files for the end
    files = sorted(members, key=lambda name: members[name].offset)  # one pass over a compressed tar
    return files, lambda name: archive.extractfile(members[name]).read()


def _open_folder(path: Path, stack: ExitStack) -> Opened:
    def refuse(error: OSError) -> None:
        raise error

    def read(name: str) -> bytes:
        if not (path / name).is_file():  # to read a pipe would block
            raise OSError("not a regular file or a link to one")
        return (path / name).read_bytes()

    walk = os.walk(path, onerror=refuse)
    return sorted(
        (Path(folder, name)).relative_to(path).as_posix() for folder, _, names in walk for name in names
    ), read


def _folder_sha256(names: list[str], read: Callable[[str], bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in zip(names, map(partial(attempt, read), names), strict=True):
        known = b"unreadable" if isinstance(content, Exception) else f"{len(content)}\0".encode() + content
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape") + known)
    return digest.hexdigest()


def _partition(path: Path, inside: list[str], read: Callable[[str], bytes]) -> bytes | None:
    """The content of CelebA's partition list inside the source, else beside it, else None."""
    beside = [file for name in PARTITION_NAMES if (file := path.absolute().parent / name).is_file()]
    try:
        if inside:
            return read(inside[0])
        return beside[0].read_bytes() if beside else None
    except Exception as error:  # a seeded split instead would give another data set
        where = f"{(inside or beside)[0]} of {path.name} is broken ({reason(error)})"
        raise UserError(f"{where}: fetch it again, or remove it for a seeded split.") from error


def parse_partition(content: bytes, names: list[str]) -> list[int] | None:
    """CelebA's split (0 train, 1 valid, 2 test) of each name, or None if the list has none of these images.

    Names are matched without folder and extension. Raises UserError if only some of the images are listed.
    """
    listed = {}
    for line in content.decode("utf-8", "replace").splitlines():
        fields = re.split(r"[,\s]+", line.strip())
        if len(fields) >= 2 and fields[1] in ("0", "1", "2"):
            listed[PurePosixPath(fields[0]).stem] = int(fields[1])
    split = [listed.get(PurePosixPath(name).stem) for name in names]
    found = [part for part in split if part is not None]
    if 0 < len(found) < len(names):
        raise UserError(
            f"The partition list has only {len(found)} of {len(names)} images, not {names[split.index(None)]!r}: "
            "fetch list_eval_partition.txt again, or remove it for a seeded split."
        )
    return found or None


def download_celeba(folder: Path) -> Path:
    """Fetch CelebA's aligned images and partition list, unless they are there, with torchvision's checksums.

    Returns the path of the zip. Raises UserError on any failure.
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
            "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in a browser, and run "
            f"`make data SOURCE=path/to/{wanted[0]}` (the list beside it)."
        ) from error
    return folder / wanted[0]
