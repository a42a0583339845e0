"""A stage that was killed or stopped ends with the files of an undisturbed one when it is run again."""

import signal
import time
from pathlib import Path

import pytest
from forked import Forked, descendants, is_alive
from pipeline import Place, outputs

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are read from /proc")
SOON = 10.0  # seconds within which a run must end after a stop signal


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
    run = Forked(stage, place.overrides("workers=1"), tmp_path, kill_at=event)
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
    run = Forked(stage, place.overrides(f"workers={workers}"), tmp_path)
    run.signal_when(lambda: any(watched.rglob(begun)), number)
    started = time.monotonic()
    code = run.wait()
    assert time.monotonic() - started < SOON and code in (0, 75), run.text()
    assert code == 0 or "run the same command again" in run.text()
    here(stage, place)
    assert outputs(place, stage) == outputs(done[0], stage)


def test_workers_end_with_their_parent(done, tmp_path):
    place = before(done[0], "train_levels", tmp_path)
    run = Forked("train_levels", place.overrides("workers=2", "train.images=64000"), tmp_path)
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
