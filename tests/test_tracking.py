"""metrics.jsonl is always written; W&B gets a copy, and never stops a run."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mlem_diffusion.errors import SlowPath, UserError
from mlem_diffusion.experiment.tracking import Tracker


class Fake:
    """A stand-in for the module wandb that remembers what it gets, or fails at one call."""

    Image, Settings = staticmethod(lambda path: ("image", path)), SimpleNamespace

    def __init__(self, failing: str = "", error: BaseException | None = None):
        self.failing, self.error, self.got = failing, error, []

    def _call(self, name: str) -> None:
        if name == self.failing and self.error is not None:
            raise self.error

    def init(self, **options: Any) -> Fake:
        self._call("init")
        self.options = options
        return self

    def log(self, record: dict[str, Any]) -> None:
        self._call("log")
        self.got.append(record)

    def finish(self) -> None:
        self._call("finish")
        self.got.append("finished")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder: Path, mode: str = "offline") -> Tracker:
    return Tracker(folder, "train", {"name": "demo"}, mode, "mlem")


def test_wandb_gets_what_the_file_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
    tracker(tmp_path / "new", "disabled").log({"before": float("nan")})
    run = tracker(tmp_path / "new")
    run.log({"loss": 0.5})
    tracker(tmp_path / "new", "disabled").log({"loss": 0.25})  # of a worker
    assert [[*r.values()] for r in records(tmp_path / "new")] == [["train", None], ["train", 0.5], ["train", 0.25]]
    Image.new("RGB", (2, 2)).save(tmp_path / "grid.png")
    run.image("grid", tmp_path / "grid.png")
    run.finish()
    picture = {"grid": ("image", str(tmp_path / "grid.png"))}
    assert fake.got == [{"stage": "train", "loss": 0.5}, picture, {"stage": "train", "loss": 0.25}, "finished"]
    assert fake.options["name"] == "demo-train" and fake.options["mode"] == "offline"


FAILURES = [Fake(name, e) for name in ("init", "log", "finish") for e in (OSError("down"), SystemExit(1), KeyError())]


@pytest.mark.parametrize("module", [*FAILURES, None])  # None: not installed
def test_a_wandb_that_fails_is_one_warning(tmp_path: Path, monkeypatch, module: Fake | None):
    monkeypatch.setitem(sys.modules, "wandb", module)
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
    run = tracker(tmp_path)
    run.log({"loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        run.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [("WANDB_MODE", "", "offline"), ("WANDB_MODE", "Online", "online"), ("WANDB_DISABLED", "true", None)],
)
def test_the_mode_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, used: str | None):
    monkeypatch.setitem(sys.modules, "wandb", fake := Fake())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    tracker(tmp_path, os.environ.get("WANDB_MODE", "offline")).log({"loss": 1.0})
    assert vars(fake).get("options", {}).get("mode") == used
    assert used is None or os.environ["WANDB_MODE"] == used  # W&B reads it too, and refuses others
