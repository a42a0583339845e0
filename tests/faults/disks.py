"""Small separate file systems that fill up and become read-only like disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """A file system mounted at `folder`; the file `filler` takes its free space."""

    folder: Path

    @property
    def filler(self) -> Path:
        return self.folder / "filler"

    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def leave(self, left: int) -> None:
        """Leave `left` bytes free."""
        if (size := self.free() - left) > 0:
            with self.filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)

    def leave_files(self, left: int) -> None:
        """Leave room for `left` more files."""
        self.make_room()
        used = os.statvfs(self.folder)
        self.remount(f"nr_inodes={used.f_files - used.f_ffree + left}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True, capture_output=True)

    def reset(self) -> None:
        """Empty the disk and make it writable."""
        self.remount("rw,nr_inodes=100000")
        for found in self.folder.iterdir():
            shutil.rmtree(found) if found.is_dir() else found.unlink()


@contextmanager
def small_disk(folder: Path, size: int = 64 << 20) -> Iterator[Disk]:
    """A small disk; the test is skipped if mounting is not permitted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if sys.platform == "linux" else None
    if done is None or done.returncode != 0:
        pytest.skip(f"file systems may not be mounted here ({done.stderr.strip() if done else sys.platform})")
    try:
        yield Disk(folder)
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
