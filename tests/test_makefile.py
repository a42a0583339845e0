"""The Makefile's targets, tested with make -n: which commands run, with which arguments."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import STAGES as PIPELINE
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

NAMES = ["train-levels", "measure-gamma", "optimise", "sample-compare", "report", "sample", "publish"]
STAGES = {"data": "prepare_data"} | {name: name.replace("-", "_") for name in NAMES}
OWN = "EXPERIMENT SEEDS SOURCE ARGS DRY_RUN NPROC VENV PYTHON MAKEFLAGS MAKEOVERRIDES MFLAGS".split()  # noqa: SIM905


def commands(*arguments: str, **environment: str) -> list[list[str]]:
    """The scripts that a target would run, as argument lists after shell parsing."""
    env = {k: v for k, v in os.environ.items() if k not in OWN} | environment
    command = ["make", "-n", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if "scripts/" in line]


def only(*arguments: str, **environment: str) -> list[str]:
    found = commands(*arguments, **environment)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(("target", "script"), STAGES.items())
def test_each_target_runs_its_script_on_the_experiment(target, script):
    command = only(target, "EXPERIMENT=celeba64")
    assert command[:3] == [".venv/bin/python", f"scripts/{script}.py", "experiment=celeba64"]
    assert not any("dry_run" in word for word in command)
    command = only(target, "ARGS=-m train.seed=0,1 force=true", "DRY_RUN=1")
    assert command[2] == "-m"  # Hydra's parser takes no override after a flag that follows one
    assert command[-2:] == ["train.seed=0,1", "force=true"] and "dry_run=true" in command


def test_the_demo_runs_every_stage_in_order():
    found = commands("demo", "DRY_RUN=1", "ARGS=-m force=true")
    assert [Path(c[1]).stem for c in found] == [stage for stage in PIPELINE if stage != "sample"]
    assert all(c[2:] == ["-m", "experiment=demo", "dry_run=true", "force=true"] for c in found)
    assert all("experiment=smoke" in c for c in commands("demo", "EXPERIMENT=smoke"))


def test_celeba_is_the_default_of_data_and_benchmark_and_rates_have_none():
    assert only("verify-rates", "EXPERIMENT=celeba64") == [".venv/bin/python", "scripts/verify_rates.py"]
    found = only("verify-rates", "ARGS=-m rates.gammas=[2],[3] force=true", "DRY_RUN=1")
    assert found[2:] == ["-m", "dry_run=true", "rates.gammas=[2],[3]", "force=true"]
    assert only("benchmark") == [".venv/bin/python", "scripts/benchmark.py", "experiment=celeba64"]
    assert only("data", "SOURCE=download")[2] == "experiment=celeba64"
    assert only("data", "EXPERIMENT=demo")[2] == "experiment=demo"
    assert only("benchmark", EXPERIMENT="celeba32")[2] == "experiment=celeba32"
    assert not any(word.startswith("data.source") for word in only("data"))


@pytest.mark.parametrize("seeds", ["0-63", "5", "3,7,100-120", "$x", "1;2 `id`"])
def test_seeds_are_passed_on_as_one_hydra_value(seeds):
    word = next(w for w in only("sample", f"SEEDS={seeds}") if w.startswith("seeds="))
    override = OverridesParser.create().parse_overrides([word])[0]
    assert not override.is_sweep_override() and str(override.value()) == seeds


@pytest.mark.parametrize("source", ["download", "a b (1), c=d#e.zip", 'it\'s "é"', "$x$(y", "a\\b", "~/faces"])
def test_any_source_reaches_the_configuration_unchanged(source, tmp_path):
    """An interpreter of our own shows what it gets."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf \'%s\\n\' "$3" "$MLEM_SOURCE"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "--no-print-directory", "data", f"VENV={tmp_path}", f"SOURCE={source}"]
    shown = subprocess.check_output(command, cwd=ROOT, text=True, env={"PATH": os.environ["PATH"]})
    assert shown.splitlines() == ["data.source=${oc.env:MLEM_SOURCE}", source]


def test_a_dry_run_is_one_that_was_asked_for():
    words = ("1", "true", "yes", "0", "false", "no")
    dry = ["dry_run=true" in only("report", f"DRY_RUN={word}") for word in words]
    assert dry == [True] * 3 + [False] * 3


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_wrong_number_of_processes_is_one_sentence(number):
    command = ["make", "-n", "train-levels", f"NPROC={number}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"NPROC={number} must be" in done.stderr


@pytest.mark.parametrize("target", ["train-levels", "optimise", "sample-compare", "sample"])
def test_several_processes_are_launched_together(target):
    command = only(target, "NPROC=4", "EXPERIMENT=celeba64", "ARGS=-m train.seed=0,1")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert command[:6] == [".venv/bin/python", *ranks]
    assert command[6:9] == [f"scripts/{STAGES[target]}.py", "-m", "experiment=celeba64"]
    assert command[-1] == "train.seed=0,1"
    for alone in (only(target, "NPROC=1"), only("report", "NPROC=4")):
        assert alone[0] == ".venv/bin/python" and alone[1].startswith("scripts/")


def test_help_lists_every_target_and_experiment():
    shown = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in {*targets, *STAGES, "demo", "test"}:
        assert re.search(rf"^\s+{target}\s", shown, flags=re.MULTILINE), target
    for path in (ROOT / "configs" / "experiment").glob("*.yaml"):
        assert path.stem in shown
    for variable in ("EXPERIMENT", "ARGS", "DRY_RUN", "SOURCE", "SEEDS"):
        assert variable in shown


def test_set_up_happens_automatically_and_once_per_interpreter(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in OWN}
    python, planned = tmp_path / "venv" / "bin" / "python", []
    python.parent.mkdir(parents=True)
    for target in (sys.executable, tmp_path / "gone"):
        (tmp_path / "venv" / ".installed").touch()
        python.unlink(missing_ok=True)
        python.symlink_to(target)
        command = ["make", "-n", "report", f"VENV={tmp_path}/venv"]
        planned.append(subprocess.check_output(command, cwd=ROOT, env=env, text=True))
    assert "-m venv" not in planned[0] and "pip" not in planned[0] and "-m venv" in planned[1]
    command = ["make", "report", f"VENV={tmp_path}/new", f"PYTHON={shutil.which('false')}"]  # as an old Python
    run = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert run.returncode == 2 and "Python 3.10 or later" in run.stderr + run.stdout and not (tmp_path / "new").exists()
