"""The recipes in examples/ with small random networks."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "common", raising=False)

    def of(name: str, *options: str) -> tuple[int, str]:
        """The exit status of a recipe, and what it printed."""
        monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--out", str(tmp_path / "grid.png"), *options])
        try:
            with torch.random.fork_rng(devices=[]):
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            captured = capsys.readouterr()
            return int(stop.code or 0), captured.out + captured.err
        return 0, capsys.readouterr().out

    yield of
    sys.modules.pop("common", None)


@pytest.mark.parametrize("name", ["sit", "edm2", "bk_sdm", "sana"])
def test_recipe(name: str, run, tmp_path: Path):
    if name in ("bk_sdm", "sana"):
        pytest.importorskip("diffusers")
    status, text = run(name, "--random", "--samples", "3")
    assert status == 0 and "Plan: " in text and "evaluations per image" in text, text
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 3 * 16 and pixels.std() > 0
    assert float(text.split("Cost: ")[1].split()[0]) <= 1, text


def test_bad_options_are_one_sentence(run, tmp_path: Path):
    for options, said in [
        ((), "--weights, or --random"),
        (("--weights", str(tmp_path)), "has 0"),
        (("--random", "--steps", "2"), "--steps is between"),
        (("--random", "--out", str(tmp_path / "grid.txt")), "name a PNG"),
    ]:
        status, text = run("sit", *options)
        assert status == 2 and said in text and len(text.splitlines()) == 1, text


def test_weights_that_do_not_fit_and_missing_packages(run, tmp_path: Path):
    for name in ("xs", "s", "uncond"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"no weights")
    status, text = run("edm2", "--weights", str(tmp_path))
    assert status == 2 and "training.networks_edm2 cannot be imported" in text, text
    status, text = run("bk_sdm", "--weights", str(tmp_path))
    assert status == 2 and "Traceback" not in text, text


def test_load_refuses_files_that_are_no_weights(run, tmp_path: Path):
    import common  # type: ignore[import-not-found]

    from mlem_diffusion import UserError

    (tmp_path / "net.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no file of weights for Linear"):
        common.load(torch.nn.Linear(1, 1), tmp_path / "net.safetensors")
