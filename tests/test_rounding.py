"""Errors of a rounded family against the exact one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import toy_family

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.errors import UserError
from mlem_diffusion.figures.rounding import plot_precision
from mlem_diffusion.models.rounding import precision_errors


def shifted(level: Level, by: float) -> Level:
    return Level(level.name, lambda x, logsnr: level.denoise(x, logsnr) + by, level.flops)


IMAGES = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
LOGSNR = np.array([-4.0, 0.0, 3.0])


def test_known_rounding_is_found_at_every_level_and_noise_level():
    family = toy_family()
    rounded = [shifted(level, by) for level, by in zip(family, (0.01, 0.0, -0.03), strict=True)]
    found = precision_errors(family, rounded, IMAGES, LOGSNR, batch=4)
    np.testing.assert_allclose(np.sqrt(found.rounding), np.outer([0.01, 0.0, 0.03], np.ones(3)), rtol=1e-4, atol=1e-7)
    whole = precision_errors(family, rounded, IMAGES, LOGSNR, batch=10)
    np.testing.assert_allclose(found.difference, whole.difference, rtol=1e-6)  # whatever the batch
    assert np.all(found.difference[1] > found.difference[2])  # differences shrink with the level
    np.testing.assert_allclose(found.ratio()[2], 0.03 / np.sqrt(found.difference[2]), rtol=1e-4)
    assert np.all(found.ratio()[1] == 0)
    saved = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [level["level"] for level in saved["levels"]] == ["w0", "w1", "w2"]
    assert saved["levels"][2]["worst_ratio"] == pytest.approx(found.ratio()[2].max())


def test_families_must_match():
    with pytest.raises(UserError, match="same levels"):
        precision_errors(toy_family(), toy_family(2), IMAGES, LOGSNR)


def test_figure(tmp_path: Path):
    family = toy_family()
    found = precision_errors(family, [shifted(level, 1e-3) for level in family], IMAGES, LOGSNR)
    plot_precision(found, tmp_path / "a" / "precision.png", precision="bf16", title="Toy")
    with Image.open(tmp_path / "a" / "precision.png") as image:
        assert image.width > 800 and len(image.convert("L").getcolors(1 << 16) or []) > 20
