"""Files of levels and families: which are trained, as they were saved, published, the committed one, and refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import base_of
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import STEP_RULES
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_json, sha256_of, write_json
from mlem_diffusion.models import family
from mlem_diffusion.models.family import at_width, build_denoiser, describe, load_family, read_metadata, save_weights
from mlem_diffusion.models.gaussian import fit_gaussian
from mlem_diffusion.models.unet import Denoiser
from mlem_diffusion.training.levels import claim, is_trained, level_names, planned, settings, training_flops

COMMITTED = Path(__file__).resolve().parents[1] / "checkpoints" / "celeba32" / "published"
EXPECTED = [  # mean and standard deviation of two images of each level, from the Gaussian one to w24
    [0.18764, 0.59945], [0.17628, 0.62201], [0.16424, 0.64484], [0.18193, 0.62923], [0.17489, 0.62503],
    [0.18091, 0.63643], [0.18064, 0.63872], [0.17828, 0.63536],
]  # fmt: skip
GAUSS = "gauss-da7a-None.safetensors"
DATA = {
    "name": "celeba8", "split": {"train": 96}, "source": {"kind": "zip", "name": "few.zip", "sha256": "f00"},
    "crop": "celeba", "treatment": {"already 8x8": 128}, "sha256": "da7a",
}  # fmt: skip
FACTS = {
    "experiment": "few", "title": "", "data": DATA, "gaussian": None, "statistics": None,
    "training": {"commit": "c0ffee", "finished": "today", "device": "a CPU", "overrides": ["train.lr=0.1"]},
}  # fmt: skip


def write_level(folder: Path, width: int, gauss: Any = None, **more: Any) -> Denoiser:
    unet = {"multipliers": [1, 2], "blocks": 1, "attention": [4], "precondition": "gaussian" if gauss else "scalar"}
    facts = describe(width, 8, 0.4, unet, "v") | more
    network = build_denoiser(width, 8, 0.4, facts["unet"], "v", gauss=gauss)
    if gauss is not None:
        gauss.save(folder / GAUSS)
        facts["gauss"] = {"file": GAUSS, "sha256": sha256_of(folder / GAUSS)}
    for p in network.parameters():
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(width))
    sha256 = save_weights(folder / facts["name"] / "ema.safetensors", network)
    snapshots = [{"images": n, "file": f"ema-{n}.safetensors", "sha256": sha256} for n in (5, 10)]
    held_out = {"images": 32, "loss": [0.1, 0.2]}
    facts |= {"weights_sha256": sha256, "snapshots": snapshots, "held_out": held_out, "images": 10, "config": {}}
    write_json(folder / facts["name"] / "metadata.json", facts | {"data_sha256": "da7a", "logsnr_range": [-9, 9]})
    return network


@pytest.fixture(scope="module", params=["scalar", "gaussian"])
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Denoiser]]:
    """The folder of a trained and published family, and its networks."""
    folder, gauss = tmp_path_factory.mktemp("family"), None
    if request.param == "gaussian":
        gauss = fit_gaussian(torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(1)).numpy(), 3)
    networks = [write_level(folder, width, gauss) for width in (2, 3)]
    write_level(folder, 2, gauss, name="w2-seed7")
    levels, repeats = read_metadata(folder, ["w2", "w3"]), read_metadata(folder, ["w2-seed7"])
    family.publish(folder, folder / family.PUBLISHED, levels, repeats, FACTS)
    return folder, networks


@pytest.fixture
def trained(written: tuple[Path, list[Denoiser]], tmp_path: Path) -> Path:
    return shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)


def test_a_family_is_loaded_as_it_was_saved(written: tuple[Path, list[Denoiser]], trained: Path):
    x, levels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), load_family(trained, ["w2", "w3"])
    assert [level.name for level in levels] == ["w2", "w3"] and levels[0].flops < levels[1].flops
    for level, network in zip(levels, written[1], strict=True):
        for logsnr in (torch.tensor(0.0), torch.zeros(2)):
            with torch.no_grad():
                assert torch.allclose(level.denoise(x, logsnr), network(x, torch.zeros(2)), atol=1e-6)
                if level.base is not None:  # shared by the levels, and part of each one's cost alone
                    known = level.base.denoise(x, logsnr)
                    assert torch.equal(level.denoise(x, logsnr, known), level.denoise(x, logsnr))
                    assert level.flops > level.base.flops and not torch.equal(level.denoise(x, logsnr), known)
    with pytest.raises(UserError, match=r"w9.*make train-levels"):
        load_family(trained, ["w2", "w3", "w9"])
    write_json(trained / "w3" / "metadata.json", {"name": "w5"})
    with pytest.raises(UserError, match="does not describe the level w3"):
        read_metadata(trained, ["w3"])


def test_a_published_family_is_the_trained_one_rounded(trained: Path):
    folder = trained / "published"
    metadata = read_metadata(folder, ["w2", "w3"])
    assert family.identity_of(metadata) == family.identity_of(read_metadata(trained, ["w2", "w3"]))
    x, logsnr = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.0)
    for a, b in zip(load_family(folder, ["w2", "w3"]), load_family(trained, ["w2", "w3"]), strict=True):
        assert (a.flops, a.name) == (b.flops, b.name)
        assert 0 < (a.denoise(x, logsnr) - b.denoise(x, logsnr)).abs().max() < 0.02
    assert all(v.dtype == torch.bfloat16 for v in load_file(folder / "w2-seed7" / family.BF16).values())
    last = load_family(folder, ["w2", "w3"], snapshot=-1)[0]  # the last training length is the published one
    assert torch.equal(last.denoise(x, logsnr), load_family(folder, ["w2", "w3"])[0].denoise(x, logsnr))
    index = family.read_index(folder)
    assert index == {"levels": ["w2", "w3"], "repeats": ["w2-seed7"], **FACTS} and family.read_index(trained) is None
    card = (folder / "README.md").read_text()
    for word in (f"{metadata[0]['parameters']:,}", "0.15000", "da7a", "c0ffee", "train.lr=0.1", "non-commercial"):
        assert word in card
    assert "already 8x8; none" in card


def test_published_levels_are_used_where_none_are_trained(trained: Path):
    assert family.levels_folder(trained, ["w2", "w3"]) == trained
    (trained / "w3" / "metadata.json").unlink()
    assert family.levels_folder(trained, ["w2", "w3"]) == trained / "published"
    assert family.levels_folder(trained, ["w2", "w9"]) == trained


@pytest.mark.parametrize("name", ["w3/ema-bf16.safetensors", "w3/metadata.json", "family.json", GAUSS])
def test_a_damaged_file_is_named(trained: Path, name: str):
    file = trained / "published" / name
    if name == GAUSS and not file.exists():
        pytest.skip("a scalar family has none")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=name):
        family.read_index(trained / "published")
        load_family(trained / "published", ["w2", "w3"])


def test_the_committed_family_gives_the_images_that_it_gave():
    index = json.loads((COMMITTED / "family.json").read_text())
    levels = load_family(COMMITTED, index["levels"])
    levels.insert(0, base_of(levels))
    grid, found = Process(LinearSchedule(), base_steps=1000).grid(6), []
    for level in levels:
        images, _ = sample(SingleLevel(level), STEP_RULES["ode/dpmpp_2m"], grid, BrownianPath([0, 1], (3, 32, 32)))
        found.append([float(images.mean()), float(images.std())])
    assert torch.allclose(torch.tensor(found), torch.tensor(EXPECTED), atol=1e-4)


SMALL = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def in_one_sentence(error: pytest.ExceptionInfo[UserError], *words: str) -> bool:
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and len(text) < 400 and all(word in text for word in words)


@pytest.mark.parametrize("fault", ["missing", "other hash", "not safetensors", "other network"])
def test_bad_weights_give_one_sentence(tmp_path: Path, fault: str):
    path = tmp_path / "w.safetensors"
    sha256 = save_weights(path, net(width=5 if fault == "other network" else 4))
    if fault == "missing":
        path.unlink()
    elif fault == "other hash":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif fault == "not safetensors":
        path.write_bytes(b"<html>")
        sha256 = sha256_of(path)
    with pytest.raises(UserError) as error:
        family.load_weights(path, net(), sha256)
    assert in_one_sentence(error, str(path), "make train-levels")


def test_one_wrong_bit_of_a_state_is_one_sentence(tmp_path: Path):
    path = tmp_path / "state.pt"
    torch.save({"model": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the tensor's data
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        family.load_state(path)
    assert in_one_sentence(error, str(path), "delete it")


def test_initial_weights_depend_on_seed_and_width_alone():
    torch.manual_seed(11)
    a = build_denoiser(4, 8, 0.4, SMALL, "v", seed=1)
    before = torch.get_rng_state()
    b = build_denoiser(4, 8, 0.4, SMALL, "v", seed=1)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random stream is unchanged
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    c = build_denoiser(4, 8, 0.4, SMALL, "v", seed=2)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_narrow_levels_have_their_own_settings():
    narrow = [{"upto": 8, "patch": 4, "multipliers": [2]}, {"upto": 32, "patch": 2}]
    unet = {**SMALL, "narrow": narrow}
    assert at_width(unet, 8) == {**SMALL, "patch": 4, "multipliers": [2]}
    assert at_width(unet, 9) == at_width(unet, 32) == {**SMALL, "patch": 2}
    assert at_width(unet, 33) == SMALL and describe(8, 16, 0.5, unet, "v")["unet"] == at_width(unet, 8)
    with pytest.raises(UserError, match="needs `upto`"):
        at_width({"narrow": [{"patch": 4}]}, 8)


def configuration(levels: int = 2, seeds: tuple[int, ...] = (1,), only: Any = None) -> Any:
    repeats = SimpleNamespace(levels=levels, seeds=seeds)
    return SimpleNamespace(
        gamma=SimpleNamespace(repeats=repeats), family=SimpleNamespace(widths=[2, 3, 4]),
        train=SimpleNamespace(seed=0), only=only,
    )  # fmt: skip


FAMILY = [{"name": f"w{width}", "width": width} for width in (2, 3, 4)]


def test_the_family_and_its_cheapest_levels_again_are_trained_with_their_own_settings():
    levels = planned(configuration(), FAMILY)
    assert [v["name"] for v in levels] == ["w2", "w3", "w4", "w2-seed1", "w3-seed1"]
    narrow = [{"upto": 4, "images": 2}, {"upto": 2, "images": 1, "lr": 2.0}]
    train = {"images": 9, "lr": 1.0, "seed": 0, "narrow": narrow[:1]}
    assert settings(train, {"width": 5}) == {"images": 9, "lr": 1.0, "seed": 0}
    found = [settings(train | {"narrow": narrow}, v) for v in levels]
    assert [(f["images"], f["lr"], f["seed"]) for f in found] == [
        (1, 2.0, 0), (2, 1.0, 0), (2, 1.0, 0), (1, 2.0, 1), (2, 1.0, 1),
    ]  # fmt: skip
    assert [v["name"] for v in planned(configuration(only=["w3-seed1", "w2"]), FAMILY)] == ["w2", "w3-seed1"]


def test_taught_levels_are_trained_once_with_settings_of_their_own():
    teacher = {"widths": [2, 3], "images": 7, "narrow": [{"upto": 2, "images": 8}], "warm_start": False}
    taught = [
        {"name": f"t{v['width']}", "width": v["width"], "teacher": {"name": "w4", "flops": 2.0}} for v in FAMILY[:2]
    ]
    assert [v["name"] for v in planned(configuration(), FAMILY + taught)][3:] == ["t2", "t3", "w2-seed1", "w3-seed1"]
    train = {"images": 9, "lr": 1.0, "seed": 0, "narrow": [], "teacher": teacher, "warm_start": True}
    assert settings(train, FAMILY[0]) == {"images": 9, "lr": 1.0, "seed": 0, "warm_start": True}
    found = [settings(train, v) for v in taught]
    assert [(f["images"], f["lr"], f["warm_start"]) for f in found] == [(8, 1.0, False), (7, 1.0, False)]
    assert training_flops(taught[0] | {"flops": 1.5}, 10) == (45.0, 20.0) and training_flops({"flops": 2}, 5) == (30, 0)
    cfg = SimpleNamespace(train=SimpleNamespace(teacher=SimpleNamespace(widths=[2, 4])), family=configuration().family)
    with pytest.raises(UserError, match="below the largest"):
        level_names(cfg)
    cfg.train.teacher.widths = [2]
    assert level_names(cfg) == ["w2", "w3", "w4", "t2"]


@pytest.mark.parametrize(
    ("levels", "seeds", "only"), [(1, (0,), None), (1, (1, 1), None), (3, (1,), None), (2, (1,), "w9")]
)
def test_bad_repeats_and_unknown_levels_are_refused(levels, seeds, only):
    with pytest.raises(UserError, match="w2, w3, w4, w2-seed1" if only else r"gamma\.repeats"):
        planned(configuration(levels, seeds, only), FAMILY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A level's folder after training with the configuration "mine"."""
    claim(tmp_path, "mine")
    files = [f"ema-{n:010d}.safetensors" for n in (10, 20)]
    torch.manual_seed(0)
    hashes = {name: save_weights(tmp_path / name, torch.nn.Linear(2, 2)) for name in [*files, "ema.safetensors"]}
    torch.save({"snapshots": {name: hashes[name] for name in files}}, tmp_path / "state.pt")
    snapshots = [{"file": name, "sha256": hashes[name]} for name in files]
    metadata = {"fingerprint": "mine", "weights_sha256": hashes["ema.safetensors"], "snapshots": snapshots}
    write_json(tmp_path / "metadata.json", metadata)
    return tmp_path


def test_a_level_is_trained_if_it_is_complete_and_of_this_configuration(folder):
    assert is_trained(folder, "mine") and not is_trained(folder, "other")
    with pytest.raises(UserError, match="another configuration"):
        claim(folder, "other")
    claim(folder, "mine", overwrite=True)  # nothing to replace
    assert is_trained(folder, "mine")
    claim(folder, "other", overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["claim.json"]
    assert read_json(folder / "claim.json", "")["fingerprint"] == "other"
    assert not is_trained(folder, "other")


@pytest.mark.parametrize("name", ["ema.safetensors", "metadata.json", "ema-0000000010.safetensors"])
def test_a_damaged_level_is_refused_or_trained_again(folder, name):
    (folder / name).write_bytes(b"{")
    with pytest.raises(UserError, match=f"{name}.*overwrite=true"):
        is_trained(folder, "mine")
    assert not is_trained(folder, "mine", overwrite=True)
    claim(folder, "mine", overwrite=True)
    assert (folder / "state.pt").exists() != name.startswith("ema-")  # the state restores all but the snapshots
