"""Records of a run: metrics.jsonl is always written, and nothing that W&B does can stop it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from mlem_diffusion.tracking import Tracker


def records(folder: Path) -> list[dict]:
    def no_constants(name: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {name}")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constants) for line in lines]


def test_metrics_are_written_with_wandb_disabled(tmp_path: Path):
    with Tracker(tmp_path / "run", "train", {"name": "x"}, mode="disabled") as tracker:
        tracker.log({"loss": 0.5, "level": "w4"})
        tracker.image("grid", tmp_path / "missing.png")
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


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init) -> None:
    module = types.ModuleType("wandb")
    module.Settings = lambda **k: k  # type: ignore[attr-defined]
    module.Image = lambda path: path  # type: ignore[attr-defined]
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_wandb_that_does_not_start_is_a_warning(tmp_path: Path, monkeypatch):
    def fail(**_: object) -> None:
        raise ConnectionError("no network")

    fake_wandb(monkeypatch, fail)
    with pytest.warns(UserWarning, match="no network"):
        tracker = Tracker(tmp_path, "train", {}, mode="online")
    tracker.log({"loss": 1.0})
    tracker.image("grid", tmp_path / "metrics.jsonl")
    tracker.finish()
    assert records(tmp_path) == [{"stage": "train", "loss": 1.0}]


def test_a_wandb_that_is_not_installed_is_a_warning(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="W&B is off"):
        tracker = Tracker(tmp_path, "train", {})
    tracker.log({"loss": 1.0})
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_wandb_that_breaks_later_is_a_warning(tmp_path: Path, monkeypatch, where: str):
    class Run:
        sent: list = []  # noqa: RUF012

        def log(self, record: dict) -> None:
            if where == "log":
                raise OSError("disk full")
            self.sent.append(record)

        def finish(self) -> None:
            if where == "finish":
                raise OSError("disk full")

    asked: dict = {}

    def init(**options: object) -> Run:
        asked.update(options)
        return Run()

    fake_wandb(monkeypatch, init)
    with pytest.warns(UserWarning, match="disk full"):
        tracker = Tracker(tmp_path, "train", {"name": "demo", "lr": 1}, mode="offline", project="p")
        tracker.log({"loss": 1.0})
        tracker.log({"loss": 2.0})
        tracker.finish()
    assert [r["loss"] for r in records(tmp_path)] == [1.0, 2.0]
    assert asked["mode"] == "offline" and asked["project"] == "p" and asked["config"] == {"name": "demo", "lr": 1}
    assert asked["name"] == "demo-train" and asked["job_type"] == "train" and asked["dir"] == str(tmp_path)


def test_offline_wandb_makes_a_run_folder(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    folder = tmp_path / "run"
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    with Tracker(folder, "train", {"name": "x", "nested": {"a": 1}}, mode="offline") as tracker:
        assert tracker.run is not None
        tracker.log({"loss": 0.5})
        tracker.image("grid", tmp_path / "grid.png")
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))
    assert list(runs[0].rglob("*.png"))
    assert records(folder) == [{"stage": "train", "loss": 0.5}]
