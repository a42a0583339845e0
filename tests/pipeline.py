"""Runs scripts on the miniature experiment, in this process or in one of its own, and reads what a stage wrote."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from mlem_diffusion.diffusion.level import flops_per_evaluation
from mlem_diffusion.models import family

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


# even less than the miniature: three shallow levels, nothing learned, fewer plans and settings
RULES = "{dynamics: sde, step_rule: ddpm, steps: [6, 8]}, {dynamics: ode, step_rule: dpmpp_2m, steps: [5]}"
BASELINES = "{dynamics: sde, step_rule: ddpm, levels: all, steps: [4, 8]}, "
BASELINES += "{dynamics: ode, step_rule: ddim, levels: all, steps: [8]}, "
BASELINES += "{dynamics: ode, step_rule: dpmpp_2m, levels: largest, steps: [4, 8]}"
ML_EM = "{dynamics: sde, step_rule: ddpm, families: [all, chain], coins: [independent], c: [4], steps: [8]}, "
ML_EM += "{dynamics: ode, step_rule: ddim, families: [all, chain], coins: [systematic], c: [4], steps: [8]}"
SMALLER = (
    "family.widths=[2,3,6]", "train.teacher.images=320", "unet.multipliers=[1]", "unet.attention=[8]",
    "train.images=640", "process.base_steps=65", "gamma.bootstrap=10", "compare.num_samples=24", "compare.batch=24",
    f"compare.baselines=[{BASELINES}]", f"compare.ml_em=[{ML_EM}]",
    "optimise.methods=[independent,quadrature]", "optimise.bases=[null]", "optimise.learned.costs=[]",
    "optimise.calibrate_steps=[6,8]", "optimise.measured.steps=[8]", f"optimise.rules=[{RULES}]",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder for everything that the scripts write."""

    folder: Path
    experiment: str = "smoke"
    options: tuple[str, ...] = SMALLER

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.experiment

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / self.experiment

    def overrides(self, *more: str) -> list[str]:
        paths = [f"paths.{kind}='{self.folder}/{kind}/${{name}}'" for kind in ("results", "checkpoints")]
        sweep, more = [w for w in more if w == "-m"], tuple(w for w in more if w != "-m")
        data = f"paths.data='{self.folder}/data'"
        return [*sweep, f"experiment={self.experiment}", *paths, data, "threads=1", *self.options, *more]

    def copy_to(self, folder: Path, *parts: str) -> Place:
        """A copy of the whole place, or of some of its folders."""
        for part in parts or [p.name for p in self.folder.iterdir()]:
            shutil.copytree(self.folder / part, folder / part, dirs_exist_ok=True)
        return Place(folder, self.experiment, self.options)

    def digest(self) -> dict[str, str]:
        """The hash of every file, to detect what a command changed."""
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The single line on stderr, without progress bars."""
        shown = [line.split("\r")[-1].strip() for line in self.err.replace("\x1b[A", "").splitlines()]
        lines = [line for line in shown if line and not re.search(r"\d+%\|| \[\d\d:\d\d", line)]
        assert len(lines) == 1, self.err
        return lines[0]


BLANK = Image.new("RGB", (9, 9))
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
ENVIRONMENT |= {"MPLBACKEND": "module://of_a_notebook", "PYTHONSAFEPATH": "1"}


def python(*arguments: str, **environment: str) -> Run:
    """Run Python in the repository's root, in a process of its own."""
    command, env = [sys.executable, *arguments], {**os.environ, **ENVIRONMENT, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return Run(done.returncode, done.stdout, done.stderr)


def apart(place: Place, *scripts: tuple[str, ...], before: tuple[str, ...] = ()) -> Run:
    """Run scripts one after another in one new process, or in several (before=RANKS)."""
    arguments = [[script, place.overrides(*more)] for script, *more in scripts]
    return python(*before, str(ROOT / "tests" / "driver.py"), json.dumps(arguments))


COUNTED: dict[str, float] = {}


def counted(network: nn.Module, shape: tuple[int, ...]) -> float:
    """The FLOPs of a network, counted once for each architecture."""
    key = f"{shape} {network}"
    COUNTED[key] = COUNTED.get(key) or flops_per_evaluation(network, shape)
    return COUNTED[key]


class Here:
    """Runs a script's main in this process, which has imported torch already, with empty figures."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.capsys, self.monkeypatch = capsys, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setenv("WANDB_MODE", "disabled")
        # drawing takes half of a miniature stage; the pipeline that `done` runs, and test_plots.py, draw
        # every stage counts the FLOPs of all levels, a fifth of a second each
        monkeypatch.setattr(family, "flops_per_evaluation", counted)
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: BLANK.save(file, "PNG"))

    def __call__(self, script: str, place: Place, *more: str, code: int | None = 0) -> Run:
        """Run the script, which must end with this exit status, unless it is None."""
        module = importlib.import_module(script)
        self.monkeypatch.setattr(sys, "argv", [f"{script}.py", *place.overrides(*more)])
        GlobalHydra.instance().clear()
        self.capsys.readouterr()
        status = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module.main()
            except SystemExit as stop:
                status = int(stop.code or 0)
        caught = self.capsys.readouterr()
        assert code in (None, status), caught.out + caught.err
        return Run(status, caught.out, caught.err)


def strict(path: Path) -> Any:
    """The content of a JSON file without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


TIMES = re.compile(r"second|finished|date|timing|commit|device|^config$")  # a level also records its configuration
WRITTEN = {
    "train_levels": "checkpoints/*/w*/*.*",
    "measure_gamma": "results/*/gamma.json",
    "sample_compare": "results/*/compare.csv",
    "sample": "results/*/samples/*.png",
    "report": "results/*/report.html",
}


def outputs(place: Place, stage: str) -> dict[str, Any]:
    """The content of each file that a stage wrote, without times."""
    found = {str(path.relative_to(place.folder)): content(path) for path in place.folder.glob(WRITTEN[stage])}
    assert found and not list(place.folder.rglob("*.partial")), sorted(place.folder.rglob("*"))
    return found


def content(path: Path) -> Any:
    if path.suffix in (".pt", ".html"):  # states hold times, and so do reports
        return path.stat().st_size > 0
    if path.suffix == ".json":
        return without_times(strict(path))
    if path.suffix == ".csv":
        return pd.read_csv(path).drop(columns="seconds").to_csv()
    return path.read_bytes()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not TIMES.search(k)}
    return [without_times(v) for v in value] if isinstance(value, list) else value
