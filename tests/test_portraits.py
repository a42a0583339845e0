from __future__ import annotations

import numpy as np
import pytest

from mlem_diffusion.data.portraits import render


@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_shape_type_and_range(size: int) -> None:
    images = render(3, size)
    assert images.shape == (3, 3, size, size) and images.dtype == np.uint8
    assert images.min() < 60 and images.max() > 190  # dark and light both occur


@pytest.mark.parametrize("size", [16, 17, 64])
def test_an_image_depends_on_seed_and_index_only(size: int) -> None:
    together = render(40, size, seed=5)
    assert np.array_equal(together, render(40, size, seed=5))
    assert np.array_equal(together[7:8], render(1, size, seed=5, start=7))
    assert np.array_equal(together[30:], render(10, size, seed=5, start=30))
    assert not np.array_equal(together[:4], render(4, size, seed=6))


def test_same_person_at_every_size() -> None:
    large = render(24, 64, seed=1).astype(float)
    small = render(24, 16, seed=1).astype(float)
    averaged = large.reshape(24, 3, 16, 4, 16, 4).mean((3, 5))
    same = np.sqrt(((averaged - small) ** 2).mean())
    other = np.sqrt(((averaged - np.roll(small, 1, 0)) ** 2).mean())
    assert same < 5 and other > 40  # grey levels of 255


def test_portraits_vary_in_many_directions() -> None:
    images = render(400, 16, seed=2).reshape(400, -1).astype(float) / 255
    assert len(np.unique(images, axis=0)) == 400
    assert images.std(0).min() > 0.08  # every pixel varies
    spectrum = np.linalg.svd(images - images.mean(0), compute_uv=False) ** 2
    explained = np.cumsum(spectrum) / spectrum.sum()
    # Not a low-dimensional family: twenty linear components leave a good part of the variance.
    assert 0.05 < 1 - explained[20] < 0.5


def test_edges_are_antialiased() -> None:
    """A hard-edged drawing of few colours has few distinct values; a smooth one has nearly all of them."""
    assert all(len(np.unique(image)) > 100 for image in render(5, 64, seed=3))


def test_zero_images_and_bad_arguments() -> None:
    assert render(0, 16).shape == (0, 3, 16, 16)
    for wrong in ({"count": -1, "size": 16}, {"count": 1, "size": 2}, {"count": 1, "size": 16, "seed": -1}):
        with pytest.raises(ValueError):
            render(**wrong)
