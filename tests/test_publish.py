"""A published family: the folder's content, a clone that has nothing else, and refusals."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from safetensors.torch import load_file

from mlem_diffusion.comparison.frechet import FeatureMoments, frechet_distance, load_moments, save_moments
from mlem_diffusion.data.portraits import render
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_json
from mlem_diffusion.models import model_card, published
from mlem_diffusion.models.checkpoint import load_weights, save_weights
from mlem_diffusion.models.family import build_denoiser, load_family, read_metadata

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
WIDTHS = [2, 3, 4]
LEVELS = [f"w{width}" for width in WIDTHS]
FEW = [
    "compare.gamma=2.5", "compare.num_samples=20", "compare.num_reference=8", "compare.stitched=[]",
    "compare.baselines=[{dynamics: ode, step_rule: ddim, levels: all, steps: [4, 8]}]",
    "compare.ml_em=[{dynamics: ode, step_rule: ddim, families: [all], coins: [systematic], c: [4], steps: [16]}]",
]  # fmt: skip
GAUSSIAN = "sampler={dynamics: ode, step_rule: ddim, estimator: stitched, levels: gauss+w4, steps: 4, switch: 0.5}"


@dataclass(frozen=True)
class Place:
    """A folder for everything that scripts write, and possibly the images."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def published(self) -> Path:
        return self.checkpoints / "published"

    def overrides(self, *more: str) -> list[str]:
        paths = [f"paths.{kind}='{self.folder}/{kind}'" for kind in ("results", "checkpoints", "data")]
        images = self.folder / "celeba_few"
        data = [f"data.source={images if images.is_dir() else '???'}", "data.name=celeba8", "data.count=null"]
        small = [
            "gamma.repeats={levels: 1, seeds: [7]}",
            f"family.widths={WIDTHS}",
            "train.images=256",
            "data.crop=celeba",
            "data.holdout=32",
            "threads=1",
        ]
        return ["experiment=smoke", *paths, *data, *small, *FEW, *more]


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The single line on stderr, without progress bars."""
        lines = [line.split("\r")[-1].strip() for line in self.err.splitlines()]
        lines = [line for line in lines if line and "|" not in line]
        assert len(lines) == 1, self.err
        return lines[0]


def run(script: str, place: Place, *more: str) -> int:
    """Run a script's main in this process and return its exit status."""
    before, handlers = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{script}.py", *place.overrides(*more)]
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(script).main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        GlobalHydra.instance().clear()
    return 0


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def call(script: str, place: Place, *more: str) -> Run:
        capsys.readouterr()
        code = run(script, place, *more)
        caught = capsys.readouterr()
        return Run(code, caught.out, caught.err)

    return call


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained and published family; tests must not write into this folder."""
    place = Place(tmp_path_factory.mktemp("publish"))
    (place.folder / "celeba_few").mkdir()
    for i, image in enumerate(render(128, 8)):
        Image.fromarray(image.transpose(1, 2, 0)).save(place.folder / "celeba_few" / f"{i + 1:06d}.png")
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = "disabled"
    try:
        for script in ("prepare_data", "train_levels", "publish"):
            assert run(script, place) == 0, script
    finally:
        os.environ.pop("WANDB_MODE")
        os.environ.update({} if before is None else {"WANDB_MODE": before})
    return place


@pytest.fixture
def clone(done: Place, tmp_path: Path) -> Place:
    """A clone of the repository: the published files and nothing more."""
    place = Place(tmp_path / "clone")
    shutil.copytree(done.published, place.published)
    return place


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def rows_of(place: Place) -> list[dict[str, str]]:
    with (place.results / "compare.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def index_of(place: Place) -> dict[str, Any]:
    return json.loads((place.published / "family.json").read_text())


# --------------------------------------------------------------------------------------------- what is published


def test_git_tracks_the_published_files_and_no_others(done: Place):
    expected = {"README.md", "family.json", "gauss.safetensors", "statistics.npz"}
    expected |= {
        f"{name}/{file}" for name in [*LEVELS, "w2-seed7"] for file in ("ema-bf16.safetensors", "metadata.json")
    }
    assert files_below(done.published) == expected
    assert not list(done.checkpoints.glob(".*"))  # no temporary folder is left
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = [f"checkpoints/celeba32/{name}" for name in sorted(files_below(done.checkpoints))]
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input="\n".join(paths), capture_output=True,
        text=True,
    )  # fmt: skip
    tracked = set(paths) - set(found.stdout.split())
    assert tracked == {f"checkpoints/celeba32/published/{name}" for name in expected}


def test_weights_are_those_of_training_rounded(done: Place, clone: Place):
    for name in LEVELS:
        own = load_file(done.checkpoints / name / "ema.safetensors")
        file = clone.published / name / "ema-bf16.safetensors"
        found, metadata = load_file(file), json.loads((file.parent / "metadata.json").read_text())
        parameters = {n for n, _ in build_denoiser(2, 8, 0.5, metadata["unet"], "v").named_parameters()}
        assert set(found) == set(own) and parameters <= set(own)
        for key, value in found.items():
            assert value.dtype == (torch.bfloat16 if key in parameters else own[key].dtype)
            assert torch.equal(value.float(), own[key].to(value.dtype).float())
        assert metadata["weights_sha256"] == published.sha256_of(file) != metadata["trained_weights_sha256"]
        assert (
            metadata["trained_weights_sha256"]
            == (json.loads((done.checkpoints / name / "metadata.json").read_text())["weights_sha256"])
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_published_family_is_a_float32_family(done: Place, clone: Place, device: str):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, logsnr = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4)
    rounded, own = (load_family(p, WIDTHS, device, compile="off") for p in (clone.published, done.checkpoints))
    for a, b in zip(rounded, own, strict=True):
        assert a.flops == b.flops and a.name == b.name
        assert all(p.dtype == torch.float32 for p in a.denoise.network.parameters())  # pyright: ignore
        change = (a.denoise(x.to(device), logsnr.to(device)) - b.denoise(x.to(device), logsnr.to(device))).abs().max()
        assert 0 < change < 0.02


def test_the_card_agrees_with_the_metadata(done: Place):
    card, index = (done.published / "README.md").read_text(), index_of(done)
    for m in read_metadata(done.published, WIDTHS):
        row = next(line for line in card.splitlines() if line.startswith(f"| {m['name']} |"))
        loss, rounded = np.mean(m["held_out"]["loss"]), m["rounding"]
        for figure in (
            f"{m['parameters']:,}", f"{m['flops'] / 1e6:.4g}", f"{m['images']:,}", f"{loss:.5f}",
            f"{100 * rounded['loss_change']:+.4f}%", f"{rounded['squared_change']:.2e}",
        ):  # fmt: skip
            assert figure in row
        assert m["rounding"]["images"] == 32 and abs(rounded["loss_change"]) < 0.01
        assert rounded["loss"] == pytest.approx(loss, rel=1e-6)  # the same held-out images, noise levels and noise
        assert rounded["loss_rounded"] == pytest.approx(rounded["loss"] * (1 + rounded["loss_change"]))
        assert m["config"]["train"]["images"] == 256 and "narrow" not in row
    for figure in (index["data"]["sha256"], index["data"]["source"]["sha256"], f"{index['data']['rms']:.5f}"):
        assert figure in card
    assert "96 training images and 32 held-out images" in card and "log-SNR\n  -9.0 to 9.0" in card
    assert f"{index['gaussian']['rank']} principal directions" in card
    assert f"n = 20: {index['statistics']['floor']['distance']:.4g}" in card
    assert "non-commercial research only" in card and "license: other" in card
    assert "* w2-seed7: the same levels trained again" in card
    assert "already 8x8: unchanged: 128 images" in card and "were not cropped" in card
    assert index["training"]["commit"] in card and index["published"]["commit"] in card
    assert str(done.folder) not in card + (done.published / "family.json").read_text()  # no path of this machine
    command = next(line for line in card.splitlines() if "make train-levels" in line)
    for changed in ("train.images=256", "family.widths=[2,3,4]", "data.name=celeba8", "data.holdout=32"):
        assert changed in command
    assert "train.batch" not in command and "paths" not in command
    assert "make data EXPERIMENT=smoke SOURCE=celeba_few" in card


# ------------------------------------------------------------------------------------------------- from a clone


def test_a_clone_samples_without_images_and_training(done: Place, clone: Place, here: Callable[..., Run]):
    found = here("sample", clone, "seeds=0-3", GAUSSIAN)
    assert found.code == 0, found.err
    pictures = [np.asarray(Image.open(clone.results / "samples" / f"{i:06d}.png")) for i in range(4)]
    assert files_below(clone.folder / "data") == set() and not (clone.folder / "data").exists()
    # the family as trained gives nearly the same: rounding moves a pixel value by a few in 255
    trained = Place(clone.folder / "trained")
    shutil.copytree(done.checkpoints, trained.checkpoints, ignore=shutil.ignore_patterns("published"))
    shutil.copytree(done.folder / "data", trained.folder / "data")
    assert here("sample", trained, "seeds=0-3", GAUSSIAN).code == 0
    for i, picture in enumerate(pictures):
        other = np.asarray(Image.open(trained.results / "samples" / f"{i:06d}.png"))
        assert np.abs(picture.astype(int) - other).mean() < 3
    assert pictures[0].std() > 5


def test_a_clone_computes_the_distances_that_the_images_give(done: Place, clone: Place, here: Callable[..., Run]):
    found = here("sample_compare", clone)
    assert found.code == 0, found.err
    assert not (clone.folder / "data").exists()
    rows = rows_of(clone)
    assert len(rows) > 8 and all(float(row["distance"]) > 0 and float(row["distance_floor"]) > 0 for row in rows)
    assert any("gauss" in row["levels"] for row in rows)
    provenance = json.loads((clone.results / "provenance.json").read_text())
    assert provenance["data"] == read_json(done.folder / "data" / "manifest.json", "")
    # the same levels beside the images
    beside = Place(clone.folder / "beside")
    shutil.copytree(done.published, beside.published)
    shutil.copytree(done.folder / "data", beside.folder / "data")
    assert here("sample_compare", beside).code == 0
    for row, other in zip(rows, rows_of(beside), strict=True):
        assert row == other


def test_missing_statistics_give_no_distances_and_one_message(clone: Place, here: Callable[..., Run]):
    found = here("sample_compare", clone, "metrics.seed=1")
    assert found.code == 0, found.err
    assert found.out.count("no distances, since the images are missing") == 1
    assert all(row["distance"] == "" for row in rows_of(clone))
    assert here("sample_compare", clone, "metrics.seed=0", "compare.num_samples=18").code == 0
    rows = rows_of(clone)  # distances, but the floor is that of other numbers of images
    assert all(row["distance"] and not row["distance_floor"] for row in rows)


def test_gamma_needs_images_and_the_published_lengths(done: Place, clone: Place, here: Callable[..., Run]):
    found = here("measure_gamma", clone)
    assert found.code == 2 and "make data" in found.complaint
    shutil.copytree(done.folder / "data", clone.folder / "data")
    assert here("measure_gamma", clone).code == 0  # with the cheapest level's other seed
    lengths = json.loads((clone.results / "gamma.json").read_text())["training_lengths"]
    assert [entry["images"] for entry in lengths] == [[256] * 3]


def test_snapshots_are_published_on_request(done: Place, clone: Place, here: Callable[..., Run]):
    place = Place(clone.folder / "more")
    shutil.copytree(done.checkpoints, place.checkpoints)
    shutil.copytree(done.folder / "data", place.folder / "data")
    assert here("publish", place, "publish.snapshots=true", "publish.statistics=false").code == 0
    for name in [*LEVELS, "w2-seed7"]:
        shutil.rmtree(place.checkpoints / name)
    assert not (place.published / "statistics.npz").exists() and index_of(place)["statistics"] is None
    assert here("measure_gamma", place).code == 0
    lengths = json.loads((place.results / "gamma.json").read_text())["training_lengths"]
    assert [entry["images"][0] for entry in lengths] == [64, 128, 256]


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name", ["w3/ema-bf16.safetensors", "w3/metadata.json", "gauss.safetensors", "statistics.npz", "family.json"]
)
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_changed_file_is_refused_by_name(clone: Place, here: Callable[..., Run], name: str, damage: str):
    file = clone.published / name
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    found = here(
        "sample", clone, "seeds=0", "sampler={dynamics: ode, step_rule: ddim, estimator: single, levels: w2, steps: 2}"
    )
    assert found.code == 2
    # without its index or one of its levels it is not a published family
    absent = damage == "missing" and name.endswith(".json")
    assert ("make train-levels" if absent else name) in found.complaint
    if not absent:
        with pytest.raises(UserError, match=re.escape(name)):
            load_family(clone.published, WIDTHS)


def test_other_images_are_refused(done: Place, clone: Place, here: Callable[..., Run]):
    other = Place(clone.folder / "other")
    shutil.copytree(done.published, other.published)
    shutil.copytree(done.folder / "celeba_few", other.folder / "celeba_few")
    assert here("prepare_data", other, "data.count=100").code == 0
    found = here("sample_compare", other)
    assert found.code == 2 and "is not the data set that the levels" in found.complaint
    found = here("train_levels", other)
    assert found.code == 2 and "another configuration or data set" in found.complaint


def test_training_finds_published_levels_and_leaves_them_unchanged(done: Place, clone: Place, here: Callable[..., Run]):
    before = {name: published.sha256_of(clone.published / name) for name in files_below(clone.published)}
    for more in ([], ["only=w3"], ["only=w2-seed7"]):
        found = here("train_levels", clone, *more)
        assert found.code == 0 and "already published in" in found.out and "ARGS=overwrite=true" in found.out
    found = here("train_levels", clone, "train.lr=0.1")
    assert found.code == 2 and "another configuration" in found.complaint
    assert sorted(p.name for p in clone.checkpoints.iterdir()) == ["published"]

    shutil.copytree(done.folder / "data", clone.folder / "data")
    stopped = here("train_levels", clone, "overwrite=true", "train.seed=5", "max_minutes=0", "workers=1")
    assert stopped.code == 75
    found = here("train_levels", clone, "train.seed=5", "workers=1")  # continues, because it has begun
    assert found.code == 0 and "already published" not in found.out
    after = {name: published.sha256_of(clone.published / name) for name in files_below(clone.published)}
    assert after == before
    # from now on the levels are those trained in this place
    assert published.levels_folder(clone.checkpoints, LEVELS) == clone.checkpoints
    shutil.rmtree(clone.checkpoints / "w3")
    assert published.levels_folder(clone.checkpoints, LEVELS) == clone.published
    assert published.levels_folder(clone.checkpoints, [*LEVELS, "w9"]) == clone.checkpoints


def test_too_large_a_family_is_refused_and_the_old_one_stays(
    done: Place, here: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    before = files_below(done.checkpoints)
    for limit, what in ((10_000, "The weights take"), (100_000, "The files take")):
        monkeypatch.setattr(published, "LIMIT", limit)
        found = here("publish", done)
        assert found.code == 2 and what in found.complaint and "MB" in found.complaint
        assert files_below(done.checkpoints) == before
    assert published.read_index(done.published) is not None


def test_weights_that_are_not_those_of_the_metadata_are_not_published(
    done: Place, tmp_path: Path, here: Callable[..., Run]
):
    place = Place(tmp_path / "mixed")
    shutil.copytree(done.checkpoints, place.checkpoints, ignore=shutil.ignore_patterns("published"))
    shutil.copytree(done.folder / "data", place.folder / "data")
    network = build_denoiser(3, 8, 0.5, json.loads((place.checkpoints / "w3/metadata.json").read_text())["unet"], "v")
    save_weights(place.checkpoints / "w3" / "ema.safetensors", network)
    found = here("publish", place)
    assert found.code == 2 and "w3/ema.safetensors is damaged, or not the file" in found.complaint
    assert not place.published.exists()


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("dimensions", "exact"), [(32, True), (600, False)])
def test_statistics_round_trip(tmp_path: Path, dimensions: int, exact: bool):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2000, dimensions)) @ np.diag(0.98 ** np.arange(dimensions)) for _ in range(2))
    before = FeatureMoments(a.mean(0) + 0.1, np.cov(a.T), len(a))
    save_moments(tmp_path / "s.npz", before)
    after = load_moments(tmp_path / "s.npz")
    assert after.n == 2000 and after.mean.dtype == after.cov.dtype == np.float64
    assert np.array_equal(after.cov, after.cov.T)
    assert np.array_equal(after.cov, before.cov) == exact
    other = FeatureMoments(b.mean(0), np.cov(b.T), len(b))
    assert frechet_distance(other, after) == pytest.approx(frechet_distance(other, before), rel=1e-4)


def test_parameters_alone_are_rounded(tmp_path: Path):
    network = torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(network.weight)
    network.running_mean = torch.tensor([1 / 3, 2 / 3, 1 / 7])
    save_weights(tmp_path / "w.safetensors", network, torch.bfloat16)
    found = torch.nn.BatchNorm1d(3)
    load_weights(tmp_path / "w.safetensors", found)
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, network.weight.detach().bfloat16().float())
    assert torch.equal(found.running_mean, network.running_mean)  # pyright: ignore


def test_the_commands_on_the_card_reach_hydra_unchanged():
    import publish

    note = ', "whole" frames'
    training = {"experiment": "demo", "arguments": [f"data.note={publish.written(note)}", "family.widths=[4,8]"]}
    index = {"training": training, "data": {"source": {"kind": "zip", "name": "a.zip"}}}
    given = shlex.split(model_card.commands(index)[1])[-1]
    found = [OverridesParser.create().parse_override(text) for text in shlex.split(given.removeprefix("ARGS="))]
    assert [(override.key_or_group, override.value()) for override in found] == [
        ("data.note", note), ("family.widths", [4, 8]),
    ]  # fmt: skip
