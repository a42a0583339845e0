"""Where images come from: a zip, tar or folder of JPEG and PNG files, recognised by content."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from mlem_diffusion.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
PARTITION_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_CELEBA_PAGE = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_DAMAGE = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    tarfile.TarError,
    zipfile.BadZipFile,
)  # what damaged archives raise
_START_AGAIN = "copy or download it again"
_WANTED = "a zip, a tar or a folder of JPEG or PNG images"


@dataclass(frozen=True)
class Source:
    """Images of one archive or folder.

    kind: "zip", "tar" or "folder"; names: image names inside, sorted; partition_list: contents of CelebA's
    list_eval_partition when it lies inside or beside, else None.
    """

    kind: str
    path: Path
    names: list[str]
    partition_list: bytes | None


@dataclass(frozen=True)
class Member:
    """One image file as read; `data` is None when it could not be read, and `problem` says why."""

    name: str
    data: bytes | None
    problem: str = ""


def kind_of(path: Path) -> str:
    """ "zip", "tar" or "folder", decided by content. Raises UserError that says what the path is instead."""
    try:
        if path.is_dir():
            return "folder"
        if not path.exists():
            raise UserError(f"{path} does not exist: give {_WANTED}.")
        with path.open("rb") as file:
            head = file.read(1024)
        # tarfile before zipfile: a tar whose last member is a zip ends like a zip.
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            if zipfile.is_zipfile(path):
                return "zip"
            raise UserError(
                f"{path.name} is a truncated zip archive (its table of contents is missing): {_START_AGAIN}."
            )
        if tarfile.is_tarfile(path):
            return "tar"
        if zipfile.is_zipfile(path):
            return "zip"
    except (EOFError, zlib.error):
        raise UserError(f"{path.name} is a truncated compressed archive: {_START_AGAIN}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    raise UserError(f"{path.name} {_what_it_is(head)}")


def _what_it_is(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text:
        return (
            "is an HTML page, not an archive: the download was probably refused (quota); "
            "fetch the file again in a browser and check its size."
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an archive: fetch the file itself with git lfs pull."
    if not head:
        return "is an empty file, not an archive: copy or download it again."
    known = {
        b"\xff\xd8\xff": "a single JPEG image",
        b"\x89PNG": "a single PNG image",
        b"7z\xbc\xaf": "a 7z archive",
        b"Rar!": "a RAR archive",
        b"%PDF": "a PDF document",
        b"PAR1": "a Parquet file",
    }
    for magic, words in known.items():
        if head.startswith(magic):
            return f"is {words}: give {_WANTED}."
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return f"is compressed but holds no readable tar archive (truncated, or not a tar): {_START_AGAIN}."
    looks = "plain text" if all(byte >= 32 or byte in (9, 10, 13) for byte in head) else "unknown binary data"
    return f"is not an archive (it looks like {looks}): give {_WANTED}."


def open_source(path: Path, kind: str) -> Source:
    """List the images of a path of known kind.

    Raises UserError for a damaged or encrypted archive, and when there is no image inside.
    """
    try:
        everything = {"zip": _list_zip, "tar": _list_tar, "folder": _list_folder}[kind](path)
    except _DAMAGE as error:
        raise _damaged(path, kind, error) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    visible = [name for name in everything if not _is_hidden(name)]
    names = sorted(name for name in visible if name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        inner = sorted(name for name in visible if name.lower().endswith(_ARCHIVE_SUFFIXES))
        hint = f"; it holds {inner[0]}, which may be the one to give" if inner else ""
        raise UserError(f"{path.name} holds no JPEG or PNG image (files seen: {len(visible)}){hint}.")
    lists = [name for name in visible if PurePosixPath(name).name in PARTITION_NAMES]
    source = Source(kind, path, names, None)
    if lists:
        partition = next(iter(read_members(source, sorted(lists)[:1]))).data
    else:
        beside = partition_beside(path)
        partition = beside.read_bytes() if beside else None
    return Source(kind, path, names, partition)


def _damaged(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{path.name} is a truncated or damaged {kind} archive ({error}): {_START_AGAIN}.")


def partition_beside(path: Path) -> Path | None:
    """CelebA's partition list in the folder that holds `path`, if there is one."""
    candidates = [path.absolute().parent / name for name in PARTITION_NAMES]
    return next((file for file in candidates if file.is_file()), None)


def _is_hidden(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part == "__MACOSX" or part.startswith(".") for part in parts)


def _list_zip(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    for name, info in infos.items():
        if info.flag_bits & 1 and name.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(f"{path.name} is encrypted ({name} needs a password): unpack it and give the folder.")
    return list(infos)


def _list_tar(path: Path) -> list[str]:
    with tarfile.open(path, "r:*") as archive:
        names = [member.name for member in archive if member.isreg() or member.islnk() or member.issym()]
        # tarfile ends silently when the file stops between two members: the end marker has to be there.
        file = archive.fileobj
        assert file is not None
        if isinstance(file, io.BufferedReader):
            file.seek(archive.offset)
            if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end marker is missing")
        else:
            while file.read(1 << 20):  # compressed: reading to the end makes the codec check itself
                pass
    return list(dict.fromkeys(names))


def _list_folder(path: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, subfolders, files in os.walk(path, onerror=refuse):
        subfolders.sort()
        found += [(Path(folder) / file).relative_to(path).as_posix() for file in files]
    return found


def read_members(source: Source, names: list[str]) -> Iterator[Member]:
    """Read the named files, in an order that suits the archive (one pass, nothing is written to disk).

    A file that its archive cannot give back comes as a Member with a problem. Raises UserError when the
    archive itself breaks off, or uses a compression that Python lacks.
    """
    readers = {"zip": _read_zip, "tar": _read_tar, "folder": _read_folder}
    try:
        yield from readers[source.kind](source.path, names)
    except NotImplementedError as error:
        raise UserError(f"{source.path.name} uses a zip feature that is not supported ({error}).") from error
    except _DAMAGE as error:
        raise _damaged(source.path, source.kind, error) from error


def _read_zip(path: Path, names: list[str]) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            yield _member(name, lambda name=name: archive.read(name))


def _read_tar(path: Path, names: list[str]) -> Iterator[Member]:
    with tarfile.open(path, "r:*") as archive:
        # Of members with the same name the last one counts, as when unpacking.
        last = {member.name: member for member in archive.getmembers()}
        wanted = sorted((last[name] for name in names), key=lambda member: member.offset_data)
        for member in wanted:
            yield _member(member.name, lambda member=member: _extract(archive, member))


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file: IO[bytes] | None = archive.extractfile(member)
    except KeyError:
        file = None
    if file is None:
        raise OSError("a link to a file that is not in the archive")
    return file.read()


def _read_folder(path: Path, names: list[str]) -> Iterator[Member]:
    for name in names:
        yield _member(name, (path / name).read_bytes)


def _member(name: str, read: Callable[[], bytes]) -> Member:
    try:
        return Member(name, read())
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        return Member(name, None, getattr(error, "strerror", None) or str(error))


def source_sha256(path: Path, kind: str) -> str:
    """SHA256 of an archive's bytes, or of a folder's sorted names and contents."""
    digest = hashlib.sha256()
    try:
        if kind != "folder":
            _update(digest, path)
            return digest.hexdigest()
        for name in sorted(name for name in _list_folder(path) if not _is_hidden(name)):
            if name.lower().endswith(IMAGE_SUFFIXES) or PurePosixPath(name).name in PARTITION_NAMES:
                digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
                try:
                    digest.update(f"{(path / name).stat().st_size}\0".encode())
                    _update(digest, path / name)
                except OSError:  # a dangling link, say: reported as a broken image when its turn comes
                    digest.update(b"unreadable")
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _update(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def parse_partition(contents: bytes, names: list[str]) -> list[int] | None:
    """CelebA's split (0 train, 1 valid, 2 test) of every name; None when the list speaks of other images.

    Names are matched without folder and extension. Raises UserError when only a part of the images is listed.
    """
    listed = {}
    for line in contents.decode("utf-8", "replace").splitlines():
        fields = re.split(r"[,\s]+", line.strip())
        if len(fields) >= 2 and fields[1] in ("0", "1", "2"):
            listed[PurePosixPath(fields[0]).stem] = int(fields[1])
    found = [listed.get(PurePosixPath(name).stem) for name in names]
    missing = [name for name, part in zip(names, found, strict=True) if part is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(
            f"The partition list knows only {len(names) - len(missing)} of {len(names)} images, "
            f"not {missing[0]}: fetch list_eval_partition.txt again, or take it away for a seeded split."
        )
    return [part for part in found if part is not None]


def download_celeba(folder: Path) -> Path:
    """Fetch CelebA's aligned images and partition list, with torchvision's addresses and checksums.

    Files already there with the right checksum are kept. Returns the zip. Raises UserError on any failure.
    """
    wanted = ("img_align_celeba.zip", "list_eval_partition.txt")
    before = {name for name in wanted if (folder / name).exists()}
    try:
        from torchvision.datasets import CelebA
        from torchvision.datasets.utils import download_file_from_google_drive

        for file_id, md5, name in CelebA.file_list:
            if name in wanted:
                download_file_from_google_drive(file_id, str(folder), name, md5)
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} did not arrive")
    except Exception as error:  # quota page, no network, no gdown: the way out is the same
        for name in set(wanted) - before:
            for left in folder.glob(f"{name}*"):
                left.unlink()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"CelebA could not be downloaded ({reason}): fetch img_align_celeba.zip and "
            f"list_eval_partition.txt from {_CELEBA_PAGE} in a browser, put both into one folder and run "
            f"`make data SOURCE=path/to/img_align_celeba.zip`."
        ) from error
    return folder / wanted[0]
