"""Promise 4: meaningless numbers are reported: diverging training and samplers, and artefacts that do not match."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline import Forker, Place, Run, content_of, difference, without_times
from torch import Tensor, nn

from mlem_diffusion.comparison.table import read_rows
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.comparison import plot_compare
from mlem_diffusion.files import SEAL, sha256_of, write_json
from mlem_diffusion.models.checkpoint import load_state
from mlem_diffusion.models.published import write_index
from mlem_diffusion.models.unet import Denoiser
from mlem_diffusion.training.loop import TrainConfig, train_level

# ------------------------------------------------------------------------------------------ training that diverges

WHERE = re.compile(
    r"width \d+ .*(?:at|after) step \d+ \(\d+ images\), "
    r"(at every noise level|for [\d.]+% of the batch, first at log-SNR)"
)


def of_stopped_training(run: Run, folders: list[Path]) -> str:
    """How a diverged training breaks the promise; empty if it holds."""
    messages = [line for line in run.lines if "resource_tracker" not in line]  # the forker ends without cleaning up
    if run.code != 2 or len(messages) != 1 or not WHERE.search(messages[0]) or "train.lr" not in messages[0]:
        return str(run)
    return "; ".join(filter(None, (of_state(folder) for folder in folders)))


def of_state(folder: Path) -> str:
    state = load_state(folder / "state.pt")
    if state is None:
        return ""
    left, bad = [state], 0
    while left:
        value = left.pop()
        left += (
            list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else []
        )
        if isinstance(value, (torch.Tensor, float)):
            bad += not bool(torch.isfinite(torch.as_tensor(value)).all())
    return f"{bad} values of {folder.name}'s state are not finite" if bad else ""


@pytest.mark.parametrize("more", [["workers=1"], ["workers=1", "train.save_every=0"], ["workers=2"]])
@pytest.mark.parametrize("lr", ["1e30", "1e39"])
def test_training_that_diverges(stages, forker, count, whole, tmp_path, lr, more):
    if not whole and (lr, more) not in [("1e30", ["workers=1"]), ("1e39", ["workers=1", "train.save_every=0"])]:
        pytest.skip("only if FAULTS=whole")
    place = stages.before("train_levels").copy_to(tmp_path / "place")
    run = forker("train_levels", place.arguments(f"train.lr={lr}", "train.log_every=64", *more))
    detail = of_stopped_training(run, [place.checkpoints / f"w{w}" for w in (2, 3, 4)])
    count(4, "learning rates at which training diverges", not detail, detail)


def test_training_again_as_the_message_says(stages, forker, count, whole, tmp_path):
    """Training again as the message says gives the same weights as a training that never diverged."""
    if not whole:
        pytest.skip("only if FAULTS=whole")
    place = stages.before("train_levels").copy_to(tmp_path / "place")
    run = forker("train_levels", place.arguments("train.lr=1e30", "train.save_every=0", "workers=1"))
    again = forker("train_levels", place.arguments("overwrite=true"))
    wanted, found = (
        {name: content for name, content in p.contents().items() if name.endswith(".safetensors")}
        for p in (stages.after["train_levels"], place)
    )
    detail = difference(wanted, found)
    fine = "overwrite=true" in run.sentence and again.code == 0 and not detail
    count(4, "training again after it diverged", fine, f"{run}; {again}; {detail}")


class Overflowing(nn.Module):
    """A network whose output is too large above a given log-SNR."""

    def __init__(self, above: float, scale: float):
        super().__init__()
        self.weight, self.above, self.scale = nn.Parameter(torch.full((1,), 0.5)), above, scale

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        return self.weight * x * torch.where(logsnr > self.above, self.scale, 1.0)[:, None, None, None]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scale", [1e30, float("inf"), float("nan")])
def test_training_that_diverges_at_some_noise_levels(count, tmp_path, scale, accumulate):
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
    config = TrainConfig(images=640, batch=64, accumulate=accumulate, log_every=64, snapshots=[1.0], save_every=0)
    process = Process(LinearSchedule(0.1, 20.0), -9.0, 9.0, 50)
    message, network = "", Denoiser(Overflowing(5.0, scale))
    try:
        train_level(network, images, process, config, tmp_path, width=7)
    except UserError as error:
        message = str(error)
    found = re.search(r"width 7 .*step 1 \(64 images\), for ([\d.]+)% of the batch, first at log-SNR ([\d.]+)", message)
    # about a third of the path lies above log-SNR 5; the second micro-batch covers only the path's second half
    fine = found is not None and float(found[1]) < 60 and 5 < float(found[2]) < 6 and not of_state(tmp_path)
    count(4, "training that diverges at some noise levels only", fine, message)


# ------------------------------------------------------------------------------------------ samplers that diverge

ANALYTIC = [
    "experiment=analytic", "threads=1", "workers=1", "tracking.mode=disabled", "process.base_steps=65",
    "+family.callable.broken=1", "family.callable.levels=4", "family.callable._target_=broken_family.broken_family",
    "compare.num_samples=12", "compare.num_reference=8", "compare.batch=6", "compare.bootstrap=20",
    "compare.plans=none",
    "compare.baselines=[{dynamics:sde,step_rule:ddpm,levels:all,steps:[9,17]},"
        "{dynamics:ode,step_rule:dpmpp_2m,levels:all,steps:[9]}]",
    "compare.stitched=[{dynamics:sde,step_rule:ddpm,pairs:[[1,3],[0,3]],switch:[0.5],steps:[17]}]",
    "compare.ml_em=[{dynamics:sde,step_rule:ddpm,families:[all,[0,2,3]],coins:[independent,systematic],c:[0.5,4],"
        "steps:[33]}]",
    "optimise.calibrate=8", "optimise.calibrate_steps=9", "optimise.num_select=8", "optimise.plans=2",
    "optimise.diagnose={seeds:8,steps:6}",
    "optimise.rules=[{dynamics:sde,step_rule:ddpm,steps:[9,17],learn:false},"
        "{dynamics:ode,step_rule:dpmpp_2m,steps:[9]}]",
    "optimise.measured={costs:[4],steps:[17]}",
]  # fmt: skip


def analytic(folder: Path, *more: str) -> list[str]:
    paths = [f"paths.{kind}='{folder}/{kind}'" for kind in ("results", "checkpoints", "data")]
    return [*ANALYTIC, *paths, *more]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results" / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


SHARED = ("dynamics", "step_rule", "estimator", "levels", "coins", "c", "steps")


@pytest.fixture(scope="module")
def unbroken(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of a family that never fails, because no sampler reaches the log-SNR above which it would."""
    folder = tmp_path_factory.mktemp("unbroken")
    run = forker("sample_compare", analytic(folder, "+family.callable.above=100"))
    assert run.code == 0, str(run)
    return {tuple(row[k] for k in SHARED): row for row in rows_of(folder)}


def of_diverged(folder: Path, healthy: dict[tuple[str, ...], dict[str, str]]) -> str:
    """How a comparison whose level f2 fails breaks the promise; empty if it holds."""
    rows = rows_of(folder)
    if [tuple(row[k] for k in SHARED) for row in rows] != list(healthy):
        return "other rows"
    for row in rows:
        before = healthy[tuple(row[k] for k in SHARED)]
        unchanged = {k: v for k, v in without_times(row).items() if k != "diverged"} == without_times(before)
        reported = not row["error"] and not row["error_se"] and int(row["diverged"] or 0) > 0
        uses = "f2" in row["levels"].split("+")
        if (
            not (reported or unchanged)
            or (reported and not uses)
            or (uses and row["estimator"] == "single" and not reported)
        ):
            return f"{row['levels']}, {row['estimator']}: error {row['error']!r}, diverged {row['diverged']!r}"
    missing = [n for n in ("compare.png", "speedup.json", "provenance.json") if not (folder / "results" / n).is_file()]
    text = (folder / "results" / "speedup.json").read_text() if not missing else ""
    return f"{missing} not there" if missing else "NaN in speedup.json" if "NaN" in text or "Infinity" in text else ""


CASES = [
    ("nan", "0", "workers=1"), ("nan", "8.5", "workers=2"), ("1e30", "0", "workers=1"), ("-inf", "-8.5", "workers=1"),
    ("1e5", "3", "workers=1"), ("3e38", "-100", "workers=1"),
]  # fmt: skip


def test_samplers_that_diverge(forkers, count, whole, unbroken, tmp_path):
    def one(number: int) -> str:
        value, above, workers = CASES[number]
        folder, forker = tmp_path / str(number), forkers[number % len(forkers)]
        values = (f"+family.callable.value='{value}'", f"+family.callable.above={above}", workers)
        run = forker("sample_compare", analytic(folder, *values))
        if run.code != 0 or "diverged in" not in run.out:
            return str(run)
        detail = of_diverged(folder, unbroken)
        report = forker("report", analytic(folder, *values))
        return detail or ("" if report.code == 0 and (folder / "results" / "report.html").is_file() else str(report))

    chosen = range(len(CASES) if whole else 2)
    with ThreadPoolExecutor(len(forkers)) as pool:
        for number, detail in zip(chosen, pool.map(one, chosen), strict=True):
            count(4, "samplers that diverge", not detail, f"{CASES[number]}: {detail}")


@pytest.mark.parametrize("stage", ["sample_compare", "optimise"])
@pytest.mark.parametrize("broken", [1, 3])
def test_families_with_a_level_that_fails(forker, count, whole, tmp_path, stage, broken):
    """If the largest level fails, there is no reference; if another level fails, there is no plan."""
    if (stage, broken) == ("sample_compare", 1) or not (whole or (stage, broken) != ("optimise", 3)):
        pytest.skip("tested elsewhere, or only if FAULTS=whole")
    run = forker(stage, analytic(tmp_path, f"family.callable.broken={broken}", "+family.callable.above=0"))
    if broken == 3:
        fine = run.code == 2 and bool(run.sentence) and re.search(r"not finite|diverge", run.sentence) is not None
        count(4, "references that diverge", fine, str(run))
        return
    fine = run.code == 2 and "f2 returns values that are not finite at log-SNR" in run.sentence
    count(4, "plans for a family with a level that fails", fine, str(run))


# ------------------------------------------------------------------------------------------------------ mismatches


@pytest.fixture(scope="module")
def other(stages, forker: Forker, whole: bool, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same pipeline on the same images, trained from another seed; plans only if FAULTS=whole."""
    place = stages.before("train_levels").copy_to(tmp_path_factory.mktemp("other") / "place")
    place = Place(place.folder, ["train.seed=1"])
    for stage in ("train_levels", "measure_gamma", *(["optimise"] if whole else []), "sample_compare"):
        run = forker(stage, place.arguments())
        assert run.code == 0, str(run)
    return place


@pytest.fixture(scope="module")
def published(stages, forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.mktemp("published")
    publishing = stages.after["everything"].copy_to(base / "publishing")
    run = forker("publish", publishing.arguments())
    assert run.code == 0, str(run)
    clone = Place(base / "clone")
    shutil.copytree(publishing.checkpoints / "published", clone.checkpoints / "published")
    return clone


@dataclass(frozen=True)
class Mismatch:
    """make(place, other) mixes artefacts that do not fit; the stage must end in one sentence that contains `words`."""

    kind: str
    stage: str
    words: tuple[str, ...]
    make: Callable[[Place, Place], object]
    arguments: tuple[str, ...] = ("force=true",)


def take(*names: str) -> Callable[[Place, Place], None]:
    """Replace files or folders by those of the other place."""

    def make(place: Place, other: Place) -> None:
        for name in names:
            own = place.folder / name
            shutil.rmtree(own) if own.is_dir() else own.unlink(missing_ok=True)
            (shutil.copytree if (other.folder / name).is_dir() else shutil.copy2)(other.folder / name, own)

    return make


def reseal(path: Path, **values: Any) -> None:
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != SEAL}
    write_json(path, content | values)


def swapped(place: Place, other: Place) -> None:
    path = place.checkpoints / "w3" / "metadata.json"
    path.unlink()
    shutil.copy2(place.checkpoints / "w2" / "metadata.json", path)


def renamed(place: Place, other: Place) -> None:
    """Give w3 the metadata of w2, with the name changed to w3."""
    swapped(place, other)
    reseal(place.checkpoints / "w3" / "metadata.json", name="w3")


def weights_of_another_level(place: Place, other: Place) -> None:
    """Give w3 the weights of w2, with matching metadata."""
    for name in ("ema.safetensors", "ema-0000000640.safetensors"):
        path = place.checkpoints / "w3" / name
        path.unlink()
        shutil.copy2(place.checkpoints / "w2" / name, path)
    metadata, found = path.parent / "metadata.json", sha256_of(path)
    snapshots = json.loads(metadata.read_text())["snapshots"]
    reseal(metadata, weights_sha256=found, snapshots=[*snapshots[:-1], {**snapshots[-1], "sha256": found}])


def nothing(place: Place, other: Place) -> None:
    pass


LEVELS = tuple(f"checkpoints/smoke/w{w}" for w in (2, 3, 4))
PLANS = ("results/smoke/plans.json", "results/smoke/plans.npz")
MISMATCHES = (
    Mismatch("results of other levels", "sample_compare",
             ("gamma.json", "made with other levels", "w2, w3, w4", "again"), take("results/smoke/gamma.json")),
    Mismatch("results of other levels", "sample_compare", ("plans.json", "made with other levels", "again"),
             take(*PLANS)),
    Mismatch("results of other levels", "sample", ("best.json", "made with other levels", "again"),
             take("results/smoke/best.json"), ("force=true", "seeds='0-1'")),
    Mismatch("results of other levels", "report", ("compare.csv", "is not the file that sample-compare wrote", "again"),
             take("results/smoke/compare.csv"), ()),
    Mismatch("results of other levels", "sample_compare", ("plans.json", "its tables", "again"), take(PLANS[0])),
    Mismatch("results of other levels", "sample_compare", ("plans.json", "its tables", "again"), take(PLANS[1])),
    Mismatch("results of other levels", "report", ("gamma.json", "is not the file that measure-gamma wrote", "again"),
             take("results/smoke/gamma.json"), ()),
    Mismatch("results of other levels", "report", ("speedup.json", "is not the file that", "again"),
             take("results/smoke/speedup.json"), ()),
    Mismatch("levels of two families", "sample_compare",
             ("gamma.json", "made with other levels", "(w3 differ)", "again"), take(LEVELS[1])),
    Mismatch("levels of two families", "sample", ("best.json", "made with other levels", "(w3 differ)", "again"),
             take(LEVELS[1]), ("force=true", "seeds='0-1'")),
    Mismatch("levels of two families", "sample_compare", ("made with other levels", "(w2, w3, w4 differ)", "again"),
             take(*LEVELS)),
    Mismatch("levels of two families", "train_levels", ("w3", "another configuration", "overwrite=true"),
             take(LEVELS[1]), ("workers=1",)),
    Mismatch("a level's files under another's name", "measure_gamma",
             ("w3/metadata.json", "describes another level", "again"), swapped),
    Mismatch("a level's files under another's name", "measure_gamma", ("w3", "again"), renamed),
    Mismatch("a level's files under another's name", "measure_gamma",
             ("w3/ema", "does not fit the configured network", "again"), weights_of_another_level),
    Mismatch("levels of other images", "measure_gamma", ("is not the data set that the levels", "make data"),
             nothing, ("force=true", "data.seed=1")),
    Mismatch("levels of other images", "sample_compare", ("is not the data set that the levels", "make data"),
             nothing, ("force=true", "data.count=319")),
    Mismatch("noise levels that were not trained", "measure_gamma",
             ("trained for log-SNR -9 to 9", "process.logsnr_max", "train"),
             nothing, ("force=true", "process.logsnr_max=12")),
    Mismatch("noise levels that were not trained", "sample_compare",
             ("trained for log-SNR -9 to 9", "process.logsnr_min", "train"),
             nothing, ("force=true", "process.logsnr_min=-9.5")),
    Mismatch("too few images for a distance", "sample_compare", ("too few", "32 features", "compare.num_samples=33"),
             nothing, ("force=true", "metrics.dim=32")),
    Mismatch("too few images for a distance", "sample_compare",
             ("at least 302 real images", "256", "compare.num_samples"),
             nothing, ("force=true", "compare.num_samples=300")),
    Mismatch("plans judged on their own seeds", "sample_compare", ("selected on sample seeds", "compare.seed"),
             nothing, ("force=true", "compare.seed=500000")),
)  # fmt: skip


def test_mismatched_artefacts_are_refused(stages, other, forkers, count, whole, tmp_path):
    chosen = MISMATCHES if whole else MISMATCHES[::3]  # this sample needs no plans of the other place

    def one(number: int) -> str:
        m, place = chosen[number], stages.after["everything"].copy_to(tmp_path / str(number), link=True)
        m.make(place, other)
        run = forkers[number % len(forkers)](m.stage, place.arguments(*m.arguments))
        missing = [words for words in m.words if words not in run.sentence]
        return f"{m.stage}, without {missing}: {run}" if run.code != 2 or missing else ""

    with ThreadPoolExecutor(len(forkers)) as pool:
        for m, detail in zip(chosen, pool.map(one, range(len(chosen))), strict=True):
            count(4, m.kind, not detail, detail)


@pytest.mark.whole
def test_gamma_of_levels_retrained_after_the_comparison(stages, other, forker, count, tmp_path):
    place = stages.after["everything"].copy_to(tmp_path / "place", link=True)
    take(*LEVELS)(place, other)
    run = forker("measure_gamma", place.arguments("train.seed=1"))
    assert run.code == 0, str(run)
    report = forker("report", place.arguments())
    fine = report.code == 2 and all(w in report.sentence for w in ("gamma.json", "different levels", "again"))
    count(4, "results of other levels", fine, str(report))


FEW = (
    "compare.baselines=[{dynamics:ode,step_rule:ddim,levels:all,steps:[4,8]}]", "compare.stitched=[]",
    "compare.plans=none",
    "compare.ml_em=[{dynamics:ode,step_rule:ddim,families:[all],coins:[independent],c:[4],steps:[16]}]",
)  # fmt: skip
COMPARED = ("compare.csv", "speedup.json", "best.json")


def of_comparison(place: Place) -> dict[str, Any]:
    return {name: content_of(place.results / name) for name in COMPARED}


@pytest.mark.whole
def test_caches_of_other_levels_and_settings(stages, other, forker, count, whole, tmp_path):
    """Results stay right with foreign or swapped files in the cache."""
    place = stages.after["everything"].copy_to(tmp_path / "place", link=True)
    wanted = of_comparison(place)
    for path in (other.results / "cache").iterdir():
        if path.name != ".lock" and not (place.results / "cache" / path.name).exists():
            shutil.copy2(path, place.results / "cache" / path.name)
    run = forker("sample_compare", place.arguments("force=true"))
    detail = "" if run.code == 0 and of_comparison(place) == wanted else str(run)
    count(4, "caches of other levels and settings", not detail, detail)
    for kind in ("setting", "reference") if whole else ("setting",):
        paths = sorted((place.results / "cache").glob(f"{kind}-*.npz"))
        contents = [path.read_bytes() for path in paths]
        for path, data in zip(paths, contents[1:] + contents[:1], strict=True):
            path.unlink()
            path.write_bytes(data)
        run = forker("sample_compare", place.arguments("force=true"))
        detail = "" if run.code == 0 and of_comparison(place) == wanted else str(run)
        count(4, "caches of other levels and settings", not detail, f"{kind}s: {detail}")


@pytest.mark.whole
def test_more_compared_images_than_exist(stages, forker, count, whole, tmp_path):
    """If num_reference exceeds n, n is used."""
    found = []
    for n in (24, 100):
        place = stages.after["everything"].copy_to(tmp_path / str(n), link=True)
        run = forker("sample_compare", place.arguments(*FEW, f"compare.num_reference={n}"))
        found.append(of_comparison(place) if run.code == 0 else str(run))
    count(
        4, "more compared images than there are", found[0] == found[1] and isinstance(found[0], dict), str(found)[:400]
    )


def test_published_statistics_of_another_extractor(published, forker, count, tmp_path):
    """The run computes no distances and reports that."""
    place = published.copy_to(tmp_path / "place")
    run = forker("sample_compare", place.arguments(*FEW, "metrics.dim=20", "compare.gamma=2.5"))
    rows = read_rows(place.results / "compare.csv") if run.code == 0 else []
    fine = (
        "no distances" in run.out and bool(rows) and all(r["distance"] is None and r["error"] is not None for r in rows)
    )
    count(4, "published statistics of another extractor", fine and not (place.results / "best.json").exists(), str(run))


def test_published_statistics_of_another_size(published, forker, count, tmp_path):
    """Statistics of another extractor, renamed to this one, are refused."""
    place = published.copy_to(tmp_path / "place")
    folder = place.checkpoints / "published"
    index = {k: v for k, v in json.loads((folder / "family.json").read_text()).items() if k != SEAL}
    index["statistics"]["identity"] = index["statistics"]["identity"].replace("/16/", "/20/")
    write_index(folder, index)
    run = forker("sample_compare", place.arguments(*FEW, "metrics.dim=20", "compare.gamma=2.5"))
    fine = run.code == 2 and "cannot be compared" in run.sentence
    count(4, "published statistics of another extractor", fine, str(run))


@pytest.mark.parametrize(("column", "value"), [("num_samples", 48), ("num_samples", 23), ("distance_name", "FID")])
def test_rows_that_share_no_figure(stages, count, tmp_path, column, value):
    rows = read_rows(stages.after["everything"].results / "compare.csv")
    rows[-1][column] = value
    with pytest.raises(UserError) as refused:
        plot_compare(rows, tmp_path / "compare.png")
    fine = "cannot share a figure" in str(refused.value) and str(value) in str(refused.value)
    count(
        4,
        "rows of different comparisons in a figure",
        fine and not (tmp_path / "compare.png").exists(),
        str(refused.value),
    )
