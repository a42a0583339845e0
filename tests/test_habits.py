"""Habits of users' code, settings and machines that must change no sample, no figure and no file."""

import errno
import fcntl
import os
from pathlib import Path

import matplotlib
import pytest
import torch
from toys import nonlinear_denoise, process, toy_family

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import SingleLevel, Stitched, sample
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.errors import SlowPath, UserError
from mlem_diffusion.figures import style
from mlem_diffusion.files import locked, write_text


def samples(level: Level) -> torch.Tensor:
    path = BrownianPath(range(3), (3, 4, 4))
    return sample(SingleLevel(level), step_rule("sde/ddpm"), process().grid(5), path)[0]


def test_defaults_of_torch_do_not_change_the_samples() -> None:
    level = Level("net", nonlinear_denoise, 1.0)
    expected = samples(level)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(samples(level), expected) and expected.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):  # a stand-in for torch.set_default_device("cuda")
        assert torch.equal(samples(level), expected)


@pytest.mark.parametrize(
    ("denoise", "sentence"),
    [
        (lambda x, logsnr: x.mul_(0.5), "net writes into its input"),
        (lambda x, logsnr: x[:, :1], r"net returned the shape \[3, 1, 4, 4\] for images of \[3, 3, 4, 4\]"),
    ],
)
def test_a_level_that_breaks_the_sampler_is_one_sentence(denoise, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        samples(Level("net", denoise, 1.0))


def test_a_level_whose_cost_is_no_number_is_refused() -> None:
    a, b, _ = toy_family()
    with pytest.raises(UserError, match="ordered by cost"):
        Stitched([a, Level("b", b.denoise, float("nan"))], [0.5])


def test_a_users_matplotlibrc_does_not_change_a_figure(tmp_path: Path) -> None:
    @style.styled
    def draw(path: Path) -> bytes:
        figure = style.new_figure(2, 2, "title")
        figure.subplots().plot([1, 2])
        style.save(figure, path)
        return path.read_bytes()

    expected = draw(tmp_path / "a.png")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "savefig.transparent": True}):
        assert draw(tmp_path / "b.png") == expected


def test_a_file_system_without_locks_and_fsync_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(os, "fsync", missing)
    with pytest.warns(SlowPath, match="without locks"), locked(tmp_path, "a run"):
        write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
