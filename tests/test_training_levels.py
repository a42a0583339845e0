"""Which levels are trained, with which settings, and when a level's folder counts as trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_json, write_json
from mlem_diffusion.models.family import save_state, save_weights
from mlem_diffusion.training.levels import claim, is_trained, planned, settings


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
    save_state(tmp_path / "state.pt", {"snapshots": {name: hashes[name] for name in files}})
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
