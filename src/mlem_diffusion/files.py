"""Files that are complete or absent: atomic writes, strict JSON, npz without pickles, locks on folders."""

import contextlib
import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from .errors import SlowPath, UserError, is_out_of_memory

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch put the system's error into words
_FULL_WORDS = ("os error 28", "os error 27", "unexpected pos", os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG))

_LACKING = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # a call that this file system does not have


class Damaged(UserError):
    """The file at `path` cannot be read, or does not have the expected content."""

    def __init__(self, path: Path, text: str):
        super().__init__(text)
        self.path = path

    def __reduce__(self) -> tuple:  # pickled when sent between processes
        return type(self), (self.path, str(self))


@contextlib.contextmanager
def expect_content(path: Path, hint: str) -> Iterator[None]:
    """Context for code that uses the content of a file: raises Damaged if it is not of the expected form."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Damaged(path, f"{path} has unexpected content: {hint}.") from error


def cached(path: Path, read: Callable[[Path], T], make: Callable[[], object]) -> T:
    """The result of read(path) for a cache file; make() creates the file if it is missing or damaged."""
    if path.is_file():
        try:
            return read(path)
        except Damaged as error:
            error.path.unlink(missing_ok=True)
            warnings.warn(f"{error.path} was damaged, so it is computed again.", SlowPath, stacklevel=2)
    make()
    return read(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename the temporary file to `path`: a stop leaves the old file or the new one.
    Raises UserError if the disk is full or the path cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file, where_possible():
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        raise _explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def where_possible() -> Iterator[None]:
    """Context for a call that some file systems (of networks, in user space) do not have: then it is left out."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LACKING:
            raise


def unreadable(error: Exception, path: Path, text: str) -> Exception:
    """Damaged with this text, but lack of memory is not the file's fault."""
    return error if is_out_of_memory(error) else Damaged(path, f"{path} {text}.")


def _explained(error: Exception, path: Path) -> Exception:
    """A UserError if the disk is full or the path cannot be written, else the error itself."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or any(word in str(error) for word in _FULL_WORDS):
        text = f"The disk that holds {path.parent} is full (or ulimit -f is low), so {path.name} could not be written"
        return UserError(f"{text}: make room and run the same command again.")
    if isinstance(error, OSError) and not is_out_of_memory(error) and number not in (errno.EMFILE, errno.ENFILE):
        reason = error.strerror or error
        return UserError(f"{path} cannot be written ({reason}): make its folder writable, or choose another (paths.*).")
    return error


def readable(text: str) -> str:
    """Valid Unicode: arguments and file names hold surrogates for bytes that the locale cannot decode. What is UTF-8 is
    decoded as such, and U+FFFD replaces the rest."""
    text = re.sub(r"[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # surrogates that stand for no byte, from JSON
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_text(path: Path, text: str) -> None:
    """Write `readable` text as UTF-8, atomically."""
    atomic_write(path, lambda p: p.write_text(readable(text), encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) with two-space indent, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, hint: str) -> Any:
    """The value in a JSON file; UserError if it is missing, Damaged if it is not JSON. hint: what to run then."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"{path} is not valid JSON ({error}): {hint}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error


def write_arrays(path: Path, arrays: Mapping[str, Any], compress: bool = True) -> None:
    """Write an npz file, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # an open file: numpy would append .npz to the temporary name
            (np.savez_compressed if compress else np.savez)(file, **arrays)

    atomic_write(path, write)


def read_arrays(path: Path, hint: str) -> dict[str, np.ndarray]:
    """The arrays of an npz file, without pickled objects; UserError if it is missing, Damaged if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {hint}.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged archive can raise almost any exception
        raise unreadable(error, path, f"cannot be read: {hint}") from error


@contextlib.contextmanager
def locked(folder: Path, what: str, beside: bool = False) -> Iterator[None]:
    """Hold the lock of a folder (the operating system's, so never stale); UserError if another run holds it.
    What killed writers left in it is removed; beside: also what they left next to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=3)  # a run that was just stopped may still be ending
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is in use by another run ({what}): wait for it, or stop it.") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _LACKING:
            raise _explained(error, folder / ".lock") from error
        text = f"{folder} is on a file system without locks: start no second run on it while this one works."
        warnings.warn(text, SlowPath, stacklevel=3)
    try:
        for left in [*folder.rglob(".*.partial"), *(folder.parent.glob(".*.partial") if beside else ())]:
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
