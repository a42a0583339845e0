"""The Makefile's targets, tested with make -n: which commands run, with which arguments."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

STAGES = {
    "data": "prepare_data",
    "train-levels": "train_levels",
    "measure-gamma": "measure_gamma",
    "optimise": "optimise",
    "sample-compare": "sample_compare",
    "report": "report",
    "sample": "sample",
    "publish": "publish",
}
OWN = ["EXPERIMENT", "SEEDS", "SOURCE", "ARGS", "DRY_RUN", "NPROC", "VENV", "PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"]


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


def test_the_demo_runs_every_stage_in_order():
    found = commands("demo")
    stages = ["prepare_data", "train_levels", "measure_gamma", "optimise", "sample_compare", "report"]
    assert [Path(c[1]).stem for c in found] == stages
    assert all(c[2] == "experiment=demo" for c in found)
    assert all("experiment=smoke" in c for c in commands("demo", "EXPERIMENT=smoke"))


@pytest.mark.parametrize("target", [*STAGES, "demo"])
def test_overrides_and_dry_run_reach_every_script(target):
    for command in commands(target, "ARGS=-m train.seed=0,1 force=true", "DRY_RUN=1"):
        assert command[2] == "-m"  # Hydra's parser takes no override after a flag that follows one
        assert command[-2:] == ["train.seed=0,1", "force=true"]
        assert "dry_run=true" in command


def test_verify_rates_needs_no_experiment():
    assert only("verify-rates", "EXPERIMENT=celeba64") == [".venv/bin/python", "scripts/verify_rates.py"]
    found = only("verify-rates", "ARGS=-m rates.gammas=[2],[3] force=true", "DRY_RUN=1")
    assert found[2:] == ["-m", "dry_run=true", "rates.gammas=[2],[3]", "force=true"]


def test_the_benchmark_uses_the_levels_of_celeba64_by_default():
    assert only("benchmark") == [".venv/bin/python", "scripts/benchmark.py", "experiment=celeba64"]
    found = only("benchmark", "EXPERIMENT=demo", "ARGS=size=full only=[train]", "DRY_RUN=1")
    assert found[2:] == ["experiment=demo", "dry_run=true", "size=full", "only=[train]"]


def test_data_is_celeba_by_default():
    assert "experiment=celeba64" in only("data", "SOURCE=download")
    assert "experiment=demo" in only("data", "EXPERIMENT=demo")
    assert "experiment=celeba32" in only("data", EXPERIMENT="celeba32")
    assert not any(word.startswith("data.source") for word in only("data"))


@pytest.mark.parametrize("source", ["download", "a/b.zip", "my images (1), new=true.zip", "~/faces"])
def test_any_path_is_passed_on_as_one_hydra_value(source):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    command = only("data", f"SOURCE={source}")
    word = next(w for w in command if w.startswith("data.source="))
    override = OverridesParser.create().parse_overrides([word])[0]
    assert not override.is_sweep_override() and override.value() == source


@pytest.mark.parametrize("seeds", ["0-63", "5", "3,7,100-120"])
def test_any_seeds_are_passed_on_as_one_hydra_value(seeds):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    word = next(w for w in only("sample", f"SEEDS={seeds}") if w.startswith("seeds="))
    override = OverridesParser.create().parse_overrides([word])[0]
    assert not override.is_sweep_override() and str(override.value()) == seeds
    assert any(w.startswith("seeds=") and "0-63" in w for w in only("sample"))


@pytest.mark.parametrize("target", ["train-levels", "optimise", "sample-compare", "sample"])
def test_several_processes_are_launched_together(target):
    command = only(target, "NPROC=4", "EXPERIMENT=celeba64", "ARGS=-m train.seed=0,1")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert command[:6] == [".venv/bin/python", *ranks]
    assert command[6:9] == [f"scripts/{STAGES[target]}.py", "-m", "experiment=celeba64"]
    assert command[-1] == "train.seed=0,1"
    assert only(target, "NPROC=1")[:2] == [".venv/bin/python", f"scripts/{STAGES[target]}.py"]


def test_other_stages_are_one_process():
    for target in ("data", "measure-gamma", "report"):
        assert only(target, "NPROC=4")[:2] == [".venv/bin/python", f"scripts/{STAGES[target]}.py"]


def test_help_lists_every_target_and_experiment():
    env = {k: v for k, v in os.environ.items() if k not in OWN}
    done = subprocess.run(["make", "help"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in {*targets, *STAGES, "demo", "test"}:
        assert re.search(rf"^\s+{target}\s", done.stdout, flags=re.MULTILINE), target
    for path in (ROOT / "configs" / "experiment").glob("*.yaml"):
        assert path.stem in done.stdout
    for variable in ("EXPERIMENT", "ARGS", "DRY_RUN", "SOURCE", "SEEDS"):
        assert variable in done.stdout


def test_set_up_happens_automatically_and_once(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in OWN}

    def planned() -> str:
        command = ["make", "-n", "report", f"VENV={tmp_path}/venv"]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True).stdout

    assert "-m venv" in planned()
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()
    assert "-m venv" not in planned() and "pip" not in planned()
