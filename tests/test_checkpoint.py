"""Files of a level: what is written is read back, and any fault of a file is reported in one sentence."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mlem_diffusion.errors import UserError
from mlem_diffusion.files import sha256_of
from mlem_diffusion.models.family import (
    at_width,
    build_denoiser,
    describe,
    load_state,
    load_weights,
    save_state,
    save_weights,
)

SMALL = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def in_one_sentence(error: pytest.ExceptionInfo[UserError], *words: str) -> bool:
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and len(text) < 400 and all(word in text for word in words)


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


def test_one_wrong_bit_of_a_state_is_one_sentence(tmp_path: Path):
    path = tmp_path / "state.pt"
    save_state(path, {"model": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the tensor's data
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_state(path)
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
