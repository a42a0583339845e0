"""The scripts end to end on the miniature experiment: artefacts, formats, reuse of finished work, and wrong input."""

import json
import re
import shutil

import pandas as pd
import pytest
from conftest import STAGES
from PIL import Image
from pipeline import RANKS, Place, apart, strict
from safetensors.torch import load_file

from mlem_diffusion.comparison import features
from mlem_diffusion.comparison.settings import COLUMNS, setting_from
from mlem_diffusion.files import write_json
from mlem_diffusion.multilevel.plan import load_plans

RECORDED = ["train_levels", "measure_gamma", "optimise", "sample_compare"]  # in provenance.json


def table(place: Place) -> pd.DataFrame:
    return pd.read_csv(place.results / "compare.csv", keep_default_na=False)


# ------------------------------------------------------------------------------------------------- artefacts
def test_all_artefacts_exist(done):
    place, printed = done
    expected = [
        "gamma.json", "gamma.png", "gamma_details.png", "compare.csv", "compare.png", "speedup.json", "best.json",
        "plans.json", "plans.npz", "gains.json", "gains.png", "diagnostics.json", "ablation.json", "ablation.png",
        "diagnostics-sde.png", "diagnostics-ode.png", "verdicts.json", "metrics.jsonl", "report.html",
        "timing.json", "reference.json", "training.png", "grids/sde.png", "grids/ode.png", "config.yaml",
        *(f"samples/{seed:06d}.png" for seed in (0, 1, 2, 5)), "samples.png", "samples.json", "provenance.json",
    ]  # fmt: skip
    assert [name for name in expected if not (place.results / name).is_file()] == []
    for width in (2, 3, 6):
        for name in ("ema.safetensors", "state.pt", "metadata.json"):
            assert (place.checkpoints / f"w{width}" / name).is_file(), name
    for path in place.results.rglob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) >= 8
    assert not any(".partial" in p.name for p in place.folder.rglob("*"))
    for stage in RECORDED:
        assert f"{stage}: done in" in printed


def test_format_of_gamma_json(done):
    gamma = strict(done[0].results / "gamma.json")
    assert set(gamma["estimates"]) == {"loss_fit", "drops", "differences", "to_largest"}
    for entry in gamma["estimates"].values():
        assert entry["gamma"] is None or isinstance(entry["gamma"], float)
        assert isinstance(entry["interval"], list) and len(entry["interval"]) == 2
    assert gamma["htmc"] in ("yes", "no", "undetermined")
    assert [level["width"] for level in gamma["levels"]] == [2, 3, 6]
    assert len(gamma["per_noise_level"]) == 5 and gamma["made_with"]["levels"].keys() >= {"w2", "w6"}
    assert [entry["images"] for entry in gamma["training_lengths"]] == [[n] * 3 for n in (192, 320, 640)]


def test_format_of_compare_csv(done):
    rows = table(done[0])
    assert list(rows) == COLUMNS[:-1]  # none has diverged
    kinds = {"single", "ml_em", "stitched", "quadrature"}
    assert set(zip(rows.dynamics, rows.estimator, strict=True)) == {(d, k) for d in ("sde", "ode") for k in kinds}
    # the Gaussian denoiser of the training images is a level, and alone a baseline
    assert set(rows.levels[rows.estimator == "single"]) == {"gauss", "w2", "w3", "t2", "w6"}
    for name in ("error", "error_se", "network_calls", "gflops_expected", "gflops_realised", "seconds"):
        assert (rows[name].astype(float) > 0).all(), name
    assert set(rows.distance) == set(rows.distance_high) == set(rows.distance_name) == {""}  # 24 images are too few
    ratio = rows.gflops_realised / rows.gflops_expected
    assert ratio[rows.estimator != "ml_em"].sub(1).abs().max() < 1e-5
    assert ratio.sub(1).abs().max() < 0.25  # a few standard errors of 24 images
    assert set(rows.probabilities[rows.plan != ""]) == {"optimal", "measured", "learned"}
    # equal settings take equal time, whatever the machine did meanwhile; the reference is 8 times finer
    timing, reference = (strict(done[0].results / name) for name in ("timing.json", "reference.json"))
    same = rows[(rows.estimator == "single") & (rows.levels == "w6") & (rows.step_rule == "ddpm")]
    same = same[same.protocol == "strict"]
    per_step = same.seconds / same.steps
    assert len(same) == 2 and per_step.max() < 1.05 * per_step.min() and timing["threads"] == 1
    assert per_step.min() > 0.99 * sum(timing["parts"][part]["seconds"] for part in ("w6", "step sde/ddpm"))
    for entry in reference.values():
        assert entry["steps"] > 8 * (entry["finest"] - 1) and 0 <= entry["bias"] < 1 and entry["setting"]
    assert "Bias of the smallest error by its reference" in done[1]
    plans, gains = (strict(done[0].results / name) for name in ("plans.json", "gains.json"))
    for rule, chain in plans["chains"].items():
        used = rows[(rows.dynamics == rule.split("/")[0]) & (rows.probabilities == "constant")].levels
        assert chain == ["w2", "w3", "w6"] or "+".join(chain) in set(used)
        assert len(gains["rules"][rule]["logsnr"]) == 7 and min(gains["rules"][rule]["density"]) > 0
    assert gains["made_with"] == plans["made_with"]


def test_records_of_every_stage(done):
    p = strict(done[0].results / "provenance.json")
    assert p["experiment"] == "smoke" and set(RECORDED) <= set(p["stages"])
    entry = p["stages"]["optimise"]
    assert p["data"]["source"]["name"] and entry["commit"] and entry["device"] and entry["versions"]["torch"]
    lines = [json.loads(line) for line in (done[0].results / "metrics.jsonl").read_text().splitlines()]
    assert set(RECORDED) <= {r["stage"] for r in lines}
    taught = strict(done[0].results / "gamma.json")["taught"]
    assert [(t["name"], t["teacher"]) for t in taught] == [("t2", "w6")] and 0 < taught[0]["to_teacher"] < 1
    assert {r["level"] for r in lines if f"train/loss/{r.get('level')}" in r} == {"w2", "w3", "t2", "w6"}


# ------------------------------------------------------------------------------------------ done stays done
@pytest.mark.parametrize("stage", ["prepare_data", *RECORDED])
def test_a_finished_stage_is_not_repeated(done, here, stage):
    before = done[0].digest()
    run = here(stage, done[0])
    assert done[0].digest() == before
    assert "already" in run.out or stage == "prepare_data"


def test_force_and_changed_settings_run_again(done, here, tmp_path):
    place = done[0].copy_to(tmp_path)
    gamma = (place.results / "gamma.json").read_text()
    (place.results / "gamma.png").unlink()
    assert "already done" not in here("measure_gamma", place, "force=true").out
    assert (place.results / "gamma.json").read_text() == gamma and (place.results / "gamma.png").is_file()
    here("measure_gamma", place, "gamma.images=32")
    assert strict(place.results / "gamma.json")["held_out_images"] == 32


def test_interrupted_training_resumes_to_the_same_weights(done, here, tmp_path):
    place, widths = done[0].copy_to(tmp_path, "data"), "family.widths=[2,3]"
    assert "run the same command again" in here("train_levels", place, widths, "max_minutes=0", code=75).complaint
    assert not (place.checkpoints / "w2" / "metadata.json").exists()
    here("train_levels", place, widths)
    for width in (2, 3):
        for path in (done[0].checkpoints / f"w{width}").glob("*.safetensors"):
            a, b = load_file(path), load_file(place.checkpoints / f"w{width}" / path.name)
            assert all((a[name] == b[name]).all() for name in a), path.name


def test_a_family_of_functions_needs_no_images_and_no_training(here, tmp_path):
    callable = "family.callable={_target_: mlem_diffusion.models.analytic.analytic_family}"
    run = here("train_levels", Place(tmp_path), callable)
    assert "nothing to do" in run.out and not Place(tmp_path).digest()


# --------------------------------------------------------------------------------------------- side by side
def test_workers_draw_the_same_samples_and_enough_images_have_distances(done, here, tmp_path, monkeypatch):
    """Two workers instead of one process: an equal table, but for distances on the frontiers."""
    place = done[0].copy_to(tmp_path)
    shutil.rmtree(place.results / "cache")
    monkeypatch.setattr(features, "MIN_IMAGES", 24)
    here("sample_compare", place, "workers=2", "force=true", "compare.num_distance=24")
    rows, before = table(place), table(done[0])
    other = ["seconds", *(name for name in rows if "distance" in name or name == "kid")]
    pd.testing.assert_frame_equal(rows.drop(columns=other), before.drop(columns=other))
    found = rows[rows.distance != ""].astype({name: float for name in ("distance", "distance_low", "distance_high")})
    assert 4 <= len(found) < len(rows)
    assert (found.groupby("dynamics").error.min() == rows.groupby("dynamics").error.min()).all()
    assert (found.distance_low < found.distance).all() and (found.distance < found.distance_high).all()


def test_ranks_draw_the_same_samples(done, tmp_path):
    """NPROC=2 gives the samples of one process."""
    place = done[0].copy_to(tmp_path)
    shutil.rmtree(place.results / "samples")
    shutil.rmtree(place.results / "cache")
    scripts = ("sample", "seeds='0-2,5'", "compare.batch=2"), ("sample_compare", "force=true")
    run = apart(place, *scripts, before=RANKS)
    assert run.code == 0, run.err
    for name in ("000000.png", "000005.png"):
        assert (place.results / "samples" / name).read_bytes() == (done[0].results / "samples" / name).read_bytes()
    pd.testing.assert_frame_equal(table(place).drop(columns="seconds"), table(done[0]).drop(columns="seconds"))


# ----------------------------------------------------------------------------------- dry runs and wrong input
@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_prints_configuration_and_cost_and_writes_nothing(here, tmp_path, stage):
    place = Place(tmp_path / "dry")
    run = here(stage, place, "dry_run=true")
    assert "name: smoke" in run.out and f"estimated cost of {stage}" in run.out
    if stage in ("train_levels", "measure_gamma", "sample_compare"):
        found = re.search(rf"estimated cost of {stage}\s+([\d.]+) TFLOP", run.out)
        assert found and float(found.group(1)) > 0
    assert not place.folder.exists()


@pytest.mark.parametrize(("stage", "more", "sentence"), [
    ("sample", [], "make train-levels"),
    ("train_levels", ["data.source=???"], "make data SOURCE="),
    ("train_levels", ["unet.multipliers=[1,2,2,2,2]"], "cannot be halved"),
    ("train_levels", ["device=cuda:99"], "device=cuda:99"),
    ("report", [], ""),
])  # fmt: skip
def test_wrong_input_is_one_line_and_exit_status_2(here, tmp_path, stage, more, sentence):
    few = ["data.count=24", "data.holdout=8"] if stage == "train_levels" else []
    complaint = here(stage, Place(tmp_path / "wrong"), *few, *more, code=2).complaint
    assert complaint.startswith(f"{stage}: ") and sentence in complaint


ONE = "dynamics: ode, step_rule: ddim, estimator: single"


@pytest.mark.parametrize(("stage", "more", "sentence"), [
    ("train_levels", ["train.lr=0.1"], "overwrite=true"),
    ("measure_gamma", ["family.widths=[2,3,6,9]"], "w9"),
    ("measure_gamma", ["family.widths=[2,3]"], "at least three levels"),
    ("sample_compare", ["compare.num_distance=999"], "distances of fewer than 1000 say more about their number"),
    ("sample_compare", ["compare.seed=499999"], "change compare.seed"),
    ("sample", ["sampler={dynamics: ode}"], "sampler lacks the key"),
    ("sample", [f"sampler={{{ONE}, levels: w6, steps: 130}}"], "130"),
])  # fmt: skip
def test_wrong_requests_on_a_finished_experiment(done, here, stage, more, sentence):
    before = done[0].digest()
    complaint = here(stage, done[0], *more, code=2).complaint
    assert complaint.startswith(f"{stage}: ") and sentence in complaint
    assert {n for n, v in done[0].digest().items() if before.get(n) != v and "cache" not in n} == set()


def test_levels_of_another_data_set_are_refused(done, here, tmp_path):
    place = done[0].copy_to(tmp_path)
    shutil.rmtree(place.folder / "data")
    run = here("sample_compare", place, "data.seed=1", "data.count=24", "data.holdout=8", code=2)
    assert "is not the data set that the levels" in run.complaint


def test_artefacts_of_other_levels_are_refused(done, here, tmp_path):
    place = done[0].copy_to(tmp_path)
    for name in ("plans.json", "gamma.json"):
        content = strict(place.results / name)
        content["made_with"]["levels"]["w3"] = "0" * 64
        write_json(place.results / name, content)
        if name == "plans.json":
            assert "so its plans are left out" in here("sample_compare", place, "protocol=strict").out
    assert "gamma.json was made with other levels" in (run := here("sample_compare", place, code=2)).complaint
    assert "w3" in run.complaint


def test_jobs_of_a_sweep_write_to_folders_of_their_own(done, here, tmp_path):
    done[0].copy_to(tmp_path, "data")
    place = Place(tmp_path, options=())  # every override of a sweep is in its folders' names
    single = ["family.widths=[2]", "train.teacher.widths=[]"]
    run = here("train_levels", place, "-m", "train.seed=-1,0,1", "train.images=64", *single, code=2)
    assert "train.seed=-1 must be" in run.err and "1 of the sweep's jobs" in run.err  # the others go on
    a, b = (load_file(folder / "ema.safetensors") for folder in sorted(place.checkpoints.rglob("w2")))
    assert any((a[name] != b[name]).any() for name in a)
    done[0].copy_to(tmp_path / "later")
    place = Place(tmp_path / "later", options=("family.widths=[2,3,6]", "gamma.bootstrap=10"))
    before = place.digest()
    here("measure_gamma", place, "-m", "gamma.seed=0,1")  # on the levels that all jobs share
    own = [p for p in sorted(place.results.rglob("gamma.json")) if p.parent != place.results]
    assert len(own) == 2 and own[0].read_text() != own[1].read_text()
    after = place.digest()
    assert all(after[name] == value for name, value in before.items())


# ----------------------------------------------------------------------------------------------------- sample
def test_samples_are_chosen_from_the_comparison(done, here, tmp_path):
    place = done[0].copy_to(tmp_path)
    assert here("sample", place, "seeds='0-2,5'").out.startswith("sample: already done")
    here("sample", place, "seeds=5", "sample.error=1")
    best = strict(place.results / "best.json")
    cheapest = min(best["multilevel"], key=lambda row: row["gflops_realised"])
    assert [p.name for p in (place.results / "samples").iterdir()] == ["000005.png"]
    assert setting_from(cheapest).row == strict(place.results / "samples.json")["setting"]
    write_json(place.results / "best.json", cheapest | {"gamma": 2.5, "made_with": best["made_with"]})
    run = here("sample", place, "seeds=5", code=2)  # a file of an earlier version
    assert "unexpected content: run make sample-compare ARGS=force=true" in run.complaint


@pytest.mark.parametrize("kind", ["named", "quadrature"])
def test_the_sampler_may_be_named_or_a_plan(done, here, tmp_path, kind):
    place = done[0].copy_to(tmp_path)
    more = ["sampler={dynamics: ode, step_rule: ddim, estimator: ml_em, levels: w2+w3+w6, steps: 8, c: 4, "
            "coins: systematic}"]  # fmt: skip
    if kind != "named":
        plans = strict(place.results / "plans.json")["plans"]
        entry = next(e for e in plans if e["method"] == kind and "gauss" in e["levels"])
        best = strict(place.results / "best.json")
        row = best["multilevel"][0] | {"plan": entry["id"], "c": None, "coins": "", "estimator": kind}
        row |= {k: entry[k] for k in ("dynamics", "step_rule", "steps", "probabilities")}
        row |= {"levels": "+".join(entry["levels"])}
        write_json(place.results / "best.json", best | {"multilevel": [row]})
        more = []
    assert "GFLOP" in here("sample", place, "seeds=0-7", *more).out
    if kind == "quadrature":
        (place.results / "plans.npz").unlink()
        assert "make optimise" in here("sample", place, "seeds=1", code=2).complaint


# --------------------------------------------------------------------------------- plans of a family of one's own
@pytest.fixture(scope="module")
def analytic(tmp_path_factory, request) -> Place:
    """Three levels of the analytic family, compared on seeds 0..31, without data, checkpoints or images."""
    rules = "[{dynamics: sde, step_rule: ddpm, steps: [5, 17], learn: true}, "
    rules += "{dynamics: ode, step_rule: dpmpp_2m, steps: [9]}]"
    optimise = {
        "calibrate": 16, "calibrate_steps": 17, "num_select": 24, "plans": 3, "diagnose": "{seeds: 16, steps: 6}",
        "rules": rules, "measured": "{costs: [8], steps: [17]}",
        "learned": "{costs: [8], steps: 17, iterations: 2, paths: 2, draws: 2}",
    }  # fmt: skip
    compare = {
        "num_samples": 32, "seed": 0, "bootstrap": 20, "stitched": "[]", "ml_em": "[]",
        "baselines": "[{dynamics: sde, step_rule: ddpm, levels: all, steps: [5, 9]}]",
    }  # fmt: skip
    options = [
        "process.base_steps=129",
        "protocol=strict",
        "family.callable.levels=3",
        "timing.rounds=2",
        "timing.at_least=0",
    ]
    options += [f"optimise.{key}={value}" for key, value in optimise.items()]
    options += [f"compare.{key}={value}" for key, value in compare.items()]
    return Place(tmp_path_factory.mktemp("analytic"), "analytic", tuple(options))


def test_plans_are_selected_and_judged_on_separate_seeds(analytic, here):
    for stage in ("optimise", "sample_compare"):
        here(stage, analytic)
    content = strict(analytic.results / "plans.json")
    ends = {"calibration": [500000, 500015], "selection": [500016, 500039], "judgement": [0, 31]}
    assert content["seeds"] == ends and "alone" not in content
    assert content["calibration"]["flops"] > 0
    assert [level["name"] for level in strict(analytic.results / "ablation.json")["levels"]] == ["f1", "f2", "f3"]
    kinds = {(e["dynamics"], e["method"], e["probabilities"]) for e in content["plans"]}
    methods = ("independent", "nested", "systematic", "quadrature")
    assert {(d, m, "optimal") for d in ("sde", "ode") for m in methods} <= kinds
    assert {("sde", "independent", "measured"), ("sde", "independent", "learned")} <= kinds
    entries, rows = {e["id"]: e for e in content["plans"]}, table(analytic)
    planned, loaded = rows[rows.plan != ""], load_plans(analytic.results / "plans.json")[0]
    assert set(planned.plan) == {name for name, plan in loaded.items() if not plan.is_baseline}
    assert (rows.estimator == "single").sum() == 6 and set(content["chains"]) == {"sde/ddpm", "ode/dpmpp_2m"}
    for row in planned.itertuples():
        entry = entries[row.plan]
        assert row.levels == "+".join(entry["levels"]) and row.steps == entry["steps"]
        assert row.gflops_expected == pytest.approx(entry["cost"] / 1e9, rel=1e-4)
        # judged on 32 other seeds than those of the selection: within a factor of a few, even for large effects
        assert 0.1 < row.error / entry["selected_error"] < 10
    assert set(strict(analytic.results / "verdicts.json")) == {"sde/ddpm", "ode/dpmpp_2m"}
    assert not (analytic.results / "best.json").exists()  # functions are no pictures to sample


def test_samples_that_are_not_pictures_are_refused(analytic, here):
    sampler = "sampler={dynamics: ode, step_rule: ddim, estimator: single, levels: f3, steps: 5}"
    assert "not pictures" in here("sample", analytic, sampler, code=2).complaint
