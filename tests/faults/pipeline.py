"""Helpers of the fault tests: run a stage of the miniature pipeline, inject a fault, and compare the output."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "experiment=smoke", "threads=1", "family.widths=[2,3,4]", "train.images=640", "train.log_every=128",
    "train.save_every=0.1", "compare.num_samples=24", "gamma.bootstrap=10", "optimise.methods=[quadrature]",
]  # fmt: skip
# keys that depend on times, dates or machines
TIMES = re.compile(r"second|finished|date|timing|commit|device|duration|content_sha256|^outputs$|^cpu$|threads|workers")
TIMED = {"compare.png", "ablation.png", "report.html", "diagnostics.json"}  # files that depend on seconds
NOISE = re.compile(
    r"\d+%\|| \[\d\d:\d\d|^\s*$|it/s\]|img/s\]|resource_tracker"
)  # progress bars, and Python's messages about killed workers


@dataclass
class Place:
    """A folder for everything that the scripts write."""

    folder: Path
    more: list[str] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.folder / "results" / "smoke"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / "smoke"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def arguments(self, *more: str) -> list[str]:
        paths = [f"paths.{kind}='{self.folder}/{kind}/${{name}}'" for kind in ("results", "checkpoints")]
        return [*SMALL, *paths, f"paths.data='{self.folder}/data'", *self.more, *more]

    def copy_to(self, folder: Path, link: bool = False) -> Place:
        """Copy the place. With link, files are hard links: safe only if they are replaced, never changed in place."""

        def copy(source: str, target: str) -> None:
            if link and not source.endswith((".jsonl", ".lock")):
                os.link(source, target)
            else:
                shutil.copy2(source, target)

        shutil.copytree(self.folder, folder, copy_function=copy)
        return Place(folder, self.more)

    def contents(self, which: str = "") -> dict[str, Any]:
        """The content of every file whose name matches the pattern, without times and dates."""
        files = (
            p
            for p in sorted(self.folder.rglob("*"))
            if p.is_file() and not p.name.endswith(".lock") and "wandb" not in p.parts
        )
        named = ((str(p.relative_to(self.folder)), p) for p in files)
        return {name: content_of(p) for name, p in named if re.search(which, name)}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not TIMES.search(k)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def content_of(path: Path) -> Any:
    """A file's content without times and dates."""
    if path.name in TIMED or path.name.startswith("seconds-"):
        return "there"
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return [without_times(dict(row)) for row in csv.DictReader(io.StringIO(path.read_text()))]
    if path.suffix == ".npz":
        with np.load(path) as stored:
            found: dict[str, Any] = {name: stored[name] for name in stored.files}
        for name in ("costs", "facts"):
            if name in found:
                found[name] = without_times(json.loads(str(found[name])))
        found.pop("seconds", None)
        return {k: v if isinstance(v, dict) else (v.shape, str(v.dtype), v.tobytes()) for k, v in found.items()}
    if path.suffix == ".pt":
        return without_times(tree(torch.load(path, map_location="cpu", weights_only=True)))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(value: Any) -> Any:
    """The value with tensors as bytes, because pickles of equal tensors may differ."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {str(k): tree(v) for k, v in value.items()}
    return [tree(v) for v in value] if isinstance(value, (list, tuple)) else value


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """A description of the first five files that differ; empty if none does."""
    out = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    out += [f"{name} is left over" for name in found.keys() - wanted.keys()]
    out += [f"{name} differs" for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    return "; ".join(sorted(out)[:5])


@dataclass
class Run:
    """The result of a command."""

    code: int
    out: str
    err: str
    seconds: float
    events: int | None = None  # number of events that touched files

    @property
    def lines(self) -> list[str]:
        """The lines on stderr without progress bars."""
        text = self.err.replace("\x1b[A", "")
        return [line for part in text.splitlines() if not NOISE.search(line := part.split("\r")[-1].strip())]

    @property
    def sentence(self) -> str:
        """The single sentence that ended the run; empty if it did not end in one, or printed a traceback."""
        messages = [line for line in self.lines if " was damaged, so it is computed again" not in line]
        return messages[0] if len(messages) == 1 and self.code in (2, 75, 130) and "Traceback" not in self.err else ""

    def __str__(self) -> str:
        return f"status {self.code}, {self.seconds:.1f} s: {' / '.join(self.lines)[-400:]}"


class Forker:
    """Starts scripts within milliseconds (forker.py), one at a time; use several forkers for several scripts."""

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        usual = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT / "src")}
        environment = {**os.environ, **usual, **environment}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults" / "forker.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.pid, self.lock = 0, threading.Lock()

    def __call__(
        self, script: str, arguments: list[str], during: Callable[[int], object] | None = None, **order: Any
    ) -> Run:
        """Run a script to its end. during(pid) is called once it has started; forker.py lists the other options."""
        with self.lock:
            out, err = self.folder / "out", self.folder / "err"
            order |= {"script": script, "arguments": arguments, "out": str(out), "err": str(err)}
            started = time.monotonic()
            self._send(order)
            self.pid = self._answer()["pid"]
            if during is not None:
                during(self.pid)
            answer = self._answer()
            seconds = time.monotonic() - started
            texts = [path.read_text(errors="replace") for path in (out, err)]
            return Run(answer["status"], *texts, seconds, answer["events"])

    def _send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the forker has died"
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(stat.parent.name))
    own = parents.get(pid, [])
    return [*own, *(grandchild for child in own for grandchild in children(child))]
