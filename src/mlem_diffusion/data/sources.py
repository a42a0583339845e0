"""Image sources: a zip, tar or folder of JPEG and PNG files, recognised by content."""

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
# Largest image or partition list in bytes: each is read into memory at once, and photographs are far smaller.
MAX_FILE = 64 << 20
# Images are already compressed. Only a zip bomb exceeds both limits: its few bytes unpack to hours of work.
_MAX_UNPACKED, _MAX_RATIO = 1 << 30, 100
# Bytes for names, extended headers and sparse maps of one tar member: tarfile itself reads them without a limit.
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
    list_eval_partition if it is inside or next to the source, else None; places: offset and size of each file in
    the uncompressed tar.
    """

    kind: str
    path: Path
    names: list[str]
    partition_list: bytes | None
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One image file; `data` is None if it could not be read, and `problem` gives the reason."""

    name: str
    data: bytes | None
    problem: str = ""


def shown(name: str) -> str:
    """A file's name for a message: on one line, and shortened if it is long."""
    name = name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"


def reason(error: BaseException) -> str:
    """The text of an exception on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(" ".join(text.split()))


def kind_of(path: Path) -> str:
    """Return "zip", "tar" or "folder", decided by content. For other files, raises UserError with their type."""
    head = b""
    try:
        if path.is_dir():
            return "folder"
        if not path.exists():
            raise UserError(f"{path} does not exist: give {_WANTED}.")
        if not path.is_file():  # opening a pipe would block
            raise UserError(f"{path} is neither a file nor a folder: give {_WANTED}.")
        with path.open("rb") as file:
            head = file.read(1024)
        # Test for a tar before the general zip test: a tar whose last member is a zip ends like a zip.
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
    """The UserError for an exception: a failing disk sets an errno, damaged archives raise almost any other one."""
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

    Raises UserError for an archive that is damaged, encrypted or hostile, or has no image inside.
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
        hint = f"; it holds {shown(inner[0])}, which may be the right archive" if inner else ""
        raise UserError(f"{path.name} holds no JPEG or PNG image (files seen: {len(visible)}){hint}.")
    source = Source(kind, path, names, None, places)
    lists = sorted(name for name in visible if PurePosixPath(name).name in PARTITION_NAMES)
    if lists:
        (found,) = read_members(source, lists[:1])
        if found.data is None:  # a seeded split instead would give a different data set
            raise UserError(
                f"{shown(found.name)} in {path.name} is broken ({found.problem}): fetch it again, "
                f"or remove it for a seeded split."
            )
        return Source(kind, path, names, found.data, places)
    beside = partition_beside(path)
    try:
        return Source(kind, path, names, beside.read_bytes() if beside else None, places)
    except OSError as error:
        raise UserError(f"{beside} cannot be read ({reason(error)}).") from error


def partition_beside(path: Path) -> Path | None:
    """CelebA's partition list in the folder that holds `path`, or None. Raises UserError if it cannot be read."""
    candidates = [path.absolute().parent / name for name in PARTITION_NAMES]
    try:
        beside = next((file for file in candidates if file.is_file()), None)
        if beside:
            _open_file(beside).close()
    except OSError as error:
        at = error.filename or candidates[0]
        raise UserError(f"{at} cannot be read ({reason(error)}): fetch it again, or remove it.") from error
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
            f"{path.name} holds {shown(name)}, which claims {size / 1e6:,.0f} MB: remove it, "
            f"an image or a partition list may have at most {MAX_FILE / 1e6:.0f} MB."
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
        # For other methods, zipfile does not limit the unpacked size.
        if info.flag_bits & 0x20 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{path.name} packs {shown(name)} with a zip method that is not supported ({info.compress_type}): "
                f"unpack it and give the folder."
            )
    _refuse_bomb(path, sum(info.file_size for info in entries))
    return list(dict.fromkeys(info.orig_filename for info in entries if not info.orig_filename.endswith("/")))


def _check_directory(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Compare the table of contents with its end record and with the header before each file.

    The table has no checksum, and zipfile trusts it: damage could drop or rename files silently.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(max(0, path.stat().st_size - (76 + 22 + 65535)))
        tail = file.readall()
        end = tail.rfind(b"PK\5\6", 0, len(tail) - 18)
        here, whole = len(entries), int.from_bytes(tail[end + 10 : end + 12], "little")
        if end >= 76 and tail[end - 20 : end - 16] == b"PK\6\7" and tail[end - 76 : end - 72] == b"PK\6\6":
            agrees = here == int.from_bytes(tail[end - 44 : end - 36], "little")  # zip64
        else:  # old programs let the 16 bits overflow, or store their largest value
            agrees = whole in (here & 0xFFFF, min(here, 0xFFFF))
        if not agrees:
            raise zipfile.BadZipFile(f"its table of contents lists {here} files, its end record another number")
        for info in sorted(entries, key=lambda info: info.header_offset):
            length = len(info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"))
            file.seek(info.header_offset)
            header = file.read(30 + length)
            name = header[30:].decode("utf-8" if header[7] & 8 else "cp437")
            fits = header[:4] == b"PK\3\4" and header[26:28] == length.to_bytes(2, "little")
            if not fits or name != info.orig_filename:
                raise zipfile.BadZipFile(f"its table of contents does not match the file {shown(info.orig_filename)}")


def _list_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each file. If members share a name, the last one counts, as when unpacking.

    A tar without compression has no checksum for two kinds of damage, so no reader can detect them: damage inside
    names of more than 100 bytes, and last members overwritten with zeros from their headers to their ends.
    """
    places = {}
    with _unpacked(path) as file:
        headers = _Headers(file)
        archive, before = tarfile.TarFile(fileobj=headers), -1
        while (member := archive.next()) is not None:
            if member.size < 0 or archive.offset <= before:  # tarfile would loop forever
                raise tarfile.ReadError("a member has no sensible size")
            before, headers.left = archive.offset, _MAX_TAR_HEADERS
            archive.members = []  # pyright: ignore  (tarfile stores them all: empty members could fill the memory)
            _refuse_member(path, member)
            _refuse_bomb(path, archive.offset)  # before the member is skipped, because skipping unpacks it
            if member.isreg():
                places[member.name] = member.offset_data, member.size
        # An archive ends with a block of zeros, but tarfile also stops at damage and at the end of the file.
        # Nonzero bytes after the block of zeros are members behind an overwritten header.
        block = headers.last
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end marker is missing")
        position = archive.offset
        while block:  # reading a compressed file to its end makes the codec verify its checksum
            if block.count(0) < len(block):
                raise tarfile.ReadError("data other than its end marker follow the last readable file")
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
    """Open a tar that may be compressed, as uncompressed bytes."""
    with path.open("rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _CODECS.items() if head.startswith(magic)), open)
    with opener(path, "rb") as file:
        yield file


class _Headers:
    """The file that tarfile reads headers from: limits the bytes per member and stores the last block."""

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

    A file that cannot be read gives a Member with a problem. Raises UserError if the archive itself ends early.
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
        raise EOFError("its size differs from the size in the archive's table of contents")
    return contents


def _read_tar(source: Source, names: list[str]) -> Iterator[Member]:
    with _unpacked(source.path) as file:
        for name in sorted(names, key=source.places.__getitem__):  # in file order, so that one pass is enough
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
    """Open a regular file or a link to one, but no pipe or device: reading these may block or have side effects."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > MAX_FILE:
        raise OSError(errno.EFBIG, f"larger than {MAX_FILE / 1e6:.0f} MB", str(path))
    return path.open("rb")


def _member(name: str, read: Callable[[], bytes]) -> Member:
    try:
        return Member(name, read())
    except Exception as error:  # damaged files raise almost any exception
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
                except OSError:  # e.g. a dangling link or a pipe: reported as a broken image when it is read
                    digest.update(b"unreadable")
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _update(digest: hashlib._Hash, file: IO[bytes]) -> None:
    while block := file.read(1 << 20):
        digest.update(block)


def parse_partition(contents: bytes, names: list[str]) -> list[int] | None:
    """CelebA's split (0 train, 1 valid, 2 test) of each name, or None if the list has none of these images.

    Names are matched without folder and extension. Raises UserError if only some of the images are listed.
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
            f"The partition list has only {len(names) - len(missing)} of {len(names)} images, "
            f"not {shown(missing[0])}: fetch list_eval_partition.txt again, or remove it for a seeded split."
        )
    return [part for part in found if part is not None]


def download_celeba(folder: Path) -> Path:
    """Fetch CelebA's aligned images and partition list, with torchvision's addresses and checksums.

    Existing files with the right checksum are reused. Returns the path of the zip. Raises UserError on any failure.
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
            raise FileNotFoundError(f"{missing[0]} was not downloaded")
    except Exception as error:  # quota page, no network, no gdown: the remedy is the same
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
