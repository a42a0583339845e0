"""Records of a run: metrics.jsonl is always written, whatever W&B does."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment import tracking, wandb_process
from mlem_diffusion.experiment.tracking import Tracker

# A `wandb` that records its calls and misbehaves as FAKE_WANDB specifies in the function of that name.
FAKE = """
import json, os, subprocess, sys, time

WHERE, _, WHAT = os.environ.get("FAKE_WANDB", "").partition(":")

def note(what, value=None):
    with open(os.environ["FAKE_WANDB_LOG"], "a") as file:
        file.write(json.dumps([what, value]) + "\\n")

def act(where):
    if where != WHERE:
        return
    if WHAT == "hang":
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        note("helper", helper.pid)
        time.sleep(60)
    if WHAT == "exit":
        sys.exit(3)
    if WHAT == "die":
        os.kill(os.getpid(), 9)
    raise OSError("disk full,\\n so sorry")

class Run:
    def log(self, record):
        act("log")
        note("log", record)

    def finish(self):
        act("finish")
        note("finish")

def Image(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    return "image of " + path

class Settings:
    def __init__(self, **options):
        pass

def init(settings, **options):
    assert sys.stdin.read() == "" and not {"torch", "mlem_diffusion"} & set(sys.modules)
    print("clutter", flush=True)
    print("clutter", file=sys.stderr, flush=True)
    act("init")
    note("init", options)
    return Run()

act("import")
"""


def records(folder: Path) -> list[dict]:
    def no_constants(name: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {name}")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constants) for line in lines]


class Fake:
    """Replaces wandb by a fake that records its calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.notes, self.monkeypatch = folder / "fake" / "notes", monkeypatch
        (folder / "fake").mkdir()
        (folder / "fake" / "wandb.py").write_text(FAKE)
        monkeypatch.syspath_prepend(folder / "fake")
        monkeypatch.setenv("PYTHONPATH", str(folder / "fake"))
        monkeypatch.setenv("FAKE_WANDB_LOG", str(self.notes))

    def should(self, what: str) -> None:
        self.monkeypatch.setenv("FAKE_WANDB", what)

    def noted(self, what: str) -> list:
        lines = self.notes.read_text().splitlines() if self.notes.is_file() else []
        return [value for name, value in map(json.loads, lines) if name == what]

    def wait_for(self, what: str) -> list:
        until = time.monotonic() + 20
        while not self.noted(what) and time.monotonic() < until:
            time.sleep(0.05)
        return self.noted(what)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def process_of(tracker: Tracker) -> Any:
    assert tracker.wandb is not None
    return tracker.wandb.process


# -------------------------------------------------------------------------------------------------- metrics.jsonl


def test_metrics_are_written_with_wandb_disabled(tmp_path: Path):
    with Tracker(tmp_path / "run", "train", {"name": "x"}, mode="disabled") as tracker:
        tracker.log({"loss": 0.5, "level": "w4"})
        tracker.image("grid", tmp_path / "missing.png")
        assert tracker.wandb is None
    with Tracker(tmp_path / "run", "gamma", {"name": "x"}, mode="disabled") as tracker:  # appends
        tracker.log({"gamma": None})
    assert records(tmp_path / "run") == [
        {"stage": "train", "loss": 0.5, "level": "w4"},
        {"stage": "gamma", "gamma": None},
    ]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path):
    tracker = Tracker(tmp_path, "train", {}, mode="disabled")
    tracker.log({"a": float("nan"), "b": float("inf"), "c": 1.0})
    assert records(tmp_path) == [{"stage": "train", "a": None, "b": None, "c": 1.0}]


def test_fresh_drops_what_this_stage_recorded(tmp_path: Path):
    for stage in ("train", "gamma", "train"):
        Tracker(tmp_path, stage, {}, mode="disabled").log({"note": '"stage": "train"'})
    Tracker(tmp_path, "train", {}, mode="disabled", fresh=True)
    assert [record["stage"] for record in records(tmp_path)] == ["gamma"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_line_that_was_half_written_is_dropped(tmp_path: Path, fresh: bool):
    whole, line = b'{"stage": "gamma", "images": 1}\n', b'{"stage": "gamma", "images": 2}\n'
    for before in (b"", whole):
        for length in range(1, len(line)):
            (tmp_path / "metrics.jsonl").write_bytes(before + line[:length])
            Tracker(tmp_path, "train", {}, mode="disabled", fresh=fresh).log({"loss": 1.0})
            expected = [{"stage": "gamma", "images": 1}] if before else []
            assert records(tmp_path) == [*expected, {"stage": "train", "loss": 1.0}]


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path: Path):
    tracker = Tracker(tmp_path, "train", {}, mode="disabled")
    tracker.log({"loss": 1.0})
    before, limits = (tmp_path / "metrics.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left on device\)"):
            tracker.log({"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    tracker.log({"loss": 3.0})
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 3.0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        Tracker(tmp_path / "full", "train", {}, mode="disabled").log({"loss": 1.0})


def test_rewind_drops_what_is_recorded_again(tmp_path: Path):
    with Tracker(tmp_path, "gamma", {}, mode="disabled") as tracker:
        tracker.log({"level": "w4", "images": 300})
    with Tracker(tmp_path, "train", {}, mode="disabled") as tracker:
        tracker.rewind("w4", 0)
        for images in (100, 200, 300):
            tracker.log({"level": "w4", "images": images, "loss": 1.0, "lr": 0.1})
            tracker.log({"level": "w8", "images": images, "loss": 1.0, "lr": 0.1})
        tracker.log({"level": "w4", "note": "no images"})
        tracker.log({"level": "w4", "images": None})
        before = records(tmp_path)
        tracker.rewind("w4", 300)
        assert records(tmp_path) == before
        tracker.rewind("w4", 150)
    gone = [record for record in before if record not in records(tmp_path)]
    assert [(r["stage"], r["level"], r["images"]) for r in gone] == [("train", "w4", 200), ("train", "w4", 300)]
    assert [record for record in before if record not in gone] == records(tmp_path)


def record_level(folder: Path, level: str, count: int) -> Path:
    tracker = Tracker(folder, "train", {}, mode="disabled")
    for k in range(count):
        tracker.log({"level": level, "images": k, "loss": 1.0 / (k + 1)})
    tracker.log({"level": level, "note": "done"})
    return tracker.path


def test_records_of_another_process_are_taken_over_once(tmp_path: Path, monkeypatch):
    with Tracker(tmp_path, "gamma", {}, mode="disabled") as tracker:
        tracker.log({"level": "w8", "images": 7})
    with Tracker(tmp_path, "train", {}, mode="disabled") as tracker:
        tracker.log({"level": "w4", "images": 1})
        tracker.log({"level": "w8", "images": 1})  # of an earlier attempt
        other = record_level(tmp_path / "job", "w8", 3)
        other.write_bytes(other.read_bytes() + b'{"stage": "train", "le')
        with monkeypatch.context() as patch:  # killed before the other file is deleted
            patch.setattr(Path, "unlink", lambda *a, **k: None)
            tracker.take_over(other)
        first = records(tmp_path)
        assert other.is_file()
        tracker.take_over(other)
        assert not other.exists() and records(tmp_path) == first
        tracker.take_over(other)
        assert records(tmp_path) == first
    assert [(r["stage"], r["level"], r.get("images")) for r in first] == [
        ("gamma", "w8", 7), ("train", "w4", 1), ("train", "w8", 0), ("train", "w8", 1), ("train", "w8", 2),
        ("train", "w8", None),
    ]  # fmt: skip


def test_taking_over_is_one_replacement(tmp_path: Path, monkeypatch):
    tracker, other = Tracker(tmp_path, "train", {}, mode="disabled"), record_level(tmp_path / "job", "w8", 3)
    tracker.log({"level": "w8", "images": 0, "loss": 9.0})
    before = tracker.path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(tracking, "atomic_write", fail)
    with pytest.raises(OSError, match="no"):
        tracker.take_over(other)
    assert tracker.path.read_bytes() == before and other.is_file()


def test_several_processes_may_record_in_one_file_while_it_is_rewritten(tmp_path: Path):
    def log() -> None:
        tracker = Tracker(tmp_path, "train", {}, mode="disabled")
        for k in range(200):
            tracker.log({"level": "w4", "images": k})

    def rewind() -> None:
        tracker = Tracker(tmp_path, "train", {}, mode="disabled")
        for k in range(20):
            tracker.log({"level": "w8", "images": 1 + k})
            tracker.rewind("w8", 0)

    threads = [threading.Thread(target=work) for work in (log, rewind, log)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r["images"] for r in records(tmp_path)) == sorted([*range(200), *range(200)])


# -------------------------------------------------------------------------------------------------- the mirror


def test_wandb_gets_the_same_records(tmp_path: Path, fake: Fake, capfd):
    folder, image = tmp_path / "run", tmp_path / "grid.png"
    image.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Tracker(folder, "train", {"name": "demo", "lr": 1, "path": Path("a")}, "offline", "p") as tracker:
            tracker.log({"loss": 1.0})
            tracker.mirror({"loss": float("nan")})
            tracker.image("grid", image)
            tracker.image("none", tmp_path / "missing.png")
            process_of(tracker).send_signal(signal.SIGSTOP)
            tracker.image("replaced", image)
            image.unlink()
            process_of(tracker).send_signal(signal.SIGCONT)
            tracker.take_over(record_level(tmp_path / "job", "w8", 1))
    options = {"project": "p", "name": "demo-train", "job_type": "train", "mode": "offline", "dir": str(folder)}
    assert fake.noted("init") == [{**options, "config": {"name": "demo", "lr": 1, "path": "a"}}]
    logged = fake.noted("log")
    assert logged[0] == {"loss": 1.0} and logged[1]["loss"] != logged[1]["loss"]
    assert logged[-2:] == [{"level": "w8", "images": 0, "loss": 1.0}, {"level": "w8", "note": "done"}]
    assert all(set(record) == {"grid"} for record in logged[2:-2])  # if it arrived in time
    assert len(fake.noted("finish")) == 1 and capfd.readouterr() == ("", "")
    assert [r.get("loss") for r in records(folder)] == [1.0, 1.0, None]


@pytest.mark.parametrize("what", ["import:fail", "init:fail", "log:fail", "finish:fail", "init:exit", "log:die"])
def test_a_wandb_that_breaks_is_one_warning(tmp_path: Path, fake: Fake, what: str, capfd):
    fake.should(what)
    reason = {"fail": "disk full, so sorry", "exit": "3", "die": "its process ended with -9"}[what.split(":")[1]]
    with pytest.warns(UserWarning) as caught, Tracker(tmp_path, "train", {}, mode="online") as tracker:
        for k in range(3):
            tracker.log({"loss": float(k)})
    assert [str(w.message) for w in caught] == [f"W&B is off ({reason}); metrics.jsonl is still written."]
    assert [r["loss"] for r in records(tmp_path)] == [0.0, 1.0, 2.0] and capfd.readouterr() == ("", "")


def test_a_wandb_that_broke_is_noticed_at_the_next_record(tmp_path: Path, fake: Fake):
    fake.should("init:fail")
    tracker = Tracker(tmp_path, "train", {}, mode="online")
    process_of(tracker).wait(20)
    with pytest.warns(UserWarning) as caught:
        tracker.log({"loss": 1.0})
        tracker.log({"loss": 2.0})
        tracker.image("grid", tmp_path / "metrics.jsonl")
        tracker.finish()
    assert len(caught) == 1 and len(records(tmp_path)) == 2


def test_a_wandb_that_is_not_installed_is_a_warning(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning) as caught:
        tracker = Tracker(tmp_path, "train", {})
        tracker.log({"loss": 1.0})
        tracker.finish()
    assert [str(w.message) for w in caught] == ["W&B is off (not installed); metrics.jsonl is still written."]
    assert len(records(tmp_path)) == 1 and tracker.wandb is None


def test_a_process_that_cannot_be_started_is_a_warning(tmp_path: Path, fake: Fake, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.warns(UserWarning, match="W&B is off .*no-python"), Tracker(tmp_path, "train", {}) as tracker:
        tracker.log({"loss": 1.0})
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_a_wandb_that_hangs_is_ended_with_all_its_processes(tmp_path: Path, fake: Fake, monkeypatch, where: str):
    monkeypatch.setattr(tracking, "PATIENCE", 1.0)
    fake.should(f"{where}:hang")
    tracker = Tracker(tmp_path, "train", {}, mode="online")
    tracker.log({"loss": 0.0})
    if where != "finish":
        assert fake.wait_for("helper")
    for k in range(5000):  # more than a pipe holds
        tracker.log({"loss": float(k)})
    process, feeder, started = process_of(tracker), tracker.wandb.feeder, time.monotonic()  # type: ignore[union-attr]
    with pytest.warns(UserWarning) as caught:
        tracker.finish()
    assert 0.9 < time.monotonic() - started < 5
    assert [str(w.message) for w in caught] == ["W&B did not finish within 1 s; metrics.jsonl is complete."]
    assert process.returncode == -signal.SIGKILL and not feeder.is_alive()
    assert process.stdin.closed and process.stdout.closed
    until = time.monotonic() + 5
    while any(is_running(pid) for pid in fake.noted("helper")) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in fake.noted("helper"))
    assert len(records(tmp_path)) == 5001


def test_a_wandb_that_is_slow_misses_records_with_one_warning(tmp_path: Path, fake: Fake, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    monkeypatch.setattr(wandb_process, "WAITING", 10)
    fake.should("init:hang")
    with pytest.warns(UserWarning) as caught, Tracker(tmp_path, "train", {}) as tracker:
        for k in range(300):
            tracker.log({"loss": float(k), "text": "x" * 1000})
    assert [str(w.message) for w in caught] == [
        "W&B cannot keep up and misses records; metrics.jsonl has them all.",
        "W&B did not finish within 0.5 s; metrics.jsonl is complete.",
    ]
    assert len(records(tmp_path)) == 300


def test_signals_do_not_end_the_wandb_process(tmp_path: Path, fake: Fake):
    with Tracker(tmp_path, "train", {}) as tracker:
        assert fake.wait_for("init")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process_of(tracker).send_signal(number)
        tracker.log({"loss": 1.0})
    assert fake.noted("log") == [{"loss": 1.0}] and len(fake.noted("finish")) == 1


def test_trackers_leave_nothing_behind(tmp_path: Path, fake: Fake):
    for round in range(4):
        fake.should(["", "init:fail", "", "log:die"][round])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Tracker(tmp_path, "train", {}) as tracker:
                tracker.log({"loss": 1.0})
                process = process_of(tracker)
            tracker.finish()  # a second time
        assert process.returncode is not None
        state = threading.active_count(), len(os.listdir("/proc/self/fd"))
        if round == 0:
            before = state
        assert state == before


def test_offline_wandb_makes_a_run_folder(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    folder = tmp_path / "run"
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Tracker(folder, "train", {"name": "x", "nested": {"a": 1}}, mode="offline") as tracker:
            tracker.log({"loss": 0.5, "mark": "found-in-the-run"})
            tracker.image("grid", tmp_path / "grid.png")
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    (written,) = runs[0].glob("*.wandb")
    assert b"found-in-the-run" in written.read_bytes() and b"nested" in written.read_bytes()
    assert list(runs[0].rglob("*.png"))
    assert records(folder) == [{"stage": "train", "loss": 0.5, "mark": "found-in-the-run"}]
