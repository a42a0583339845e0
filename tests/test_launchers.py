"""One level per job (submitit, joblib), several processes of one script, and several jobs that prepare images."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
TINY = """# @package _global_
defaults: [smoke, _self_]
name: tiny
family: {widths: [2, 3], gaussian: false}
train: {images: 256}
"""
SAMPLER = "sampler={dynamics: sde, step_rule: ddpm, estimator: single, levels: w3, steps: 6}"


@dataclass(frozen=True)
class Place:
    """A folder for everything, with its own experiment, because overrides would name folders in a sweep."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results" / "tiny"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / "tiny"

    def words(self, script: str, *more: str) -> list[str]:
        experiments = self.folder / "configs" / "experiment"
        experiments.mkdir(parents=True, exist_ok=True)
        (experiments / "tiny.yaml").write_text(TINY)
        paths = [f"paths.{kind}='{self.folder}/{kind}/${{name}}'" for kind in ("results", "checkpoints", "data")]
        sweep, more = [word for word in more if word == "-m"], tuple(word for word in more if word != "-m")
        where = f"hydra.searchpath=['file://{self.folder}/configs']"
        return [f"{ROOT}/scripts/{script}.py", *sweep, where, "experiment=tiny", *paths, "threads=1", *more]

    def __call__(self, script: str, *more: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        several = [f"{ROOT}/scripts/launch.py", str(processes)] if processes > 1 else []
        return run([*several, *self.words(script, *more)], self.folder)

    def here(self, script: str, *more: str) -> str:
        """Run a script in this process, which has the imports already; return its output."""
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.chdir(self.folder)
            patch.setenv("WANDB_MODE", "disabled")
            patch.setattr(sys, "argv", self.words(script, *more))
            GlobalHydra.instance().clear()
            importlib.import_module(script).main()
        return output.getvalue()


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    more = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env={**os.environ, **more}, capture_output=True, text=True, timeout=200)


def level_per_job(place: Place, launcher: str, *more: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher") is None:
        pytest.skip(f"hydra's launcher for {launcher.split('_')[0]} is not installed")
    done = place("train_levels", "-m", "only=w2,w3", f"hydra/launcher={launcher}", *more)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two levels trained by two jobs of submitit on this machine."""
    place = Place(tmp_path_factory.mktemp("jobs"))
    level_per_job(place, "submitit_local", "hydra.launcher.timeout_min=5")
    return place


@pytest.fixture(scope="module")
def trained(jobs: Place) -> tuple[Place, str]:
    """The same place after a run without jobs, and the output of that run."""
    before = {path: path.stat().st_mtime_ns for path in jobs.checkpoints.rglob("*")}
    assert [
        name for name in ("provenance.json", "training.png", "metrics.jsonl") if (jobs.results / name).exists()
    ] == []
    output = jobs.here("train_levels")
    assert {path: path.stat().st_mtime_ns for path in jobs.checkpoints.rglob("*")} == before
    return jobs, output


def test_jobs_share_one_folder_and_leave_shared_files_unchanged(jobs):
    assert sorted(path.name for path in jobs.checkpoints.iterdir()) == ["w2", "w3"]
    for name in ("w2", "w3"):
        folder = jobs.checkpoints / name
        assert {"ema.safetensors", "metadata.json", "state.pt", "config.yaml"} <= {p.name for p in folder.iterdir()}
        assert (jobs.results / "training" / f"{name}-0000000256-ema.png").is_file()
    data = jobs.folder / "data" / "tiny"
    assert sorted(path.name for path in data.iterdir()) == ["images.npy", "manifest.json", "split.npy"]
    assert [path.name for path in data.parent.iterdir()] == ["tiny"]  # no lock is left


def test_a_run_without_jobs_finds_all_levels_trained(trained):
    place, output = trained
    assert output.splitlines()[:2] == ["w2: already trained.", "w3: already trained."]
    for name in ("provenance.json", "training.png", "config.yaml"):
        assert (place.results / name).is_file(), name
    records = [json.loads(line) for line in (place.results / "metrics.jsonl").read_text().splitlines()]
    assert (
        {r["level"] for r in records if "loss" in r}
        == {r["level"] for r in records if "held_out_loss" in r}
        == {"w2", "w3"}
    )
    assert all(r["stage"] == "train_levels" for r in records)
    assert not list((place.results / "jobs").glob("*/metrics.jsonl"))  # taken over, once


def test_joblib_trains_the_same(trained, tmp_path):
    place = Place(tmp_path)
    level_per_job(place, "joblib", "hydra.launcher.n_jobs=2")
    for name in ("w2", "w3"):
        a, b = (load_file(p.checkpoints / name / "ema.safetensors") for p in (place, trained[0]))
        assert a.keys() == b.keys() and all(bool((a[key] == b[key]).all()) for key in a)


def test_a_missing_level_gives_one_sentence_for_all_processes(trained):
    done = trained[0]("train_levels", "only=[w2,w9]", processes=2)
    sentence = "train_levels: only=['w2', 'w9']: there is no level w9; the family has w2, w3.\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, sentence, "")


def test_a_dry_run_counts_the_selected_levels(trained):
    output = trained[0].here("train_levels", "only=w3", "dry_run=true")
    assert "train w3" in output and "train w2" not in output


def test_two_processes_draw_the_images_of_one(trained):
    place, words = trained[0], ("sample", SAMPLER, "seeds='0-8'", "compare.batch=2", "force=true")

    def pictures() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (place.results / "samples").glob("*.png")}

    assert "sample: 9 images" in place.here(*words)
    one = pictures()
    for path in (place.results / "samples").iterdir():
        path.unlink()
    done = place(*words, processes=2)
    assert done.returncode == 0 and done.stdout.count("sample: 9 images") == 1, done.stderr[-3000:]
    assert len(one) == 10 and pictures() == one


# ---------------------------------------------------------------------------------- how processes end

ENDS = """
import sys
sys.path.insert(0, {scripts!r})
from mlem_diffusion.experiment import processes
from mlem_diffusion import parallel

class Stopped(Exception):
    pass

def work():
    if parallel.rank() in {failing}:
        raise ValueError
    parallel.gather({{parallel.rank(): 1}})

def report(error):
    print(f"{{type(error).__name__}} on one", file=sys.stderr)
    return 2

processes.together(work, report, Stopped)
"""


@pytest.mark.parametrize("failing", [[1], [0, 1]])
def test_an_error_ends_all_processes_and_is_reported_once(tmp_path, failing):
    script = tmp_path / "script.py"
    script.write_text(ENDS.format(scripts=str(ROOT / "scripts"), failing=failing))
    done = run([f"{ROOT}/scripts/launch.py", "2", str(script)], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "ValueError on one\n")


# ----------------------------------------------------------------------------------------- one folder of images

PREPARE = """
import sys, time
from pathlib import Path
from mlem_diffusion.data import images
folder, me = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{me}").touch()
while not all((folder / f"ready-{other}").exists() for other in "01"):
    time.sleep(0.01)
drawn = []
settings = dict(name="p", size=8, holdout=20, count=600, progress=lambda *_: drawn.append(1))
manifest = images.prepare("portraits", folder / "packed", **settings)
assert images.load(folder / "packed").manifest == manifest
print(int(bool(drawn)))
"""


def test_two_processes_that_prepare_one_folder_draw_its_images_once(tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    more: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": str(ROOT / "src")}, "text": True}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, me], **pipes, **more) for me in "01"]
    ended = [process.communicate(timeout=100) for process in started]
    assert not any(process.returncode for process in started), ended
    assert sorted(out.strip() for out, _ in ended) == ["0", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "ready-0", "ready-1"]
