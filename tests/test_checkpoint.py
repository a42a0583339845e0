"""Files of a level: what is written is read back, and any fault of a file is reported in one sentence."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mlem_diffusion.errors import UserError
from mlem_diffusion.files import sha256_of, write_json
from mlem_diffusion.models.family import (
    at_width,
    build_denoiser,
    describe,
    load_family,
    load_state,
    load_weights,
    read_metadata,
    save_state,
    save_weights,
)

SMALL = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}


def net(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def in_one_sentence(error: pytest.ExceptionInfo[UserError], *words: str) -> bool:
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and len(text) < 400 and all(word in text for word in words)


def test_weights_and_state_round_trip(tmp_path: Path):
    a, b = net(0), net(1)
    sha256 = save_weights(tmp_path / "a" / "w.safetensors", a)  # the folder is made
    load_weights(tmp_path / "a" / "w.safetensors", b, sha256)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert load_state(tmp_path / "state.pt") is None
    save_state(tmp_path / "state.pt", {"model": a.state_dict(), "images": 7})
    state = load_state(tmp_path / "state.pt")
    assert state is not None and state["images"] == 7 and torch.equal(state["model"]["0.weight"], a[0].weight)


def test_parameters_alone_are_rounded(tmp_path: Path):
    network, found = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(network.weight)
    network.running_mean = torch.tensor([1 / 3, 2 / 3, 1 / 7])
    load_weights(tmp_path / "w", found, save_weights(tmp_path / "w", network, torch.bfloat16))
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, network.weight.detach().bfloat16().float())
    assert torch.equal(found.running_mean, network.running_mean)  # pyright: ignore


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
        load_weights(path, net(), sha256)
    assert in_one_sentence(error, str(path), "make train-levels")


class Foreign:
    """An object that weights_only must refuse to unpickle."""


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "pickled object"])
def test_bad_states_give_one_sentence(tmp_path: Path, damage: str):
    path = tmp_path / "state.pt"
    save_state(path, {"model": torch.arange(1000.0)})
    good = path.read_bytes()
    if damage == "pickled object":
        torch.save({"model": Foreign()}, path)
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1  # in the tensor's data
        path.write_bytes({"empty": b"", "truncated": good[: len(good) // 2], "one bit": bytes(flipped)}[damage])
    with pytest.raises(UserError) as error:
        load_state(path)
    assert in_one_sentence(error, str(path), "delete it")


def test_a_family_is_loaded_as_it_was_saved(tmp_path: Path):
    x, networks = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    for width in (3, 5):
        facts = describe(width, 8, 0.4, SMALL, "v")
        network = networks[facts["name"]] = build_denoiser(width, 8, 0.4, SMALL, "v", seed=3)
        for p in network.parameters():
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(width))
        sha256 = save_weights(tmp_path / facts["name"] / "ema.safetensors", network)
        write_json(tmp_path / facts["name"] / "metadata.json", {**facts, "snapshots": [], "weights_sha256": sha256})
    levels = load_family(tmp_path, ["w3", "w5"])
    assert [level.name for level in levels] == ["w3", "w5"] and levels[0].flops < levels[1].flops
    for level in levels:
        with torch.no_grad():
            expected = networks[level.name](x, torch.zeros(2))
        assert torch.allclose(level.denoise(x, torch.tensor(0.0)), expected, atol=1e-6)
        assert torch.allclose(level.denoise(x, torch.zeros(2)), expected, atol=1e-6)
    with pytest.raises(UserError) as error:
        load_family(tmp_path, ["w3", "w5", "w9"])
    assert in_one_sentence(error, "w9", "make train-levels")
    (tmp_path / "w3" / "metadata.json").write_text('{"name": "w5"}')
    with pytest.raises(UserError) as error:
        read_metadata(tmp_path, ["w3"])
    assert in_one_sentence(error, "does not describe the level w3")


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
