"""At most one run per folder: a second run is refused with a message that names the first."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from pathlib import Path
from typing import IO

from ..errors import UserError
from ..files import FULL, is_the_systems, remove_partial

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None


class FolderLock:
    """A lock on a folder, held from `take` to `release` or to the end of the process.

    what: name of the run in messages; where: name of the folder in messages; file: name of the lock file in the folder.

    take() raises UserError if another process holds the folder, or if the folder cannot be written. It also removes
    partial files that killed writers left in the folder. Locks are the operating system's (flock), so none is ever
    stale. On a file system without locks, nothing is locked.
    """

    def __init__(self, folder: Path, what: str, where: Path | None = None, file: str = ".lock"):
        self.folder, self.what, self.where, self.path = folder, what, where or folder, folder / file
        self.file: IO[str] | None = None

    def take(self, shared: bool = False, patience: float = 3.0) -> None:
        """Take the lock. shared: together with other shared holders. patience: seconds to wait for an ending holder."""
        if fcntl is None or self.file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            if is_the_systems(error):
                raise
            what = "make room on its disk" if error.errno in FULL else "make it writable"
            reason = error.strerror or error
            raise UserError(
                f"{self.where} cannot be written ({reason}): {what}, or choose another folder (paths.*)."
            ) from error
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    file.close()
                    return  # the file system has no locks
                if time.monotonic() > until:
                    raise UserError(f"{self.where} is in use by {_holder(file)}: wait for it, or stop it.") from None
                time.sleep(0.1)
        self.file = file
        with contextlib.suppress(OSError):  # the lock also works without the holder's name
            file.truncate(0)
            file.write(f"{self.what}, process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        if not shared:
            remove_partial(self.folder)

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _holder(file: IO[str]) -> str:
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        if text := file.read(200).strip():
            return f"another run ({text})"
    return "another run"
