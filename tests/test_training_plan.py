"""Budgets per level (train.narrow), levels trained again (gamma.repeats), and held-out losses at the snapshots."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from mlem_diffusion.errors import UserError
from mlem_diffusion.files import sha256_of
from mlem_diffusion.gamma.snapshots import snapshot_losses
from mlem_diffusion.models.checkpoint import save_weights
from mlem_diffusion.models.family import at_width, build_denoiser, describe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
NARROW = "train.narrow=[{upto: 3, images: 128, compile: 'off'}]"
AGAIN = ["gamma.repeats.levels=2", "gamma.repeats.seeds=[1]"]


def stage_of(*overrides: str, experiment: str = "smoke") -> Any:
    from mlem_diffusion.experiment import stage as common

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg: DictConfig = compose("train_levels", overrides=[f"experiment={experiment}", *overrides])
    stage = common.Stage.__new__(common.Stage)
    stage.cfg, stage.name, stage.device = cfg, "train_levels", torch.device("cpu")
    return stage


def test_the_first_entry_that_is_wide_enough_applies():
    settings = {"images": 9, "lr": 1.0, "narrow": [{"upto": 8, "images": 2}, {"upto": 4, "images": 1, "lr": 2.0}]}
    found = [at_width(settings, width) for width in (3, 4, 5, 8, 9)]
    assert [f["images"] for f in found] == [1, 1, 2, 2, 9] and [f["lr"] for f in found] == [2, 2, 1, 1, 1]
    assert all("upto" not in f and "narrow" not in f for f in found)
    with pytest.raises(UserError, match="upto"):
        at_width({"narrow": [{"images": 2}]}, 4)


def test_levels_know_their_own_settings():
    from mlem_diffusion.experiment import training_plan

    stage = stage_of(NARROW, *AGAIN)
    levels = training_plan.describe(stage)
    assert [v["name"] for v in levels] == training_plan.names(stage)
    assert [v["name"] for v in levels][-2:] == ["w2-seed1", "w3-seed1"]
    configs = {v["name"]: training_plan.train_config(stage, v) for v in levels}
    assert {n: c.images for n, c in configs.items() if c.images != 128} == {"w4": 1280, "w5": 1280, "w6": 1280}
    assert [configs[n].seed for n in ("w2", "w2-seed1")] == [0, 1] and configs["w2-seed1"].compile == "off"
    wrong = stage_of("train.narrow=[{upto: 3, pictures: 2}]")
    with pytest.raises(UserError):
        training_plan.train_config(wrong, levels[0])
    for bad in (
        ["gamma.repeats.levels=1", "gamma.repeats.seeds=[0]"],
        ["gamma.repeats.levels=5", "gamma.repeats.seeds=[1]"],
    ):
        with pytest.raises(UserError):
            training_plan.repeated(stage_of(*bad))


def test_a_fingerprint_depends_on_the_training_settings_of_its_level():
    from train_levels import GROUPS, level_fingerprint

    levels = [{"width": w, "target": "v"} for w in (2, 6)]
    unmixed = [level_fingerprint(stage_of(), v, "data") for v in levels]
    mixed = [level_fingerprint(stage_of(NARROW, *AGAIN), v, "data") for v in levels]
    assert mixed[0] != unmixed[0] and mixed[1] == unmixed[1]
    assert mixed[0] == level_fingerprint(stage_of("train.images=128"), levels[0], "data")
    again = level_fingerprint(stage_of(NARROW, *AGAIN), {**levels[0], "train_seed": 1}, "data")
    assert again != mixed[0]
    # compilation does not change the training
    other = NARROW.replace("compile: 'off'", "compile: 'on'")
    assert level_fingerprint(stage_of(other), levels[0], "data") == mixed[0]
    # an empty list counts as absent, so that experiments without it keep their levels
    stage = stage_of()
    with_it = stage.fingerprint(GROUPS, data="data")
    OmegaConf.set_struct(stage.cfg, False)
    del stage.cfg.train["narrow"]
    assert stage.fingerprint(GROUPS, data="data") == with_it


@pytest.mark.parametrize("experiment", ["celeba64", "celeba64_sprint", "celeba32"])
def test_the_planned_budgets_are_those_of_the_recipe(experiment):
    from mlem_diffusion.experiment import training_plan

    text = (ROOT / "configs" / "experiment" / f"{experiment}.yaml").read_text()
    stage = stage_of("data.source=x", experiment=experiment)
    unet: Any = OmegaConf.to_container(stage.cfg.unet, resolve=True)
    flops = {w: describe(w, stage.cfg.data.size, 0.5, unet, "v")["flops"] for w in stage.cfg.family.widths}
    images = {w: training_plan.settings(stage, {"width": w})["images"] for w in flops}
    again = [w for w, _ in training_plan.repeated(stage)]
    assert len(again) == 2
    unit = {"MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15}

    def row(label: str) -> list[float]:
        found = re.search(rf"#   {label} +([\d., ]+)", text)
        assert found, label
        return [float(word.replace(",", "")) for word in found.group(1).split()]

    per_image = next(name for name in ("MFLOP", "GFLOP") if f"#   {name} " in text)
    assert row(per_image) == pytest.approx([f / unit[per_image] for f in flops.values()], rel=0.06)
    scale = {"celeba64": 1e6, "celeba64_sprint": 1e3, "celeba32": 1}[experiment]
    label = {1e6: "million images", 1e3: "thousand images", 1: "images"}[scale]
    assert row(label) == [*(n / scale for n in images.values()), sum(images[w] for w in again) / scale]
    spent = {w: 3 * flops[w] * images[w] for w in flops}
    name = next(name for name in ("TFLOP", "PFLOP") if f"#   training {name} " in text)
    total = sum(spent.values()) + sum(spent[w] for w in again)
    expected = [*spent.values(), sum(spent[w] for w in again), total]
    assert row(f"training {name}") == pytest.approx([x / unit[name] for x in expected], rel=0.13)  # one digit at least


def test_losses_at_the_snapshots_show_a_rise(tmp_path):
    torch.manual_seed(0)
    unet = {"multipliers": [1], "blocks": 1, "attention": []}
    denoiser = build_denoiser(4, 8, 0.5, unet, "v")
    save_weights(tmp_path / "ema-0000000010.safetensors", denoiser)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.3 * torch.randn_like(p))
    save_weights(tmp_path / "ema-0000000020.safetensors", denoiser)
    held_out = torch.rand(12, 3, 8, 8) * 2 - 1
    found = snapshot_losses(
        denoiser,
        {path: sha256_of(path) for path in sorted(tmp_path.glob("ema-*"))},
        held_out,
        np.array([-2.0, 2.0]),
        np.array([0.5, 0.5]),
    )
    assert [f["images"] for f in found] == [10, 20] and found[0]["held_out_rise"] is None
    assert found[1]["held_out_rise"] == pytest.approx(found[1]["held_out_loss"] - found[0]["held_out_loss"])
    assert found[1]["held_out_rise"] > 2 * found[1]["held_out_rise_se"] > 0


def test_repeated_levels_enter_gamma(tmp_path):
    paths = [f"paths.{kind}='{tmp_path}/{kind}'" for kind in ("results", "checkpoints", "data")]
    small = ["family.widths=[2,3,4]", "train.images=256", "gamma.images=16", "gamma.bootstrap=10", "threads=1"]
    arguments = ["experiment=smoke", *paths, *small, *AGAIN, NARROW, "tracking.mode=disabled"]
    driver = (
        "import runpy, sys\nsys.path.insert(0, 'scripts')\n"
        "for script in ('train_levels', 'measure_gamma'):\n"
        "    sys.argv[0] = f'scripts/{script}.py'\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", driver, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    folders = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert folders == ["w2", "w2-seed1", "w3", "w3-seed1", "w4"]
    metadata = {n: json.loads((tmp_path / "checkpoints" / n / "metadata.json").read_text()) for n in folders}
    assert [metadata[n]["images"] for n in folders] == [128, 128, 128, 128, 256]
    assert metadata["w2"]["weights_sha256"] != metadata["w2-seed1"]["weights_sha256"]
    assert metadata["w2-seed1"]["train_seed"] == 1 and metadata["w4"]["train"]["images"] == 256
    gamma = json.loads((tmp_path / "results" / "gamma.json").read_text())
    assert [e["images"] for e in gamma["training_lengths"]][-1] == [128, 128, 256]
    assert [v["images"] for v in gamma["levels"]] == [128, 128, 256]
    assert gamma["between_seeds"]["levels"] == ["w2", "w3"] and gamma["between_seeds"]["seeds"] == [1]
    for name, entry in gamma["estimates"].items():
        low, high = entry["interval_without_seeds"]
        assert entry["interval"][0] <= low and (entry["interval"][1] is None or entry["interval"][1] >= high)
        assert entry["log_error_sd_between_seeds"] == gamma["between_seeds"]["log_error_sd"][name] > 0
    assert gamma["differences_fall"]["checks"] == 2 * 1 * (5 + 1)
