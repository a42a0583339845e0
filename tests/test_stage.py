"""What surrounds a stage: ranks that do not come, signals, streams, the commit, the user's modules, W&B."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from mlem_diffusion import parallel
from mlem_diffusion.errors import SlowPath, UserError
from mlem_diffusion.experiment import config, stage
from mlem_diffusion.experiment.stage import guarded, report
from mlem_diffusion.experiment.tracking import Tracker, bar, stop_asked

RANK = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
WRONG = [("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("RANK", "2"), ("MASTER_PORT", "70000")]


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("RANK", None), ("MASTER_ADDR", None), ("MASTER_ADDR", "")])
def test_a_wrong_variable_of_torchrun_is_named(capsys, monkeypatch, name: str, value: str | None):
    for key, text in {**RANK, name: value}.items():
        monkeypatch.delenv(key, raising=False) if text is None else monkeypatch.setenv(key, text)
    with pytest.raises(SystemExit, match="2"):
        guarded("train", lambda: None)
    assert f"variable {name} is" in capsys.readouterr().err


@pytest.mark.parametrize(("patience", "after", "status"), [(0.2, 60, 2), (60, 1, 75)])
def test_a_rank_without_peers_ends_after_a_while_or_by_a_signal(tmp_path, monkeypatch, patience, after, status):
    def alone() -> None:
        sys.stderr = (tmp_path / "log").open("w")
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            guarded("train", lambda: None)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)  # type: ignore[arg-type]

    for key, text in RANK.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setattr(parallel, "PATIENCE", patience, raising=False)
    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    process.join(20)
    process.kill()
    assert process.exitcode == status
    assert {2: "unset WORLD_SIZE", 75: "waiting for 2"}[status] in (tmp_path / "log").read_text()


def test_a_peer_that_died_is_one_sentence(capsys):
    assert report("train", RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer")) == 75
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_fit_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # stands for the limit of a container
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    config.set_up_device(SimpleNamespace(device="cpu", threads=None, autotune=True), training=False)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


STREAMS = [lambda: None, lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), lambda: open("/dev/full", "w")]  # noqa: SIM115


@pytest.mark.parametrize("stream", STREAMS)
def test_messages_that_cannot_be_shown_do_not_end_a_run(monkeypatch, stream):
    def work() -> None:
        print("\u03b3 = 2.5", flush=True)
        with bar("sample", 2) as progress:
            progress(1, 2)
            progress.refresh()
        done.append(1)

    done: list[int] = []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    guarded("sample", work)
    assert done == [1]


@pytest.mark.parametrize(("before", "stops"), [(lambda *_: None, True), (signal.SIG_IGN, False)])  # False: nohup
def test_a_terminal_that_closes_stops_a_run_unless_nohup(before, stops):
    asked, old = [], signal.signal(signal.SIGHUP, before)
    guarded("sample", lambda: [os.kill(os.getpid(), signal.SIGHUP), asked.append(stop_asked())])  # type: ignore
    signal.signal(signal.SIGHUP, old)
    assert asked == [stops]


def test_the_commit_is_that_of_our_own_repository(tmp_path, monkeypatch):
    def git(folder: Path, *words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(config, "ROOT", own := tmp_path / "own")
    own.mkdir()
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "around")
    assert config.commit() == "unknown (not a git checkout)"
    git(own, "init")
    assert "not have any commits" in config.commit()
    git(own, "commit", "--allow-empty", "-m", "own")
    expected = git(own, "rev-parse", "HEAD")
    if os.geteuid() == 0:
        os.chown(own / ".git", 12345, 12345)  # git itself now refuses: dubious ownership
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # of a hook
    assert config.commit() == expected
    monkeypatch.setenv("PATH", "")
    assert config.commit() == "unknown (git cannot be run)"


def test_scripts_do_not_hide_modules_of_the_user(tmp_path, monkeypatch):
    (script := tmp_path / "scripts" / "sample.py").parent.mkdir()
    script.write_text("import mlem_diffusion.experiment.stage as s\ns.stage()(lambda exp: None)")
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])  # as Python does
    with pytest.raises(SystemExit, match="2"):  # a copy of the folder that runs the code of another
        runpy.run_path(str(script), run_name="__main__")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert str(script.parent) not in sys.path


class Fake:
    """A stand-in for the module wandb that remembers what it gets."""

    Image, Settings = staticmethod(lambda path: ("image", path)), SimpleNamespace
    Table = staticmethod(lambda dataframe: ("table", dataframe.to_numpy().tolist()))

    def __init__(self) -> None:
        self.got: list[Any] = []

    def init(self, **options: Any) -> Fake:
        self.options = options
        return self

    def log(self, record: dict[str, Any]) -> None:
        self.got.append(record)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axis = (name, step_metric)

    def finish(self) -> None:
        self.got.append("finished")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder: Path, mode: str = "offline", **config: Any) -> Tracker:
    return Tracker(folder, "train", {"name": "demo", **config}, mode, "mlem")


def test_wandb_gets_what_the_file_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
    tracker(tmp_path / "new", "disabled").log({"before": float("nan")})
    run = tracker(tmp_path / "new")
    run.log({"loss": 0.5})
    tracker(tmp_path / "new", "disabled").log({"loss": 0.25})  # of a worker
    assert [[*r.values()] for r in records(tmp_path / "new")] == [["train", None], ["train", 0.5], ["train", 0.25]]
    (tmp_path / "new" / "t.csv").write_text("name,error\na,0.5\n,\n")
    run.log({"grid": "grids/sde.png", "table": "t.csv"})
    run.finish()
    files = {"grid": ("image", str(tmp_path / "new/grids/sde.png")), "table": ("table", [["a", 0.5], [None, None]])}
    assert fake.got == [{"loss": 0.5}, {"loss": 0.25}, files, "finished"]
    wanted = {"name": "demo-train", "mode": "offline", "group": "demo", "job_type": "train"}
    assert fake.options.items() >= wanted.items() and fake.options["settings"].resume == "allow"
    assert fake.axis == ("train/*", "train/images_seen")


def test_a_stopped_stage_continues_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
    tracker(tmp_path, seed=1, max_minutes=9).log({"loss": 0.5})  # then it is killed, and so are its workers:
    tracker(tmp_path, "disabled", seed=1).log({"loss": 0.25})
    Tracker(tmp_path, "another", {}, "disabled", "mlem").log({"other": 1})
    first = fake.options["id"]
    tracker(tmp_path, seed=1).log({"loss": 0.125})
    assert fake.options["id"] == first and [r["loss"] for r in fake.got] == [0.5, 0.25, 0.125]
    tracker(tmp_path, seed=2).log({"loss": 1.0})  # another run
    for damaged in ("{", "[]", "{}", json.dumps({tracker(tmp_path, seed=2).key: 3})):
        next((tmp_path / "cache").iterdir()).write_text(damaged)
        tracker(tmp_path, seed=2).log({"loss": 2.0})
        assert fake.got[-1] == {"loss": 2.0} and fake.options["id"] != first
    assert len(fake.got) == 8


@pytest.mark.parametrize("error", [OSError("down"), SystemExit(1), KeyError()])
@pytest.mark.parametrize("call", ["init", "log", "finish", ""])  # "": not installed
def test_a_wandb_that_fails_is_one_warning(tmp_path: Path, monkeypatch, call: str, error: BaseException):
    monkeypatch.setitem(sys.modules, "wandb", (fake := Fake()) if call else None)
    if call:
        monkeypatch.setattr(fake, call, Mock(side_effect=error))
    run = tracker(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3):
            run.log({"i": i})
        run.finish()
    assert [w.category for w in caught] == [SlowPath] and "W&B is off" in str(caught[0].message)
    assert [r["i"] for r in records(tmp_path)] == [0, 1, 2]


def test_a_full_disk_is_one_sentence(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written"):
        tracker(tmp_path, "disabled").log({"loss": 1.0})


def test_offline_wandb_makes_a_run_folder(tmp_path: Path):
    pytest.importorskip("wandb")
    (tmp_path / "t.csv").write_text("name,error\na,0.5\n,\n")
    Image.new("RGB", (2, 2)).save(tmp_path / "grid.png")
    run = tracker(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        run.log({"loss": 1.0, "table": "t.csv", "grid": "grid.png"})
        run.finish()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run.id}/*.wandb"))  # as wandb sync expects
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/*/*"))) == 2


@pytest.mark.parametrize(("name", "value", "used"), [
    ("WANDB_MODE", "", "offline"), ("WANDB_MODE", "Online", "online"), ("WANDB_DISABLED", "true", None),
])  # fmt: skip
def test_the_mode_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, used: str | None):
    monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    tracker(tmp_path, os.environ.get("WANDB_MODE", "offline")).log({"loss": 1.0})
    assert vars(fake).get("options", {}).get("mode") == used
    assert used is None or os.environ["WANDB_MODE"] == used  # W&B reads it too, and refuses others
