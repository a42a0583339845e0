"""Image sources: a zip, tar or folder of JPEG and PNG files, recognised by content, or CelebA by torchvision.

Archives are never unpacked to disk, so the names inside are only names: files are read into memory, one at a time."""

import hashlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError, is_out_of_memory
from ..files import sha256_of

_PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
_PARTITION_LINE = re.compile(r"^\s*([^,\s]+)[, \t]+([012])\b", re.MULTILINE)  # name and part
_HIDDEN = re.compile(r"(^|/)(__MACOSX/|\.[^./])")


@dataclass(frozen=True)
class Source:
    """Where images come from: their names in the order of reading, and read(name), the content of a file.

    name: for messages and the manifest; sha256: of the whole; partition: CelebA's list inside or beside, else None."""

    kind: str
    name: str
    images: list[str]
    sha256: str
    read: Any = None
    partition: bytes | None = None


@contextmanager
def open_source(source: str, downloads: Path) -> Iterator[Source]:
    """Open the zip, tar or folder at a path; "download" fetches CelebA into `downloads`. Raises UserError if it is
    missing or damaged, or has no image inside."""
    path = download_celeba(downloads) if source == "download" else Path(source).expanduser()
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"{path} does not exist: give a zip, a tar or a folder of JPEG or PNG images.")
    with ExitStack() as stack:
        try:
            kind, files, raw = _open(path, stack)
        except Exception as error:  # damaged archives raise almost any exception
            what = "cannot be read" if path.is_dir() else "is no archive, or a truncated or damaged one"
            raise UserError(f"{path.name} {what} ({reason(error)}): copy or download it again.") from error

        def read(name: str) -> bytes:
            with readable(name, path.name):
                return raw(name)

        visible = [name for name in files if not _HIDDEN.search(name)]
        images = [name for name in visible if name.lower().endswith((".jpg", ".jpeg", ".png"))]
        if not images:
            raise UserError(f"{path.name} holds no JPEG or PNG image.")
        lists = sorted(name for name in visible if PurePosixPath(name).name in _PARTITIONS)
        beside = [file for name in _PARTITIONS if (file := path.absolute().parent / name).is_file()]
        partition = next(chain(map(read, lists), map(Path.read_bytes, beside)), None)
        sha256 = _folder_sha256(sorted(images + lists), read) if kind == "folder" else sha256_of(path)
        yield Source(source if source == "download" else kind, path.resolve().name, images, sha256, read, partition)


def reason(error: BaseException) -> str:
    """The text of an exception on one line."""
    return " ".join((str(error) or type(error).__name__).split())


@contextmanager
def readable(name: str, source: str) -> Iterator[None]:
    """Turn any error of a damaged file into a UserError."""
    try:
        yield
    except Exception as error:  # damaged files raise almost any exception
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name!r} in {source} is broken ({reason(error)}): replace or remove it.") from error


def _open(path: Path, stack: ExitStack) -> tuple[str, list[str], Callable[[str], bytes]]:
    """The kind, the names of the files in the order of fastest reading, and read(name)."""
    if path.is_dir():
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
        return "folder", files, lambda name: (path / name).read_bytes()
    if not tarfile.is_tarfile(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
        names = dict.fromkeys(archive.namelist())
        return "zip", list(names), archive.read  # of members that share a name, read gives the last
    tar: Any = stack.enter_context(tarfile.open(path))  # noqa: SIM115
    # Links are followed inside the archive. Of members that share a name, the last counts, as when unpacking.
    members = {member.name: member for member in tar if not member.isdir()}
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end marker is missing")  # tarfile takes a cut between two files for the end
    return "tar", list(members), lambda name: tar.extractfile(members[name]).read()


def _folder_sha256(names: list[str], read: Callable[[str], bytes]) -> str:
    digest = hashlib.sha256()
    for name in names:
        content = read(name)
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def parse_partition(content: bytes, names: list[str]) -> list[int]:
    """CelebA's split (0 train, 1 valid, 2 test) of each name; empty if the list has none of these images.

    Names are matched without folder and extension. Raises UserError if only some of the images are listed."""
    lines = _PARTITION_LINE.findall(content.decode("utf-8", "replace"))
    listed = {PurePosixPath(name).stem: int(part) for name, part in lines}
    split = [listed[stem] for name in names if (stem := PurePosixPath(name).stem) in listed]
    if 0 < len(split) < len(names):
        text = f"The partition list has only {len(split)} of {len(names)} images"
        raise UserError(f"{text}: fetch list_eval_partition.txt again, or remove it for a seeded split.")
    return split


def download_celeba(folder: Path) -> Path:
    """Fetch CelebA's aligned images and partition list, unless they are there, and return the path of the zip."""
    wanted = ("img_align_celeba.zip", "list_eval_partition.txt")
    try:
        from torchvision.datasets import CelebA
        from torchvision.datasets.utils import download_file_from_google_drive

        for file_id, md5, name in CelebA.file_list:
            if name in wanted:
                download_file_from_google_drive(file_id, str(folder), name, md5)
    except Exception as error:  # a quota page, no network, no gdown: the remedy is the same
        text = f"CelebA could not be downloaded ({reason(error).rstrip('.')}): fetch {' and '.join(wanted)} from"
        text += " http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in a browser, and run"
        raise UserError(f"{text} `make data SOURCE=path/to/{wanted[0]}` (the list beside it).") from error
    return folder / wanted[0]
