"""Files that a run writes and reads back: written atomically, and verified when read.

A JSON object stores the SHA-256 of its content. Npz and torch files are zip archives; they store the SHA-256 of their
bytes as the archive's comment, so other programs can still read them. The hash of weights is in metadata.json. A file
that has changed since it was written raises Damaged, with a text that tells the user what to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .errors import SlowPath, UserError

T = TypeVar("T")

SEAL = "content_sha256"  # key of a JSON object's own hash
_END = b"PK\x05\x06"  # start of a zip archive's last record, 22 bytes without a comment
_DIGEST = 64  # characters of a hexadecimal SHA-256
FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = ("os error 28", os.strerror(errno.ENOSPC))  # from safetensors, from torch
_SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Damaged(UserError):
    """The file at `path` has changed since it was written."""

    def __init__(self, path: Path, text: str):
        super().__init__(text)
        self.path = path

    def __reduce__(self) -> tuple:  # pickled when sent between processes
        return type(self), (self.path, str(self))


@contextlib.contextmanager
def expect_content(path: Path, hint: str) -> Iterator[None]:
    """Context for code that parses the content of an intact file: raises Damaged if the parsing fails."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Damaged(path, f"{path} has unexpected content: {hint}.") from error


def discard_damaged(error: Damaged) -> None:
    """Remove a damaged cache file, and warn that its content is computed again."""
    error.path.unlink(missing_ok=True)
    warnings.warn(f"{error.path} was damaged, so it is computed again.", SlowPath, stacklevel=3)


def cached(path: Path, read: Callable[[Path], T], make: Callable[[], object]) -> T:
    """The result of read(path) for a cache file; make() creates the file if it is missing or damaged."""
    for _ in range(2):
        if not path.is_file():
            make()
        try:
            return read(path)
        except Damaged as error:
            discard_damaged(error)
    make()
    return read(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in blocks."""
    return _sha256(path, path.stat().st_size)


def _sha256(path: Path, size: int, digest: hashlib._Hash | None = None) -> str:
    digest = digest or hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ writing


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename the temporary file to `path`.

    A stop at any moment, even of the machine, leaves the old file or the new one. Raises UserError if the disk is full
    or the path cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except Exception as error:
        raise _explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _explained(error: Exception, path: Path) -> Exception:
    """A UserError if the disk is full or cannot be written, else the error itself.

    Libraries wrap the system's error in their own or lose it, so the text and the free space are checked too."""
    if isinstance(error, UserError) or is_the_systems(error):
        return error
    number = error.errno if isinstance(error, OSError) else None
    with contextlib.suppress(OSError):
        if (
            number in FULL
            or any(word in str(error) for word in _FULL_WORDS)
            or (number is None and _free(path.parent) < 2**16)
        ):
            return UserError(
                f"The disk that holds {path.parent} is full, so {path.name} could not be written: "
                "make room and run the same command again."
            )
    if isinstance(error, OSError):
        return UserError(
            f"{path} cannot be written ({error.strerror or error}): make its folder writable, "
            "or choose another (paths.*)."
        )
    return error


def is_the_systems(error: Exception) -> bool:
    """Whether the error shows that the machine lacks memory or file handles, not that a file is bad."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORT)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def remove_partial(folder: Path) -> None:
    """Remove temporary files of killed writers below the folder; the caller must lock it (experiment/locks.py)."""
    for left in [*folder.rglob(".*.partial")]:
        with contextlib.suppress(OSError):
            left.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- JSON


def content_sha256(content: dict[str, Any]) -> str:
    """The SHA-256 of a JSON object without its seal; the order of the keys does not matter."""
    own = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) with two-space indent, atomically.

    An object gets its own hash as the last key; other values get no hash."""
    if isinstance(value, dict):
        plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read back
        value = plain | {SEAL: content_sha256(plain)}
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, hint: str, sealed: bool = True) -> Any:
    """The value that write_json wrote.

    hint: what to run if the file is missing or damaged. sealed: refuse an object without its hash; False is for files
    that are verified otherwise (published families)."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"{path} is not valid JSON ({error}): {hint}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    if not isinstance(content, dict):
        if sealed:
            raise Damaged(path, f"{path} does not contain a JSON object: {hint}.")
        return content
    seal = content.pop(SEAL, None)
    if seal is None and sealed:
        raise Damaged(path, f"{path} does not carry its checksum ({SEAL}), so it cannot be verified: {hint}.")
    if seal is not None and seal != content_sha256(content):
        raise Damaged(path, f"{path} has been changed or damaged since it was written: {hint}.")
    return content


# ------------------------------------------------------------------------------------------ zip-based files


def seal_zip(path: Path, name: str) -> None:
    """Append the SHA-256 of the final file name and the archive's bytes, as the archive's comment."""
    with path.open("r+b") as file:
        file.seek(-22, os.SEEK_END)
        end = file.read(22)
        if not end.startswith(_END) or end[20:] != b"\0\0":
            raise ValueError(f"{path} is not a zip archive without a comment.")
        file.seek(-2, os.SEEK_END)
        file.write(_DIGEST.to_bytes(2, "little"))
    digest = _sha256(path, path.stat().st_size, hashlib.sha256(name.encode()))
    with path.open("ab") as file:
        file.write(digest.encode())


def check_zip(path: Path, hint: str) -> None:
    """Raise Damaged unless seal_zip hashed these bytes and this name; raise UserError if the file is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}.")
    try:
        size = path.stat().st_size - _DIGEST
        with path.open("rb") as file:
            file.seek(max(size, 0))
            expected = file.read()
        if size > 0 and _sha256(path, size, hashlib.sha256(path.name.encode())).encode() == expected:
            return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    raise Damaged(path, f"{path} is damaged, or not the file of this name: {hint}.")


def write_arrays(path: Path, arrays: Mapping[str, Any], compress: bool = True) -> None:
    """Write a sealed npz file, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # an open file: numpy would append .npz to the temporary name
            (np.savez_compressed if compress else np.savez)(file, **arrays)
        seal_zip(temporary, path.name)

    atomic_write(path, write)


def read_arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    """The arrays that write_arrays wrote, without pickled objects; raises Damaged if the file has changed."""
    check_zip(path, hint)
    return load_arrays(path, hint)


def load_arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file whose bytes have been verified already."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged archive can raise almost any exception
        if is_the_systems(error):
            raise
        raise Damaged(path, f"{path} cannot be read: {hint}.") from error
