"""Files of a level: writes are atomic, and any fault of a file is reported in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mlem_diffusion.errors import UserError
from mlem_diffusion.files import atomic_write, read_json, write_json
from mlem_diffusion.models.checkpoint import load_state, load_weights, save_state, save_weights
from mlem_diffusion.models.family import build_denoiser, describe, load_family

SMALL = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400, text
    return text


def net(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def test_weights_and_state_round_trip(tmp_path: Path):
    a, b = net(0), net(1)
    save_weights(tmp_path / "a" / "w.safetensors", a)  # the folder is made
    load_weights(tmp_path / "a" / "w.safetensors", b)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    save_state(tmp_path / "state.pt", {"model": a.state_dict(), "images": 7})
    state = load_state(tmp_path / "state.pt")
    assert state is not None and state["images"] == 7 and torch.equal(state["model"]["0.weight"], a[0].weight)


def test_missing_files(tmp_path: Path):
    assert load_state(tmp_path / "state.pt") is None
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "w.safetensors", net())
    assert "make train-levels" in one_sentence(error)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "x.json", "run the stage before")
    assert "run the stage before" in one_sentence(error)


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign", "html", "other network", "fewer tensors"])
def test_bad_weights_give_one_sentence(tmp_path: Path, damage: str):
    path = tmp_path / "w.safetensors"
    save_weights(path, net())
    good = path.read_bytes()
    if damage == "other network":
        save_weights(path, net(width=5))
    elif damage == "fewer tensors":
        save_weights(path, nn.Sequential(nn.Linear(3, 4)))
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": good[: len(good) // 2],
                "foreign": b"\x93NUMPY" + bytes(200),
                "html": b"<html>",
            }[damage]
        )
    with pytest.raises(UserError) as error:
        load_weights(path, net())
    assert str(path) in one_sentence(error)


class Foreign:
    """An object that weights_only must refuse to unpickle."""


@pytest.mark.parametrize("damage", ["empty", "truncated", "html", "pickled object"])
def test_bad_states_give_one_sentence(tmp_path: Path, damage: str):
    path = tmp_path / "state.pt"
    save_state(path, {"model": net().state_dict()})
    good = path.read_bytes()
    if damage == "pickled object":
        torch.save({"model": Foreign()}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": good[: len(good) // 2], "html": b"<html></html>"}[damage])
    with pytest.raises(UserError) as error:
        load_state(path)
    assert "delete it" in one_sentence(error)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "value.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["value.txt"]
    atomic_write(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["value.txt"]


def test_json_is_strict(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"a": None})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path, "") == {"a": None}
    path.write_text('{"a": ')
    with pytest.raises(UserError) as error:
        read_json(path, "run it again")
    assert "run it again" in one_sentence(error)


def test_a_family_is_loaded_as_it_was_saved(tmp_path: Path):
    widths = [3, 5]
    for width in widths:
        facts = describe(width, 8, 0.4, SMALL, "v")
        folder = tmp_path / facts["name"]
        network = build_denoiser(width, 8, 0.4, SMALL, "v", seed=3)
        for p in network.parameters():
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(width))
        sha256 = save_weights(folder / "ema.safetensors", network)
        write_json(folder / "metadata.json", {**facts, "snapshots": [], "weights_sha256": sha256})
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        if width == widths[-1]:
            levels = load_family(tmp_path, widths)
            assert [level.name for level in levels] == ["w3", "w5"]
            assert levels[0].flops < levels[1].flops
            with torch.no_grad():
                expected = network(x, torch.zeros(2))
            assert torch.allclose(levels[-1].denoise(x, torch.zeros(2)), expected, atol=1e-6)
            assert not levels[-1].denoise(x, torch.zeros(2)).requires_grad
    with pytest.raises(UserError) as error:
        load_family(tmp_path, [3, 5, 9])
    assert "w9" in one_sentence(error) and "make train-levels" in str(error.value)


def test_initial_weights_depend_on_seed_and_width_alone():
    torch.manual_seed(11)
    a = build_denoiser(4, 8, 0.4, SMALL, "v", seed=1)
    before = torch.get_rng_state()
    b = build_denoiser(4, 8, 0.4, SMALL, "v", seed=1)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random stream is unchanged
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    c = build_denoiser(4, 8, 0.4, SMALL, "v", seed=2)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
