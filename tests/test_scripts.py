"""The scripts end to end on the miniature experiment: artefacts, formats, reuse of finished work, and wrong input."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from mlem_diffusion.files import SEAL, write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

STAGES = ["prepare_data", "train_levels", "measure_gamma", "optimise", "sample_compare", "sample", "report"]
RECORDED = ["train_levels", "measure_gamma", "optimise", "sample_compare"]  # in provenance.json
COMPARE_COLUMNS = [
    "dynamics",
    "step_rule",
    "estimator",
    "probabilities",
    "coins",
    "c",
    "switch",
    "levels",
    "steps",
    "seed",
    "error",
    "error_se",
    "distance",
    "distance_name",
    "distance_floor",
    "num_samples",
    "network_calls",
    "gflops_expected",
    "gflops_realised",
    "seconds",
]


@dataclass(frozen=True)
class Place:
    """A folder for everything that the scripts write."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results" / "smoke"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / "smoke"

    def overrides(self, *more: str) -> list[str]:
        paths = [f"paths.{kind}='{self.folder}/{kind}/${{name}}'" for kind in ("results", "checkpoints")]
        small = ["train.images=640", "compare.num_samples=24", "gamma.bootstrap=10", "threads=1"]
        sweep = [word for word in more if word == "-m"]
        more = tuple(word for word in more if word != "-m")
        return [*sweep, "experiment=smoke", *paths, f"paths.data='{self.folder}/data'", *small, *more]

    def copy_to(self, folder: Path) -> Place:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Place(folder)

    def digest(self) -> dict[str, str]:
        """The hash of every file, to detect what a command changed."""
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name != ".lock")
        return {str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


DRIVER = """
import json, runpy, sys
sys.path.insert(0, "scripts")
for script, arguments in json.loads(sys.argv[1]):
    sys.argv = [f"scripts/{script}.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_apart(place: Place, *scripts: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run scripts from the repository's root, all in one new process, because importing torch takes seconds."""
    return run_python("-c", DRIVER, json.dumps([[script, place.overrides(*more)] for script, *more in scripts]))


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The single line on stderr, without progress bars."""
        unmoved = self.err.replace("\x1b[A", "")  # bars on several lines move the cursor
        shown = [line.split("\r")[-1].strip() for line in unmoved.splitlines()]
        lines = [line for line in shown if line and not re.search(r"\d+%\|| \[\d\d:\d\d", line)]
        assert len(lines) == 1, self.err
        return lines[0]


class Here:
    """Runs a script's main in this process, which imports torch only once."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.capsys, self.monkeypatch = capsys, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setenv("WANDB_MODE", "disabled")

    def __call__(self, script: str, place: Place, *more: str) -> Run:
        module = importlib.import_module(script)
        self.monkeypatch.setattr(sys, "argv", [f"{script}.py", *place.overrides(*more)])
        GlobalHydra.instance().clear()
        self.capsys.readouterr()
        code = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        caught = self.capsys.readouterr()
        return Run(code, caught.out, caught.err)


@pytest.fixture
def here(capsys, monkeypatch, tmp_path_factory) -> Iterator[Here]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Here(capsys, monkeypatch, tmp_path_factory.mktemp("cwd"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """The pipeline, run once, and its output."""
    place = Place(tmp_path_factory.mktemp("pipeline"))
    scripts = [(stage, *(["seeds='0-2,5'"] if stage == "sample" else [])) for stage in STAGES]
    finished = run_apart(place, *scripts)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    assert "Traceback" not in finished.stderr and "Warning" not in finished.stderr, finished.stderr
    return place, finished.stdout


def strict(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    content = json.loads(path.read_text(), parse_constant=refuse)
    if isinstance(content, dict):
        content.pop(SEAL, None)
    return content


# ------------------------------------------------------------------------------------------------- artefacts


def test_every_stage_prints_where_its_results_are(done):
    place, printed = done
    for stage in RECORDED:
        assert re.search(rf"^{stage}: done in \d+ s; see {re.escape(str(place.results))}/$", printed, re.MULTILINE)
    assert "data: 320 images of 8x8" in printed and "sample: 4 images in" in printed
    assert f"report: {place.results / 'report.html'}" in printed


def test_all_artefacts_exist(done):
    place, _ = done
    expected = [
        "gamma.json", "gamma.png", "compare.csv", "compare.png", "speedup.json", "best.json", "provenance.json",
        "plans.json", "plans.npz", "gains.png", "diagnostics.json", "ablation.json", "ablation.png",
        "diagnostics-sde.png", "diagnostics-ode.png", "verdicts.json",
        "metrics.jsonl", "report.html", "training.png", "grids/sde.png", "grids/ode.png",
        "config.yaml",
        *(f"training/w{w}-{seen:010d}-ema.png" for w in range(2, 7) for seen in (192, 320, 640)),
        *(f"samples/{seed:06d}.png" for seed in (0, 1, 2, 5)), "samples/grid.png", "samples/samples.json",
    ]  # fmt: skip
    assert [name for name in expected if not (place.results / name).is_file()] == []
    for width in range(2, 7):
        folder = place.checkpoints / f"w{width}"
        for name in ("ema.safetensors", "state.pt", "metadata.json", "config.yaml"):
            assert (folder / name).is_file(), name
    assert {"images.npy", "split.npy", "manifest.json"} <= {p.name for p in (place.folder / "data").iterdir()}
    for path in place.results.rglob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) >= 8
    assert not any(".partial" in p.name for p in place.folder.rglob("*"))


def test_metadata_of_a_level(done):
    place, _ = done
    flops = []
    manifest = strict(place.folder / "data" / "manifest.json")
    for width in range(2, 7):
        m = strict(place.checkpoints / f"w{width}" / "metadata.json")
        assert m["name"] == f"w{width}" and m["width"] == width and m["images"] == 640
        assert m["data_sha256"] == manifest["sha256"] and m["data_rms"] == manifest["rms"]
        assert [s["images"] for s in m["snapshots"]] == [192, 320, 640]
        assert all((place.checkpoints / f"w{width}" / s["file"]).is_file() for s in m["snapshots"])
        flops.append(m["flops"])
    assert flops == sorted(flops)


def test_format_of_gamma_json(done):
    place, _ = done
    gamma = strict(place.results / "gamma.json")
    assert set(gamma["estimates"]) == {"loss_fit", "differences", "to_largest"}
    for entry in gamma["estimates"].values():
        assert entry["gamma"] is None or isinstance(entry["gamma"], float)
        assert isinstance(entry["interval"], list) and len(entry["interval"]) == 2
    assert gamma["htmc"] in ("yes", "no", "undetermined")
    assert [level["width"] for level in gamma["levels"]] == [2, 3, 4, 5, 6]
    for level in gamma["levels"]:
        assert {"width", "gflop", "images", "loss"} <= set(level)
        assert level["images"] == 640 and 0 < level["loss"] < 1 and 0 < level["gflop"] < 1
    assert isinstance(gamma["per_noise_level"], list) and len(gamma["per_noise_level"]) == 5
    assert [entry["images"] for entry in gamma["training_lengths"]] == [[n] * 5 for n in (192, 320, 640)]


def test_format_of_compare_csv(done):
    place, _ = done
    with (place.results / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
        file.seek(0)
        header = next(csv.reader(file))
    assert header == [*COMPARE_COLUMNS, "top_evaluations", "plan", "predicted", "largest_effect", "selected_error"]
    assert {(r["dynamics"], r["estimator"]) for r in rows} == {
        (d, k) for d in ("sde", "ode") for k in ("single", "ml_em", "stitched", "quadrature")
    }
    # the Gaussian denoiser of the training images is a level, and alone a baseline
    assert {r["levels"] for r in rows if r["estimator"] == "single"} == {"gauss", "w2", "w3", "w4", "w5", "w6"}
    for row in rows:
        assert row["num_samples"] == "24" and row["seed"] == "1000"
        for name in ("error", "error_se", "network_calls", "gflops_expected", "gflops_realised", "seconds"):
            assert float(row[name]) > 0, (name, row)
        assert row["distance_name"] and row["distance_name"] != "FID" and float(row["distance"]) >= 0
        assert float(row["distance_floor"]) >= 0
        if row["estimator"] == "single":
            assert row["probabilities"] == row["coins"] == row["c"] == ""
            assert float(row["network_calls"]) == int(row["steps"])
            assert float(row["gflops_realised"]) == pytest.approx(float(row["gflops_expected"]), rel=1e-5)
        if row["plan"]:
            assert row["probabilities"] in ("optimal", "measured", "learned") and row["c"] == ""
            assert row["estimator"] == ("quadrature" if row["coins"] == "" else "ml_em")
            assert row["predicted"] == "" or float(row["predicted"]) > 0
        elif row["estimator"] == "ml_em":
            assert row["probabilities"] == "constant" and row["coins"] in ("independent", "systematic")
            assert float(row["c"]) > 0
        if row["estimator"] == "ml_em":
            # per image, like the expected cost: a few standard errors of 24 images
            assert float(row["gflops_realised"]) == pytest.approx(float(row["gflops_expected"]), rel=0.25)


def test_format_of_speedup_json(done):
    place, _ = done
    result = strict(place.results / "speedup.json")
    assert set(result) == {"sde", "ode"}
    for kinds in result.values():
        assert {"paper", "any"} <= set(kinds)
        for kind in ("paper", "any"):
            for measure, costs in kinds[kind].items():
                assert measure in ("error", "distance")
                assert {"flops", "seconds"} <= set(costs)
                for entry in (costs["flops"], costs["seconds"]):
                    assert entry is None or {"max", "lower95", "at", "baseline", "ours"} <= set(entry)


def test_provenance_records_every_origin(done):
    place, _ = done
    p = strict(place.results / "provenance.json")
    assert p["experiment"] == "smoke" and set(p["stages"]) == set(RECORDED)
    assert p["data"]["source"]["name"] and p["data"]["source"]["sha256"]
    assert p["commit"] and p["device"] and p["packages"]["torch"]


def test_metrics_hold_every_stage(done):
    place, _ = done
    lines = [json.loads(line) for line in (place.results / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in lines} == set(RECORDED)
    assert {r["level"] for r in lines if "loss" in r} == {f"w{w}" for w in range(2, 7)}


def test_the_report_is_self_contained(done):
    place, _ = done
    html = (place.results / "report.html").read_text()
    assert len(html) > 10_000 and "data:image/png;base64" in html
    assert not re.search(r"(src|href)=[\"']?https?://[^\"' >]+\.(js|css|png)", html)
    assert "Levels: FLOPs, seconds and ablation" in html
    assert str(place.folder) not in html and str(ROOT) not in html


# ------------------------------------------------------------------------------------------ done stays done


@pytest.mark.parametrize("stage", ["prepare_data", *RECORDED])
def test_a_finished_stage_is_not_repeated(done, here, stage):
    place, _ = done
    before = place.digest()
    run = here(stage, place)
    assert run.code == 0
    assert place.digest() == before
    if stage != "prepare_data":
        assert "already done" in run.out


def test_the_report_and_the_samples_are_reproducible(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "again")
    before = place.digest()
    assert here("sample", place, "seeds='0-2,5'").code == 0
    assert here("report", place).code == 0
    changed = {name for name, value in place.digest().items() if before.get(name) != value}
    assert changed <= {"results/smoke/samples/samples.json"}  # it holds seconds


def test_force_repeats_a_results_stage_with_the_same_result(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "forced")
    gamma = (place.results / "gamma.json").read_text()
    (place.results / "gamma.png").unlink()
    run = here("measure_gamma", place, "force=true")
    assert run.code == 0 and "already done" not in run.out
    assert (place.results / "gamma.json").read_text() == gamma and (place.results / "gamma.png").is_file()


def test_changed_settings_are_measured_again(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "changed")
    run = here("measure_gamma", place, "gamma.images=32")
    assert run.code == 0 and "already done" not in run.out
    assert strict(place.results / "gamma.json")["held_out_images"] == 32


def test_interrupted_training_resumes_to_the_same_weights(done, here, tmp_path):
    whole = done[0]
    place = Place(tmp_path / "stopped")
    shutil.copytree(whole.folder / "data", place.folder / "data")
    widths = "family.widths=[2,3]"
    run = here("train_levels", place, widths, "max_minutes=0")
    assert run.code == 75
    assert "stopped after 64 of 640 images" in run.complaint and "run the same command again" in run.complaint
    assert not (place.checkpoints / "w2" / "metadata.json").exists()
    assert here("measure_gamma", place, widths).code == 2  # half a family is not a family
    codes = []
    for minutes in (0, 0, 0.0005):
        codes.append(here("train_levels", place, widths, f"max_minutes={minutes}").code)
    assert set(codes) <= {0, 75}
    assert here("train_levels", place, widths).code == 0
    for width in (2, 3):
        for path in (whole.checkpoints / f"w{width}").glob("*.safetensors"):
            a, b = load_file(path), load_file(place.checkpoints / f"w{width}" / path.name)
            assert all((a[name] == b[name]).all() for name in a), path.name
        a, b = (strict(p.checkpoints / f"w{width}" / "metadata.json") for p in (whole, place))
        for key in ("history", "snapshots", "held_out", "flops", "images"):
            assert a[key] == b[key], key


def test_an_interrupted_comparison_resumes(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "compare")
    shutil.rmtree(place.results / "cache")
    for name in ("compare.csv", "speedup.json"):
        (place.results / name).unlink()
    run = here("sample_compare", place, "max_minutes=0")
    assert run.code == 75 and "finished batches are saved" in run.complaint
    assert not (place.results / "compare.csv").exists()
    assert here("sample_compare", place).code == 0

    def without_times(folder: Path) -> list[dict[str, str]]:
        with (folder / "compare.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

    assert without_times(place.results) == without_times(done[0].results)


@pytest.mark.parametrize("script", ["prepare_data", "train_levels", "measure_gamma"])
def test_a_family_of_functions_needs_no_images_and_no_training(here, tmp_path, script):
    place = Place(tmp_path)
    run = here(script, place, "family.callable={_target_: mlem_diffusion.models.analytic.analytic_family}")
    assert run.code == 0 and "nothing to do" in run.out
    assert not place.digest()


def test_changed_plans_are_compared_again(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "plans")
    assert "already done" in here("sample_compare", place).out
    plans = strict(place.results / "plans.json")
    plans["plans"][0]["selected_error"] *= 2
    write_json(place.results / "plans.json", plans)
    run = here("sample_compare", place)
    assert run.code == 0 and "already done" not in run.out


# --------------------------------------------------------------------------------------------- side by side


def train_two_at_a_time(place: Place, *more: str) -> Run:
    """Train in a separate program, because worker processes import the script again by its path."""
    run = run_python("scripts/train_levels.py", *place.overrides("family.widths=[2,3]", "workers=2", *more))
    assert "\x1b[A" in run.stderr  # the second level's bar has a line of its own
    return Run(run.returncode, run.stdout, run.stderr)


def test_levels_that_train_in_parallel_are_bit_identical(done, tmp_path):
    place = Place(tmp_path / "two")
    shutil.copytree(done[0].folder / "data", place.folder / "data")
    run = train_two_at_a_time(place)
    assert run.code == 0 and "Traceback" not in run.err, run.err
    for level in ("w2", "w3"):
        files = [p.checkpoints / level / "ema.safetensors" for p in (done[0], place)]
        assert files[0].read_bytes() == files[1].read_bytes()
        a, b = (strict(p.checkpoints / level / "metadata.json") for p in (done[0], place))
        assert a["history"] == b["history"] and a["held_out"] == b["held_out"]
    assert (place.results / "training.png").is_file()
    assert set(strict(place.results / "provenance.json")["stages"]) == {"train_levels"}


def test_an_error_in_a_worker_is_one_line_and_exit_status_2(done, tmp_path):
    place = Place(tmp_path / "diverged")
    shutil.copytree(done[0].folder / "data", place.folder / "data")
    run = train_two_at_a_time(place, "train.lr=1e20", "train.log_every=64")
    assert run.code == 2, run.err
    assert re.fullmatch(
        r"train_levels: The loss of width [23] is not finite at step \d+ \(\d+ images\), .*: lower train.lr .*",
        run.complaint,
    )
    assert not list(place.checkpoints.rglob("metadata.json"))
    assert not (place.results / "provenance.json").exists()


# --------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_prints_configuration_and_cost_and_writes_nothing(here, tmp_path, stage):
    place = Place(tmp_path / "dry")
    run = here(stage, place, "dry_run=true")
    assert run.code == 0, run.err
    assert "name: smoke" in run.out and "widths:" in run.out and f"estimated cost of {stage}" in run.out
    if stage in ("train_levels", "measure_gamma", "sample_compare"):
        found = re.search(rf"estimated cost of {stage}\s+([\d.]+) TFLOP", run.out)
        assert found and float(found.group(1)) > 0
    assert not place.folder.exists()
    assert list(Path.cwd().iterdir()) == []


# ----------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("stage", "more", "sentence"),
    [
        ("measure_gamma", [], "make train-levels"),
        ("optimise", [], "make train-levels"),
        ("sample_compare", [], "make train-levels"),
        ("sample", [], "make train-levels"),
        ("prepare_data", ["data.source=/nowhere/images.zip"], "/nowhere/images.zip"),
        ("prepare_data", ["data.source=???"], "make data SOURCE="),
        ("train_levels", ["data.source=???"], "make data SOURCE="),
        ("prepare_data", ["data.holdout=400"], "data.holdout=400"),
        ("train_levels", ["train.leer=1"], None),  # Hydra's own message
        ("train_levels", ["+train.leer=1"], "leer"),
        ("train_levels", ["process.spacing=even"], "process.spacing"),
        ("train_levels", ["family.target=score"], "'score' is unknown"),
        ("train_levels", ["unet.multipliers=[1,2,2,2,2]"], "cannot be halved"),
        ("train_levels", ["device=cuda:99"], "device=cuda:99"),
        ("train_levels", ["device=abacus"], "device=abacus"),
        ("report", [], ""),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_status_2(here, tmp_path, stage, more, sentence):
    run = here(stage, Place(tmp_path / "wrong"), *more)
    if sentence is None:
        assert run.code == 1 and "leer" in run.err
        return
    assert run.code == 2, run.err
    assert run.complaint.startswith(f"{stage}: ") and sentence in run.complaint


@pytest.mark.parametrize(
    ("stage", "more", "sentence"),
    [
        ("train_levels", ["train.lr=0.1"], "overwrite=true"),
        ("measure_gamma", ["family.widths=[2,3,4,9]"], "w9"),
        ("measure_gamma", ["family.widths=[2,3]"], "at least three levels"),
        ("sample_compare", ["compare.gamma=often"], "neither a number nor auto"),
        ("sample_compare", ["compare.num_samples=1"], ""),
        ("sample_compare", ["compare.seed=499999"], "were selected on sample seeds that"),
        ("sample", ["seeds=many"], "SEEDS=many is not a list of seeds"),
        ("sample", ["sampler=heun"], "sampler must be best"),
        ("sample", ["sampler={dynamics: ode}"], "sampler lacks the key"),
        ("sample", ["precision=half"], "precision = 'half' is unknown"),
        ("sample", ["sampler={dynamics: ode, step_rule: ddim, estimator: single, levels: w6, steps: 51}"], "51"),
    ],
)
def test_wrong_requests_on_a_finished_experiment(done, here, stage, more, sentence):
    place = done[0]
    before = place.digest()
    run = here(stage, place, *more)
    assert run.code == 2, run.out + run.err
    assert run.complaint.startswith(f"{stage}: ") and sentence in run.complaint
    changed = {n for n, v in place.digest().items() if before.get(n) != v and "cache" not in n}
    assert changed <= {"results/smoke/metrics.jsonl"}


def test_levels_of_another_data_set_are_refused(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "other")
    shutil.rmtree(place.folder / "data")
    for stage in ("measure_gamma", "sample_compare"):
        run = here(stage, place, "data.seed=1")
        assert run.code == 2 and "is not the data set that the levels" in run.complaint


def test_overwrite_trains_again(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "anew")
    run = here("train_levels", place, "train.lr=0.001", "overwrite=true", "train.images=128", "family.widths=[2]")
    assert run.code == 0, run.err
    metadata = strict(place.checkpoints / "w2" / "metadata.json")
    assert metadata["images"] == 128 and [s["images"] for s in metadata["snapshots"]] == [64, 128]


# ----------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_over_training_writes_to_folders_of_its_own(done, here, tmp_path):
    place = Place(tmp_path / "sweep")
    shutil.copytree(done[0].folder / "data", place.folder / "data")
    run = here("train_levels", place, "-m", "train.seed=0,1", "train.images=64", "family.widths=[2,3,4]")
    assert run.code == 0, run.err
    folders = sorted(p for p in place.checkpoints.rglob("w2"))
    assert len(folders) == 2
    a, b = (load_file(folder / "ema.safetensors") for folder in folders)
    assert any((a[name] != b[name]).any() for name in a)
    assert len(list(place.results.rglob("provenance.json"))) == 2
    # the same sweep of the next stage finds each job's levels
    run = here("measure_gamma", place, "-m", "train.seed=0,1", "train.images=64", "family.widths=[2,3,4]")
    assert run.code == 0, run.err
    assert len(list(place.results.rglob("gamma.json"))) == 2


def test_a_sweep_over_later_stages_shares_the_levels(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "sweep")
    before = place.digest()
    run = here("measure_gamma", place, "-m", "gamma.seed=0,1")
    assert run.code == 0, run.err
    found = sorted(place.results.rglob("gamma.json"))
    own = [p for p in found if p.parent != place.results]
    assert len(own) == 2 and own[0].read_text() != own[1].read_text()
    after = place.digest()
    assert all(after[name] == value for name, value in before.items())  # the unswept results stay as they were
    assert not (Path.cwd() / "multirun.yaml").exists()


# ----------------------------------------------------------------------------------------------------- sample


def test_a_sample_is_keyed_by_its_seed(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "one")
    first = (place.results / "samples" / "000005.png").read_bytes()
    shutil.rmtree(place.results / "samples")
    assert here("sample", place, "seeds=5").code == 0
    assert (place.results / "samples" / "000005.png").read_bytes() == first
    assert sorted(p.name for p in (place.results / "samples").glob("0*.png")) == ["000005.png"]


def test_a_sampler_can_be_named(done, here, tmp_path):
    place = done[0].copy_to(tmp_path / "named")
    sampler = (
        "sampler={dynamics: ode, step_rule: ddim, estimator: ml_em, levels: w2+w4+w6, steps: 8, c: 4, "
        "coins: systematic}"
    )
    run = here("sample", place, sampler, "seeds=0-1")
    assert run.code == 0, run.err
    facts = strict(place.results / "samples" / "samples.json")
    assert facts["setting"]["levels"] == "w2+w4+w6" and facts["seeds"] == [0, 1]


def best_by_plan(place: Place, kind: str) -> dict[str, Any]:
    """Make best.json name a plan with this kind of coins; return its entry in plans.json."""
    entry = next(
        e for e in strict(place.results / "plans.json")["plans"] if e["method"] == kind and "gauss" in e["levels"]
    )
    best = strict(place.results / "best.json")
    best |= {"plan": entry["id"], "levels": "+".join(entry["levels"]), "coins": "" if kind == "quadrature" else kind}
    best |= {k: entry[k] for k in ("dynamics", "step_rule", "steps", "probabilities")} | {"c": None}
    best["estimator"] = "quadrature" if kind == "quadrature" else "ml_em"
    write_json(place.results / "best.json", best)
    return entry


def test_precision_is_checked_level_by_level_and_on_the_frontier(done, here, tmp_path):
    place = done[0].copy_to(tmp_path)
    run = here("check_precision", place, "workers=1")
    assert run.code == 0, run.err
    found = strict(place.results / "precision.json")
    assert [level["level"] for level in found["levels"]] == ["w2", "w3", "w4", "w5", "w6"]
    assert all(0 < level["worst_ratio"] < 10 for level in found["levels"])  # bf16 is not float32, nor nonsense
    assert found["samples"] == 16 and {row["dynamics"] for row in found["settings"]} == {"sde", "ode"}
    for row in found["settings"]:
        assert row["change"] == pytest.approx(row["error_bf16"] - row["error_float32"])
        assert abs(row["change"]) < 0.3 * row["error_float32"] + 1e-4
    assert (place.results / "precision.png").is_file()
    assert set(found["speedup"]) == {"float32", "bf16"}
    assert "precision: float32" in (place.results / "config.yaml").read_text()
    assert "already done" in here("check_precision", place).out


@pytest.mark.parametrize("kind", ["quadrature", "independent"])
def test_the_best_sampler_may_be_a_plan(done, here, tmp_path, kind):
    place = done[0].copy_to(tmp_path / "planned")
    entry = best_by_plan(place, kind)
    run = here("sample", place, "seeds=0-7")
    assert run.code == 0, run.err
    facts = strict(place.results / "samples" / "samples.json")
    assert facts["setting"]["plan"] == entry["id"] and facts["setting"]["steps"] == entry["steps"]
    if kind == "quadrature":  # fixed weights: every image has the plan's cost
        assert facts["per_image"]["gflops"] == pytest.approx(entry["cost"] / 1e9)
    dry = here("sample", place, "seeds=0-7", "dry_run=true")
    assert dry.code == 0 and all(f"sample with {name}" in dry.out for name in entry["levels"])


@pytest.mark.parametrize("gone", ["plans.json", "plans.npz", "the plan"])
def test_a_missing_best_plan_gives_one_sentence(done, here, tmp_path, gone):
    place = done[0].copy_to(tmp_path / "gone")
    entry = best_by_plan(place, "systematic")
    if gone == "the plan":
        path = place.results / "plans.json"
        content = strict(path)
        content["plans"] = [e for e in content["plans"] if e["id"] != entry["id"]]
        write_json(path, content)
    else:
        (place.results / gone).unlink()
    run = here("sample", place, "seeds=1")
    assert run.code == 2 and run.complaint.startswith("sample: ") and "make optimise" in run.complaint


# --------------------------------------------------------------------------------- plans of a family of one's own


@dataclass(frozen=True)
class Analytic(Place):
    """Three levels of the analytic family, compared on seeds 0..31, without data, checkpoints or images."""

    @property
    def results(self) -> Path:
        return self.folder / "results" / "analytic"

    def overrides(self, *more: str) -> list[str]:
        o = {
            "calibrate": 16, "calibrate_steps": 17, "num_select": 24, "plans": 3, "diagnose": "{seeds: 16, steps: 6}",
            "rules": "[{dynamics: sde, step_rule: ddpm, steps: [5, 17], learn: true}, "
                     "{dynamics: ode, step_rule: dpmpp_2m, steps: [9]}]",
            "measured": "{costs: [8], steps: [17]}",
            "learned": "{costs: [8], steps: 17, iterations: 2, paths: 2, draws: 2}",
        }  # fmt: skip
        c = {
            "num_samples": 32, "num_reference": 32, "seed": 0, "bootstrap": 20, "stitched": "[]", "ml_em": "[]",
            "baselines": "[{dynamics: sde, step_rule: ddpm, levels: all, steps: [5, 9]}]",
        }  # fmt: skip
        return [
            "experiment=analytic", "threads=1", "process.base_steps=65", "family.callable.levels=3",
            *(f"paths.{kind}='{self.folder}/{kind}/${{name}}'" for kind in ("results", "checkpoints", "data")),
            *(f"optimise.{key}={value}" for key, value in o.items()),
            *(f"compare.{key}={value}" for key, value in c.items()), *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def analytic(tmp_path_factory: pytest.TempPathFactory) -> Analytic:
    place = Analytic(tmp_path_factory.mktemp("analytic"))
    finished = run_apart(place, ("optimise",), ("sample_compare",))
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    assert "Traceback" not in finished.stderr and "Warning" not in finished.stderr, finished.stderr
    return place


def test_plans_are_selected_and_judged_on_separate_seeds(analytic):
    content = strict(analytic.results / "plans.json")
    assert content["seeds_used"] == list(range(500000, 500024)) and content["tried"] >= len(content["plans"])
    assert content["calibration"]["flops"] > content["calibration"]["gains_flops"] > 0
    kinds = {(e["dynamics"], e["method"], e["probabilities"]) for e in content["plans"]}
    for dynamics in ("sde", "ode"):
        for method in ("independent", "nested", "systematic", "quadrature"):
            assert (dynamics, method, "optimal") in kinds
    assert {("sde", "independent", "measured"), ("sde", "independent", "learned")} <= kinds
    assert {(e["dynamics"], e["steps"]) for e in content["plans"] if e["probabilities"] == "optimal"} <= {
        ("sde", 5), ("sde", 17), ("ode", 9)
    }  # fmt: skip
    for entry in content["plans"]:
        assert entry["selected_error"] > 0 and entry["cost"] > 0 and set(entry["levels"]) <= {"f1", "f2", "f3"}


def test_every_plan_is_a_row_of_the_comparison(analytic):
    with (analytic.results / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    entries = {e["id"]: e for e in strict(analytic.results / "plans.json")["plans"]}
    planned = [row for row in rows if row["plan"]]
    assert {row["plan"] for row in planned} == set(entries) and len(rows) - len(planned) == 6
    for row in planned:
        entry = entries[row["plan"]]
        assert row["levels"] == "+".join(entry["levels"]) and int(row["steps"]) == entry["steps"]
        assert float(row["gflops_expected"]) == pytest.approx(entry["cost"] / 1e9, rel=1e-4)
        assert (
            float(row["largest_effect"]) == pytest.approx(entry["largest_effect"], rel=1e-4) and row["distance"] == ""
        )
        if entry["predicted"] is not None:
            assert float(row["predicted"]) == pytest.approx(entry["predicted"], rel=1e-4)
        # judged on 32 other seeds than those of the selection: within a factor of a few, even for large effects
        assert 0.1 < float(row["error"]) / entry["selected_error"] < 10
        if row["estimator"] == "quadrature":
            assert float(row["gflops_realised"]) == pytest.approx(float(row["gflops_expected"]), rel=1e-5)
    assert all(row["predicted"] == row["largest_effect"] == "" for row in rows if not row["plan"])


def test_the_verdicts_cover_the_planned_rules(analytic):
    found = strict(analytic.results / "verdicts.json")
    assert set(found) == {"sde/ddpm", "ode/dpmpp_2m"}
    assert "any" in found["sde/ddpm"]["against_em"] and found["ode/dpmpp_2m"]["against_em"] == {}
    assert found["sde/ddpm"]["predicted_error"]["quadrature"]["rows"] >= 1
    assert not (analytic.results / "best.json").exists()  # without distances there is no best sampler


def test_seeds_that_plans_were_selected_on_cannot_judge_them(analytic, here):
    before = analytic.digest()
    run = here("sample_compare", analytic, "compare.seed=500020")
    assert run.code == 2 and run.complaint.startswith("sample_compare: The plans were selected on sample seeds that")
    changed = {name for name, value in analytic.digest().items() if before.get(name) != value}
    assert changed <= {"results/analytic/metrics.jsonl"}


def test_plans_can_be_left_out(analytic, here, tmp_path):
    place = Analytic(analytic.copy_to(tmp_path / "without").folder)
    assert here("sample_compare", place, "compare.plans=none", "compare.seed=500020").code == 0
    with (place.results / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and not any("plan" in row for row in rows)


def test_finished_plans_are_not_optimised_again(analytic, here):
    before = analytic.digest()
    for stage in ("optimise", "sample_compare"):
        run = here(stage, analytic)
        assert run.code == 0 and "already done" in run.out
    assert analytic.digest() == before
    dry = here("sample_compare", analytic, "dry_run=true")
    assert dry.code == 0 and "ode quadrature dpmpp_2m" in dry.out and analytic.digest() == before


def test_the_ablation_is_written(analytic):
    content, plans = strict(analytic.results / "ablation.json"), strict(analytic.results / "plans.json")
    assert [level["name"] for level in content["levels"]] == ["f1", "f2", "f3"]
    for level in content["levels"]:
        assert level["seconds"] == plans["timing"]["seconds"][level["name"]] > 0
        ratio = level["cost_ratio_flops"]
        assert ratio is None if level["name"] == "f3" else set(ratio) == {"sde/ddpm", "ode/dpmpp_2m"}
        for w in (ratio or {}).values():
            assert w["largest"] >= w["mean"] >= 1 - 1e-12 and w["errors"][0] < w["errors"][1]
    assert content["kept"]["flops"][-1] == content["kept"]["seconds"][-1] == "f3"
    assert plans["cost_unit"] == "flops" and content["batch"] == plans["timing"]["batch"] > 1
    for e in plans["plans"]:  # each in its own unit
        low, high = (f(plans["timing"]["seconds"].values()) * e["steps"] for f in (min, sum))
        assert 0.99 * low < e["seconds"] < 2 * high
    with Image.open(analytic.results / "ablation.png") as image:
        assert min(image.size) > 400


SECONDS = {"f1": 1e-3, "f2": 3e-2, "f3": 1e-2}  # the middle level takes longer than the largest


def test_plans_in_seconds(analytic, here, tmp_path, monkeypatch):
    """Levels are timed once; seconds choose and later judge the plans, which still record their FLOPs."""
    place, optimise = Analytic(tmp_path / "seconds"), importlib.import_module("optimise")
    calls = []

    def seconds(family: Any, *rest: Any) -> list[float]:
        calls.append([level.name for level in family])
        return [SECONDS[level.name] for level in family]

    monkeypatch.setattr(optimise, "seconds_per_image", seconds)
    short = ["optimise.cost=seconds", "optimise.rules=[{dynamics: sde, step_rule: ddpm, steps: [5, 17], learn: true}]"]
    run = here("optimise", place, *short)
    assert run.code == 0, run.err
    assert calls == [["f1", "f2", "f3"]] and "In seconds f1 + f3 earn their place; removed, in order: f2." in run.out
    content = strict(place.results / "plans.json")
    assert content["cost_unit"] == "seconds" and content["timing"]["seconds"] == SECONDS
    assert strict(place.results / "ablation.json")["kept"]["seconds"] == ["f1", "f3"]
    optimal = [e for e in content["plans"] if e["probabilities"] == "optimal"]
    assert optimal and not any("f2" in e["levels"] for e in optimal)
    in_flops = strict(analytic.results / "plans.json")["plans"]
    assert any("f2" in e["levels"] for e in in_flops if e["probabilities"] == "optimal")
    assert {e["probabilities"] for e in content["plans"]} >= {"optimal", "measured"}
    groups = {(e["dynamics"], e["method"], e["probabilities"]) for e in content["plans"]}
    for group in groups:  # a frontier of errors on the selection seeds over seconds
        mine = [e for e in content["plans"] if (e["dynamics"], e["method"], e["probabilities"]) == group]
        mine.sort(key=lambda e: e["seconds"])
        assert all(a["selected_error"] > b["selected_error"] for a, b in pairwise(mine))
    # compared, and then planned again without measuring
    assert here("sample_compare", place).code == 0
    with (place.results / "compare.csv").open(newline="") as file:
        rows = {row["plan"]: row for row in csv.DictReader(file) if row["plan"]}
    assert set(rows) == {e["id"] for e in content["plans"]}
    for e in content["plans"]:
        assert float(rows[e["id"]]["gflops_expected"]) == pytest.approx(e["cost"] / 1e9, rel=1e-4)
        if e["method"] == "quadrature":  # fixed weights: whole numbers of evaluations
            counts = float(rows[e["id"]]["network_calls"])
            assert min(SECONDS.values()) * counts <= e["seconds"] <= max(SECONDS.values()) * counts
    method = strict(place.results / "verdicts.json")["sde/ddpm"]
    assert method["unit"] == "seconds" and strict(analytic.results / "verdicts.json")["sde/ddpm"]["unit"] == "flops"
    assert "seconds" in (method["optimiser_against_em"]["worst"] or {"seconds": None})
    assert here("optimise", place, *short, "force=true").code == 0 and len(calls) == 1
    assert strict(place.results / "plans.json")["plans"] == content["plans"]


def test_no_plan_if_all_levels_take_equal_time(here, tmp_path, monkeypatch):
    """The largest level alone is the best plan in this case."""
    place = Analytic(tmp_path / "equal")
    monkeypatch.setattr(
        importlib.import_module("optimise"), "seconds_per_image", lambda family, *_: [1e-3] * len(family)
    )
    run = here("optimise", place, "optimise.cost=seconds", "optimise.methods=[independent]")
    assert run.code == 0, run.err
    assert strict(place.results / "ablation.json")["kept"]["seconds"] == ["f3"]
    assert not [e for e in strict(place.results / "plans.json")["plans"] if e["probabilities"] == "optimal"]


@pytest.mark.parametrize("more", [[], ["dry_run=true"]])
def test_an_unknown_unit_of_cost_gives_one_sentence(here, tmp_path, more):
    run = here("optimise", Analytic(tmp_path), "optimise.cost=joules", *more)
    assert run.code == 2 and run.complaint == "optimise: optimise.cost = joules is unknown; expected flops or seconds."


def test_samples_that_are_not_pictures_are_refused(analytic, here):
    named = "sampler={dynamics: ode, step_rule: ddim, estimator: single, levels: f1, steps: 4}"
    run = here("sample", analytic, named)
    assert run.code == 2 and "are not pictures in RGB" in run.complaint


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("5", [5]),
        (7, [7]),
        ("3,7,10-12", [3, 7, 10, 11, 12]),
        (" 1 , 2-3", [1, 2, 3]),
        ("1,1-2", [1, 2]),
    ],
)
def test_valid_seeds(text, seeds):
    from sample import parse_seeds

    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1--2", "5-3", "0-3,7-5", "1.5", "0-x", "1,,2"])
def test_invalid_seeds(text):
    from sample import parse_seeds

    from mlem_diffusion.errors import UserError

    with pytest.raises(UserError, match=r"0-63 or 3,7,100-120"):
        parse_seeds(text)


def test_a_reference_must_be_finer_than_every_rule():
    from optimise import check

    from mlem_diffusion.errors import UserError

    cfg = OmegaConf.create({"optimise": {"cost": "flops", "reference_steps": 64, "rules": [{"steps": [8, 64]}]}})
    stage: Any = SimpleNamespace(cfg=cfg)
    with pytest.raises(UserError, match=r"reference_steps = 64 must be more than .* 64"):
        check(stage)
    cfg.optimise.reference_steps = 65
    check(stage)


# ------------------------------------------------------------------------------------------------ small helpers


def test_paths_inside_the_root_are_shown_relative_to_it(tmp_path):
    from mlem_diffusion.experiment import stage as common

    assert common.shown(ROOT / "results" / "demo") == Path("results/demo")
    assert common.shown(tmp_path) == tmp_path


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (7200, "2.0 h")])
def test_duration_formatting(seconds, text):
    from mlem_diffusion.experiment import stage as common

    assert common.duration(seconds) == text


def test_a_signal_asks_for_a_stop_and_a_second_one_stops_now():
    from mlem_diffusion.experiment import stage as common
    from mlem_diffusion.experiment.interrupts import Interrupts

    stage = object.__new__(common.Stage)
    stage._interrupts, stage.cfg, stage.started = Interrupts(), type("C", (), {"max_minutes": None})(), 0.0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stage.catch_signals()
        assert not stage.should_stop()
        signal.raise_signal(signal.SIGTERM)
        assert stage.should_stop()
        signal.raise_signal(signal.SIGTERM)  # a launcher's duplicate of the first
        stage._interrupts.asked -= 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stage.let_signals_be()
    assert handlers == {number: signal.getsignal(number) for number in handlers}
