"""Image sources: a zip, tar or folder of image files, recognised by content, or CelebA by torchvision.
Archives are never unpacked to disk, so the names inside are only names: files are read into memory, one at a time.
CelebA's list_eval_partition says which images are for training, for validation and for tests."""

import codecs
import csv
import hashlib
import os
import re
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError, is_out_of_memory
from ..files import sha256_of
from . import pixels

_PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
_PART = re.compile(r"[012](\.0*)?")  # pandas writes 0.0 for a column with gaps
_HIDDEN = re.compile(r"(^|[/\\])((?i:__MACOSX)[/\\]|\.[^./]|(?i:thumbs\.db|desktop\.ini)$)")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_SPLIT = re.compile(r"\.(z?\d\d+|part\d+\.\w+)$", re.IGNORECASE)
_ELSE = "unpack it with another program and give the folder"


@dataclass(frozen=True)
class Source:
    """Where images come from: their names in the order of reading, and read(name), the content of a file.
    name: for messages and the manifest; sha256: of the whole; partition: name and content of CelebA's list inside or
    beside, else None; passed_over: the files left out, in words; plain: only .jpg, .jpeg, .png, named as stored."""

    kind: str
    name: str
    images: list[str]
    sha256: str
    read: Any = None
    partition: tuple[str, bytes] | None = None
    passed_over: str = ""
    plain: bool = True


@contextmanager
def open_source(source: str, downloads: Path) -> Iterator[Source]:
    """Open the zip, tar or folder at a path; "download" fetches CelebA into `downloads`. UserError without images."""
    path = download_celeba(downloads) if source == "download" else Path(source).expanduser()
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"{path} does not exist: give a zip, a tar or a folder of images.")
    label = os.fsencode(path.resolve().name).decode("utf-8", "backslashreplace")  # a name may have any bytes
    with ExitStack() as stack:
        try:
            kind, files, raw = _open(path, stack)
        except (UserError, PermissionError):
            raise
        except Exception as error:  # damaged archives raise almost any exception
            split = _SPLIT.search(path.name) or "other parts" in str(error)
            what = "one part of a split archive" if split else "no zip or tar, or a truncated or damaged one"
            cure = "join the parts (zip -s 0, or 7-Zip)" if split else "copy or download it again"
            raise UserError(f"{label} is {what} ({reason(error)}): {cure}, or {_ELSE}.") from error

        def read(name: str) -> bytes:
            with readable(name, label):
                return raw(files[name])

        visible = [name for name in files if not _HIDDEN.search(name)]
        images = [name for name in visible if name.lower().endswith(pixels.suffixes())]
        lists = sorted(name for name in visible if PurePosixPath(name).name.lower() in _PARTITIONS)
        passed_over = _passed_over(set(visible) - set(images) - set(lists))
        if not images:
            inner = min((name for name in visible if name.lower().endswith(_ARCHIVES)), default=None)
            cure = f"give the archive {inner!r} that is inside" if inner else "give a zip, a tar or a folder of images"
            raise UserError(f"{label} holds no image that can be read; {passed_over or 'it is empty'}: {cure}.")
        beside = [file for name in _PARTITIONS if (file := path.absolute().parent / name).is_file()]
        found = ((PurePosixPath(name).name, read(name)) for name in lists)
        partition = next(chain(found, ((file.name, file.read_bytes()) for file in beside)), None)
        sha256 = _folder_sha256(sorted(images + lists), read) if kind == "folder" else sha256_of(path)
        plain = all(files[name] == name and name.lower().endswith((".jpg", ".jpeg", ".png")) for name in images)
        kind = source if source == "download" else kind
        yield Source(kind, label, images, sha256, read, partition, passed_over, plain)


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
        what, cure = f"is broken ({reason(error)})", "replace or remove it"
        if isinstance(error, PermissionError):
            what, cure = f"cannot be read ({error.strerror})", "make it readable, or remove it"
        elif isinstance(error, RuntimeError):  # of zipfile: a password, or a compression that it lacks
            what, cure = f"cannot be read ({reason(error)})", _ELSE
        raise UserError(f"{name!r} in {source} {what}: {cure}.") from error


def _open(path: Path, stack: ExitStack) -> tuple[str, dict[str, str], Callable[[str], bytes]]:
    """The kind; the files' names, in the order of fastest reading, with the stored names; read(stored name)."""
    if path.is_dir():
        files = sorted(_walk(path))
        return "folder", dict(zip(files, files, strict=True)), lambda name: (path / name).read_bytes()
    if not tarfile.is_tarfile(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
        if any(member.volume for member in archive.infolist()) or path.with_suffix(".z01").exists():
            raise zipfile.BadZipFile("its other parts are missing")
        # Windows' own archiver writes backslashes. Of members that share a name, the last counts, as in archive.read.
        stored = {name.replace("\\", "/"): name for name in archive.namelist()}
        return "zip", {name: own for name, own in stored.items() if not name.endswith("/")}, archive.read
    tar: Any = stack.enter_context(tarfile.open(path))  # noqa: SIM115
    # Links are followed inside the archive. Of members that share a name, the last counts, as when unpacking.
    members = {member.name: member for member in tar if not member.isdir()}
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end marker is missing")  # tarfile takes a cut between two files for the end
    return "tar", {name: name for name in members}, lambda name: tar.extractfile(members[name]).read()


def _walk(root: Path) -> Iterator[str]:
    """The names of the files in a folder and where its links lead; a folder with several paths counts once."""

    def fail(error: OSError) -> None:
        text = f"The folder {error.filename} cannot be read ({error.strerror}): make it readable, or move it away."
        raise UserError(text) from error

    seen, tops = set(), [os.fspath(root)]
    for top in tops:  # which the links are added to
        for folder, folders, files in os.walk(top, onerror=fail):
            status = os.stat(folder)
            new = (status.st_dev, status.st_ino) not in seen
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if new and not _HIDDEN.search(name))
            tops += [link for name in folders if os.path.islink(link := os.path.join(folder, name))]
            yield from (Path(folder, name).relative_to(root).as_posix() for name in files if new)


def _passed_over(names: set[str]) -> str:
    """How many files are left out, and the most frequent kinds of them."""
    kinds = Counter(PurePosixPath(name).suffix.lower() for name in sorted(names))
    counts = [f"{kind} {n}" for kind, n in kinds.most_common(5) if re.fullmatch(r"\.\w{1,9}", kind, re.ASCII)]
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"passed over {files} of other formats ({', '.join(counts) or 'no ending'})" if names else ""


def _folder_sha256(names: list[str], read: Callable[[str], bytes]) -> str:
    digest = hashlib.sha256()
    for name in names:
        content = read(name)
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


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


def parts_of(names: list[str], content: bytes, label: str) -> list[int]:
    """The part (0 train, 1 valid, 2 test) of each image; empty if the list, called `label`, has none of them.
    Names are matched without extension, from their end, and without case if need be. UserError for a list without
    entries, or with only some of the images."""
    exact: dict[str, int] = {}  # one bit for each part that a name has in the list
    loose: dict[str, int] = {}
    cure = "fetch it again, or remove it for a seeded split"
    with suppress(csv.Error, UnicodeError):
        for name, part in [*_entries(content)]:  # all of it can be read
            for key in _keys(name):
                exact[key] = exact.get(key, 0) | 1 << part
                loose[key.casefold()] = loose.get(key.casefold(), 0) | 1 << part
    if not exact:
        text = f"{label} has no line with a name and a part (0 train, 1 valid, 2 test), such as `000001.jpg 0`"
        raise UserError(f"{text}: {cure}.")
    found = []
    for name in names:
        bits = next((bits for key in _keys(name) if (bits := exact.get(key) or loose.get(key.casefold()))), 0)
        if bits not in (0, 1, 2, 4):
            raise UserError(f"{label} gives {name!r} more than one part: list it once, with its folder.")
        found.append(bits.bit_length() - 1)
    if -1 not in found or max(found) == -1:
        return [part for part in found if part >= 0]
    text = f"{label} has only {len(names) - found.count(-1)} of {len(names)} images"
    raise UserError(f"{text} (not {names[found.index(-1)]!r}): {cure}.")


def _entries(content: bytes) -> Iterator[tuple[str, int]]:
    """Name and part of each line that has both, in a list separated by spaces or in a table, with or without index."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16") if utf16 else content.decode("utf-8-sig", "surrogateescape")
    lines = text.splitlines()
    delimiter = next((sign for sign in "\t;," if 2 * text.count(sign) >= len(lines)), " ")
    for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True):
        fields = [field for text in row if (field := text.strip(" \t'"))]
        end = next((i for i in range(1, len(fields)) if _PART.fullmatch(fields[i])), 0)
        start = int(end > 1 and re.fullmatch(r"\d+(\.0*)?", fields[0]) is not None)  # after an index
        if end:
            yield " ".join(fields[start:end]), int(fields[end][0])


def _keys(name: str) -> list[str]:
    """The name without extension: with all folders, then with fewer. Composed: macOS splits letters from accents."""
    parts = unicodedata.normalize("NFC", name.replace("\\", "/")).split("/")
    parts[-1] = parts[-1].rpartition(".")[0] or parts[-1]
    return ["/".join(parts[i:]) for i in range(len(parts))]
