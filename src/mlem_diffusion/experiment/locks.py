"""One run at a time in a folder: the second is refused, with a word on who is there."""

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
    """Held from `take` to `release`, or to the end of the process however it ends. what: who takes it, for others to read; where:
    what people know the folder as; file: the lock's name in it.

    take() raises UserError where another process holds the folder, or where it cannot be written; it also removes what
    writers that were killed have left below it. Locks are the system's (flock), so none is ever stale; a file system that
    has none does without.
    """

    def __init__(self, folder: Path, what: str, where: Path | None = None, file: str = ".lock"):
        self.folder, self.what, self.where, self.path = folder, what, where or folder, folder / file
        self.file: IO[str] | None = None

    def take(self, shared: bool = False, patience: float = 3.0) -> None:
        """shared: others that share may be there too. patience: seconds to wait for a holder that is just ending."""
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
                    return  # no locks here
                if time.monotonic() > until:
                    raise UserError(f"{self.where} is in use by {_holder(file)}: wait for it, or stop it.") from None
                time.sleep(0.1)
        self.file = file
        with contextlib.suppress(OSError):  # who is there is only a courtesy
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
