"""A folder lock allows one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.locks import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from mlem_diffusion.experiment.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]), "a long run")
lock.take(shared=sys.argv[2] == "shared")
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, kind: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_the_message_names_the_first(tmp_path: Path):
    process = holder(tmp_path)
    try:
        with pytest.raises(
            UserError, match=rf"in use by another run \(a long run, process {process.pid} on .*wait for it"
        ):
            FolderLock(tmp_path, "report").take(patience=0)
    finally:
        process.kill()
        process.wait()
    lock = FolderLock(tmp_path, "report")
    lock.take(patience=1)  # no lock outlives its process
    assert f"report, process {os.getpid()}" in (tmp_path / ".lock").read_text()
    lock.release()


def test_some_runs_share_a_folder(tmp_path: Path):
    process = holder(tmp_path, "shared")
    try:
        lock = FolderLock(tmp_path, "another job")
        lock.take(shared=True, patience=0)
        lock.release()
        with pytest.raises(UserError, match="in use by another run"):
            FolderLock(tmp_path, "a run of its own").take(patience=0)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def test_a_run_waits_for_a_holder_that_is_ending(tmp_path: Path):
    process = holder(tmp_path)
    process.kill()
    lock = FolderLock(tmp_path, "next")
    lock.take(patience=5)
    process.wait()
    lock.release()


def test_a_run_that_is_alone_removes_leftovers_of_killed_writers(tmp_path: Path):
    left = tmp_path / "deep" / ".x.json.1.partial"
    left.parent.mkdir()
    left.write_text("half")
    lock = FolderLock(tmp_path, "a job")
    lock.take(shared=True)
    lock.release()
    assert left.exists()
    lock.take()
    lock.release()
    assert not left.exists()


def test_a_folder_that_cannot_be_created_gives_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(UserError, match="cannot be written"):
        FolderLock(tmp_path / "file" / "folder", "run").take()
