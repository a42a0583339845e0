"""A stage that was killed or stopped ends with the files of an undisturbed one when it is run again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline import ENVIRONMENT, ROOT, Place, outputs

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are read from /proc")
SOON = 10.0  # seconds within which a run must end after a stop signal


class Started:
    """A running script; kill_at: just before which touch of a file (driver.py)."""

    def __init__(self, script: str, place: Place, *more: str, kill_at: int = 0):
        self.log, work = place.folder / "log", json.dumps([[script, place.overrides(*more)]])
        command = [sys.executable, str(ROOT / "tests" / "driver.py"), work, str(kill_at), str(place.folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)

    def wait(self) -> int:
        """The exit status; minus the signal if it was killed."""
        return self.process.wait(120)

    def signal_when(self, ready: Callable[[], bool], number: signal.Signals) -> None:
        """Send a signal as soon as ready() is true, unless the script has ended."""
        until = time.monotonic() + 120
        while self.process.poll() is None and not ready() and time.monotonic() < until:
            time.sleep(0.02)
        self.process.send_signal(number)

    def text(self) -> str:
        return self.log.read_text()


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(grandchild for child in own for grandchild in descendants(child))]


def before(done: Place, stage: str, folder: Path) -> Place:
    """A copy of the pipeline in which this stage, or a part of the comparison, is still to do."""
    if stage == "train_levels":
        return done.copy_to(folder, "data")
    place = done.copy_to(folder)
    cache = place.results / "cache"
    for path in [*sorted(cache.glob("setting-*"))[::4], *cache.glob("reference-*"), place.results / "compare.csv"]:
        path.unlink()
    return place


@pytest.mark.parametrize(("stage", "event"), [("train_levels", 16), ("sample_compare", 33)])
def test_killed_just_before_a_file_is_touched(done, here, tmp_path, stage, event):
    place = before(done[0], stage, tmp_path)
    run = Started(stage, place, "workers=1", kill_at=event)
    assert run.wait() == -signal.SIGKILL, run.text()
    here(stage, place, "workers=1")
    assert outputs(place, stage) == outputs(done[0], stage)


@pytest.mark.parametrize(
    ("stage", "number", "begun", "workers"),
    [("train_levels", signal.SIGTERM, "ema-*.safetensors", 1), ("sample_compare", signal.SIGINT, "reference-*.npz", 2)],
)
def test_stopped_by_a_signal(done, here, tmp_path, stage, number, begun, workers):
    place = before(done[0], stage, tmp_path)
    watched = place.checkpoints if stage == "train_levels" else place.results / "cache"
    run = Started(stage, place, f"workers={workers}")
    run.signal_when(lambda: any(watched.rglob(begun)), number)
    since = time.monotonic()
    code = run.wait()
    assert time.monotonic() - since < SOON and code in (0, 75), run.text()
    assert code == 0 or "run the same command again" in run.text()
    here(stage, place)
    assert outputs(place, stage) == outputs(done[0], stage)


def test_workers_end_with_their_parent(done, tmp_path):
    place = before(done[0], "train_levels", tmp_path)
    run = Started("train_levels", place, "workers=2", "train.images=64000")
    workers: list[int] = []

    def have_begun() -> bool:
        workers[:] = descendants(run.process.pid)
        return len(workers) >= 2 and any(place.results.rglob("metrics.jsonl"))

    run.signal_when(have_begun, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and len(workers) >= 2, run.text()
    until = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_alive(pid)]
