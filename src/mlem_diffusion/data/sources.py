"""Image sources: a zip, tar or folder of image files, recognised by content, or CelebA by torchvision.

Archives are never unpacked to disk, so the names inside are only names: files are read into memory, one at a time."""

import hashlib
import os
import re
import tarfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError, is_out_of_memory
from ..files import sha256_of
from . import pixels

_PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
_HIDDEN = re.compile(r"(^|/)(__MACOSX/|\.[^./]|(?i:thumbs\.db|desktop\.ini)$)")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
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
    """Open the zip, tar or folder at a path; "download" fetches CelebA into `downloads`. Raises UserError if it is
    missing or damaged, or has no image inside."""
    path = download_celeba(downloads) if source == "download" else Path(source).expanduser()
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"{printable(str(path))} does not exist: give a zip, a tar or a folder of images.")
    label = printable(path.resolve().name)
    with ExitStack() as stack:
        try:
            kind, files, raw = _open(path, stack)
        except UserError:
            raise
        except Exception as error:  # damaged archives raise almost any exception
            raise UserError(f"{label} {_unopened(path)} ({reason(error)}), or {_ELSE}.") from error

        def read(name: str) -> bytes:
            with readable(name, label):
                return raw(files[name])

        visible = [name for name in files if not _HIDDEN.search(name)]
        images = [name for name in visible if name.lower().endswith(pixels.suffixes())]
        lists = sorted(name for name in visible if PurePosixPath(name).name.lower() in _PARTITIONS)
        passed_over = _passed_over(set(visible) - set(images) - set(lists))
        if not images:
            inner = min((name for name in visible if name.lower().endswith(_ARCHIVES)), default=None)
            text = f"{label} holds no image that can be read ({passed_over or 'it has no visible file'})"
            cure = f"give the archive {inner!r} that is inside" if inner else "give a zip, a tar or a folder of images"
            raise UserError(f"{text}: {cure}.")
        beside = (file for name in _PARTITIONS if (file := path.absolute().parent / name).is_file())
        partition = (printable(lists[0]), read(lists[0])) if lists else None
        if not partition and (file := next(beside, None)):
            with readable(file.name, "the folder of the source"):
                partition = (file.name, file.read_bytes())
        sha256 = _folder_sha256(sorted(images + lists), read) if kind == "folder" else sha256_of(path)
        plain = all(files[name] == name and name.lower().endswith((".jpg", ".jpeg", ".png")) for name in images)
        kind = source if source == "download" else kind
        yield Source(kind, label, images, sha256, read, partition, passed_over, plain)


def printable(text: str) -> str:
    """The text with bytes that are no UTF-8, which a file name can have, written as \\xff."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


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
    """The kind; the names of the files, in the order of fastest reading, to the names they are stored under; and
    read(stored name)."""
    if path.is_dir():
        files = sorted(_walk(path))
        return "folder", dict(zip(files, files, strict=True)), lambda name: (path / name).read_bytes()
    if not tarfile.is_tarfile(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
        if any(member.volume for member in archive.infolist()):
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
    """The names of the files in a folder; links to folders are followed.

    A folder that several paths lead to counts once, so that loops end: under its own path if that is inside."""
    seen, waiting = set(), deque([""])
    while waiting:
        folder = waiting.popleft()
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            text = f"The folder {printable(str(root / folder))} cannot be read ({error.strerror})"
            raise UserError(f"{text}: make it readable, or move it away.") from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = folder + entry.name
            if not os.path.isdir(entry.path):
                yield name
            elif not _HIDDEN.search(f"{name}/"):
                (waiting.append if entry.is_symlink() else waiting.appendleft)(f"{name}/")


def _unopened(path: Path) -> str:
    """What is wrong with an archive that cannot be opened, and what to do."""
    if re.search(r"\.(z?\d\d+|part\d+\.\w+)$", path.name, re.IGNORECASE) or path.with_suffix(".z01").exists():
        return "is one part of a split archive: join the parts (`zip -s 0`, 7-Zip)"
    return "is no zip or tar, or a truncated or damaged one: copy or download it again"


def _passed_over(names: set[str]) -> str:
    """How many files are left out, and the most frequent kinds of them."""
    kinds = Counter(PurePosixPath(name).suffix.lower() for name in names)
    known = [(kind, n) for kind, n in kinds.most_common(5) if re.fullmatch(r"\.[a-z0-9]{1,9}", kind)]
    rest = len(names) - sum(n for _, n in known)
    counts = [f"{kind} {n}" for kind, n in known] + [f"others {rest}"] * bool(rest)
    return f"passed over {len(names)} files of other formats: {', '.join(counts)}" if names else ""


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
