"""Where images come from: a zip, tar or folder of JPEG and PNG files, recognised by content."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import lzma
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
PARTITION_NAMES = ("list_eval_partition.txt", "list_eval_partition.csv")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_CELEBA_PAGE = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_START_AGAIN = "copy or download it again"
_WANTED = "a zip, a tar or a folder of JPEG or PNG images"
# An image or a partition list is read whole: no photograph comes near this, and one such file fits any memory.
MAX_FILE = 64 << 20
# Images are compressed already. Beyond both limits a few bytes unpack to hours of work, as only a bomb does.
_MAX_UNPACKED, _MAX_RATIO = 1 << 30, 100
# Names, extended headers and maps of sparse files of one tar member: tarfile reads them whole, whatever they claim.
_MAX_TAR_HEADERS = 1 << 20
_CODECS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x5d\0\0": lzma.open,
}


@dataclass(frozen=True)
class Source:
    """Images of one archive or folder.

    kind: "zip", "tar" or "folder"; names: image names inside, sorted; partition_list: contents of CelebA's
    list_eval_partition when it lies inside or beside, else None; places: offset and size of each file of a tar,
    unpacked.
    """

    kind: str
    path: Path
    names: list[str]
    partition_list: bytes | None
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One image file as read; `data` is None when it could not be read, and `problem` says why."""

    name: str
    data: bytes | None
    problem: str = ""


def shown(name: str) -> str:
    """A file's name for a sentence: on one line, and not endless."""
    name = name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(" ".join(text.split()))


def kind_of(path: Path) -> str:
    """ "zip", "tar" or "folder", decided by content. Raises UserError that says what the path is instead."""
    head = b""
    try:
        if path.is_dir():
            return "folder"
        if not path.exists():
            raise UserError(f"{path} does not exist: give {_WANTED}.")
        if not path.is_file():  # opening a pipe waits for its other end
            raise UserError(f"{path} is neither a file nor a folder: give {_WANTED}.")
        with path.open("rb") as file:
            head = file.read(1024)
        # tarfile before zipfile: a tar whose last member is a zip ends like a zip.
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            if zipfile.is_zipfile(path):
                return "zip"
            raise UserError(
                f"{path.name} is a truncated zip archive (its table of contents is missing): {_START_AGAIN}."
            )
        if _is_tar(path):
            return "tar"
        if zipfile.is_zipfile(path):
            return "zip"
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, "compressed" if head.startswith(tuple(_CODECS)) else "tar", error) from error
    raise UserError(f"{path.name} {_what_it_is(head)}")


def _is_tar(path: Path) -> bool:
    try:
        with _unpacked(path) as file:
            tarfile.TarFile(fileobj=_Headers(file)).close()
        return True
    except tarfile.TarError:
        return False


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    """What to say of an exception: a failing disk gives an errno, damaged archives raise nearly anything else."""
    if kind == "folder" or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
        return UserError(f"{path} cannot be read ({reason(error)}).")
    return UserError(f"{path.name} is a truncated or damaged {kind} archive ({reason(error)}): {_START_AGAIN}.")


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

    Raises UserError for an archive that is damaged, encrypted or hostile, and when there is no image inside.
    """
    places: dict[str, tuple[int, int]] = {}
    try:
        if kind == "tar":
            places = _list_tar(path)
        everything = list(places) if kind == "tar" else {"zip": _list_zip, "folder": _list_folder}[kind](path)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, kind, error) from error
    visible = [name for name in everything if not _is_hidden(name)]
    names = sorted(name for name in visible if name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        inner = sorted(name for name in visible if name.lower().endswith(_ARCHIVE_SUFFIXES))
        hint = f"; it holds {shown(inner[0])}, which may be the one to give" if inner else ""
        raise UserError(f"{path.name} holds no JPEG or PNG image (files seen: {len(visible)}){hint}.")
    source = Source(kind, path, names, None, places)
    lists = sorted(name for name in visible if PurePosixPath(name).name in PARTITION_NAMES)
    if lists:
        (found,) = read_members(source, lists[:1])
        if found.data is None:  # a seeded split instead would be another data set
            raise UserError(
                f"{shown(found.name)} in {path.name} is broken ({found.problem}): fetch it again, "
                f"or take it away for a seeded split."
            )
        return Source(kind, path, names, found.data, places)
    beside = partition_beside(path)
    try:
        return Source(kind, path, names, beside.read_bytes() if beside else None, places)
    except OSError as error:
        raise UserError(f"{beside} cannot be read ({reason(error)}).") from error


def partition_beside(path: Path) -> Path | None:
    """CelebA's partition list in the folder that holds `path`, if there is one. Raises UserError if it is no list."""
    candidates = [path.absolute().parent / name for name in PARTITION_NAMES]
    try:
        beside = next((file for file in candidates if file.is_file()), None)
        if beside:
            _open_file(beside).close()
    except OSError as error:
        at = error.filename or candidates[0]
        raise UserError(f"{at} cannot be read ({reason(error)}): fetch it again, or take it away.") from error
    return beside


def _is_hidden(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part == "__MACOSX" or part.startswith(".") for part in parts)


def _is_wanted(name: str) -> bool:
    image = name.lower().endswith(IMAGE_SUFFIXES)
    return (image or PurePosixPath(name).name in PARTITION_NAMES) and not _is_hidden(name)


def _refuse_path(path: Path, name: str) -> None:
    outside = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name)
    if outside:
        _refuse(path, name, "a path that leads out of the archive")


def _refuse(path: Path, name: str, what: str) -> None:
    raise UserError(f"{path.name} holds {shown(name)}, {what}: pack plain image files under relative names.")


def _refuse_size(path: Path, name: str, size: int) -> None:
    if size > MAX_FILE and _is_wanted(name):
        raise UserError(
            f"{path.name} holds {shown(name)}, which claims {size / 1e6:,.0f} MB: take it out, "
            f"an image or a partition list has at most {MAX_FILE / 1e6:.0f} MB."
        )


def _refuse_bomb(path: Path, unpacked: int) -> None:
    if unpacked > _MAX_UNPACKED and unpacked > _MAX_RATIO * (packed := path.stat().st_size):
        raise UserError(
            f"{path.name} would unpack from {packed / 1e6:,.1f} MB to more than {_MAX_RATIO} times as much, "
            f"which archives of images never do: get it from a source that you trust."
        )


def _list_zip(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    _check_directory(path, entries)
    for info in entries:
        name, mode = info.orig_filename, info.external_attr >> 16
        _refuse_path(path, name)
        if stat.S_ISLNK(mode):
            _refuse(path, name, "a symbolic link")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            _refuse(path, name, "which is a device or a pipe")
        _refuse_size(path, name, info.file_size)
        if not _is_wanted(name):
            continue
        if info.flag_bits & 0x41:
            raise UserError(
                f"{path.name} is encrypted ({shown(name)} needs a password): unpack it and give the folder."
            )
        # zipfile unpacks other methods without a limit on what a few bytes become.
        if info.flag_bits & 0x20 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{path.name} packs {shown(name)} with a zip method that is not supported ({info.compress_type}): "
                f"unpack it and give the folder."
            )
    _refuse_bomb(path, sum(info.file_size for info in entries))
    return list(dict.fromkeys(info.orig_filename for info in entries if not info.orig_filename.endswith("/")))


def _check_directory(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Compare the table of contents with its end record and with the header before each file.

    The table has no checksum, and zipfile lists what it finds there: damage could drop or rename files silently.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(max(0, path.stat().st_size - (76 + 22 + 65535)))
        tail = file.readall()
        end = tail.rfind(b"PK\5\6", 0, len(tail) - 18)
        here, whole = len(entries), int.from_bytes(tail[end + 10 : end + 12], "little")
        if end >= 76 and tail[end - 20 : end - 16] == b"PK\6\7" and tail[end - 76 : end - 72] == b"PK\6\6":
            agrees = here == int.from_bytes(tail[end - 44 : end - 36], "little")  # zip64
        else:  # old programs let the 16 bits overflow, or leave them at their greatest
            agrees = whole in (here & 0xFFFF, min(here, 0xFFFF))
        if not agrees:
            raise zipfile.BadZipFile(f"its table of contents lists {here} files, its end record says otherwise")
        for info in sorted(entries, key=lambda info: info.header_offset):
            length = len(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"))
            file.seek(info.header_offset)
            header = file.read(30 + length)
            name = header[30:].decode("utf-8" if header[7] & 8 else "cp437")
            fits = header[:4] == b"PK\3\4" and header[26:28] == length.to_bytes(2, "little")
            if not fits or name != info.orig_filename:
                raise zipfile.BadZipFile(f"its table of contents does not fit the file {shown(info.orig_filename)}")


def _list_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every file. Of members with the same name the last one counts, as when unpacking.

    What no reader can notice, since a tar without compression has no checksum for it: damage inside names of more than
    100 bytes, and last members overwritten with zeros from their headers to their ends.
    """
    places = {}
    with _unpacked(path) as file:
        headers = _Headers(file)
        archive, before = tarfile.TarFile(fileobj=headers), -1
        while (member := archive.next()) is not None:
            if member.size < 0 or archive.offset <= before:  # tarfile would go round in circles
                raise tarfile.ReadError("a member has no sensible size")
            before, headers.left = archive.offset, _MAX_TAR_HEADERS
            archive.members = []  # pyright: ignore  (tarfile keeps them all: a bomb of empty members)
            _refuse_member(path, member)
            _refuse_bomb(path, archive.offset)  # before the member is skipped, which unpacks it
            if member.isreg():
                places[member.name] = member.offset_data, member.size
        # tarfile takes damage and the end of the file for the end of the archive, which is a block of zeros; more
        # than zeros after it are members behind a header that was wiped out.
        block = headers.last
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end marker is missing")
        position = archive.offset
        while block:  # compressed: reading to the end makes the codec check itself
            if block.count(0) < len(block):
                raise tarfile.ReadError("something else than its end marker follows the last readable file")
            position += len(block)
            _refuse_bomb(path, position)
            block = file.read(1 << 20)
    return places


def _refuse_member(path: Path, member: tarfile.TarInfo) -> None:
    _refuse_path(path, member.name)
    _refuse_size(path, member.name, member.size)
    if member.issym() or member.islnk():
        _refuse(path, member.name, f"a {'symbolic' if member.issym() else 'hard'} link")
    if member.isdev():
        _refuse(path, member.name, "which is a device or a pipe")
    if _is_wanted(member.name) and not member.isdir() and (not member.isreg() or member.issparse()):
        _refuse(path, member.name, "which is not a plain file")


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a tar that may be compressed."""
    with path.open("rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _CODECS.items() if head.startswith(magic)), open)
    with opener(path, "rb") as file:
        yield file


class _Headers:
    """What tarfile reads headers from: no more than a limit for one member, and the last block is kept."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left, self.last = file, _MAX_TAR_HEADERS, b""
        self.seek, self.tell, self.close, self.write = file.seek, file.tell, file.close, file.write

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of more than {_MAX_TAR_HEADERS / 1e6:.0f} MB")
        self.left -= size
        self.last = self.file.read(size)
        return self.last


def _list_folder(path: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    try:
        for folder, subfolders, files in os.walk(path, onerror=refuse):
            subfolders.sort()
            found += [(Path(folder) / file).relative_to(path).as_posix() for file in files]
    except RecursionError:
        raise OSError(errno.ELOOP, "its folders are nested too deep") from None
    return found


def read_members(source: Source, names: list[str]) -> Iterator[Member]:
    """Read the named files, in an order that suits the archive (nothing is written to disk).

    A file that its archive cannot give back comes as a Member with a problem. Raises UserError when the
    archive itself breaks off.
    """
    readers = {"zip": _read_zip, "tar": _read_tar, "folder": _read_folder}
    try:
        yield from readers[source.kind](source, names)
    except Exception as error:
        raise _unreadable(source.path, source.kind, error) from error


def _read_zip(source: Source, names: list[str]) -> Iterator[Member]:
    with zipfile.ZipFile(source.path) as archive:
        last = {info.orig_filename: info for info in archive.infolist()}
        for name in names:
            yield _member(name, lambda info=last[name]: _inflate(archive, info))


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        contents = file.read(min(info.file_size, MAX_FILE))
    if len(contents) != info.file_size:
        raise EOFError("its size is not what the archive says")
    return contents


def _read_tar(source: Source, names: list[str]) -> Iterator[Member]:
    with _unpacked(source.path) as file:
        for name in sorted(names, key=source.places.__getitem__):  # in one pass
            offset, size = source.places[name]
            file.seek(offset)
            contents = file.read(size)
            if len(contents) < size:
                raise EOFError(f"it ends inside {shown(name)}")
            yield Member(name, contents)


def _read_folder(source: Source, names: list[str]) -> Iterator[Member]:
    for name in names:
        yield _member(name, lambda name=name: _read_file(source.path / name))


def _read_file(path: Path) -> bytes:
    with _open_file(path) as file:
        return file.read(MAX_FILE)


def _open_file(path: Path) -> IO[bytes]:
    """Open a regular file or a link to one; never a pipe or a device, which may wait for ever or do something."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > MAX_FILE:
        raise OSError(errno.EFBIG, f"larger than {MAX_FILE / 1e6:.0f} MB", str(path))
    return path.open("rb")


def _member(name: str, read: Callable[[], bytes]) -> Member:
    try:
        return Member(name, read())
    except Exception as error:  # damaged files raise nearly anything
        return Member(name, None, reason(error))


def source_sha256(path: Path, kind: str) -> str:
    """SHA256 of an archive's bytes, or of a folder's sorted names and contents."""
    digest = hashlib.sha256()
    try:
        if kind != "folder":
            with path.open("rb") as file:
                _update(digest, file)
            return digest.hexdigest()
        for name in sorted(name for name in _list_folder(path) if not _is_hidden(name)):
            if name.lower().endswith(IMAGE_SUFFIXES) or PurePosixPath(name).name in PARTITION_NAMES:
                digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
                try:
                    digest.update(f"{(path / name).stat().st_size}\0".encode())
                    with _open_file(path / name) as file:
                        _update(digest, file)
                except OSError:  # a dangling link or a pipe, say: reported as a broken image when its turn comes
                    digest.update(b"unreadable")
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _update(digest: hashlib._Hash, file: IO[bytes]) -> None:
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
            f"not {shown(missing[0])}: fetch list_eval_partition.txt again, or take it away for a seeded split."
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
