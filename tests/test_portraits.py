import hashlib

import numpy as np
import pytest
from toys import portraits


@pytest.mark.parametrize(
    ("size", "seed", "digest"),
    [(8, 0, "6b13ad8da756a8bc"), (16, 1, "99e0b2986e8fc8b9"), (64, 2, "3e6bc35d67e53237")],
)
def test_the_images_are_those_of_version_1(size: int, seed: int, digest: str) -> None:
    images = portraits(24, size, seed)
    assert images.shape == (24, 3, size, size) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith(digest)


def test_same_person_at_every_size_with_smooth_edges() -> None:
    large, small = portraits(24, 64, seed=1).astype(float), portraits(24, 16, seed=1).astype(float)
    assert all(len(np.unique(image)) > 100 for image in large)  # a drawing with hard edges has few distinct values
    averaged = large.reshape(24, 3, 16, 4, 16, 4).mean((3, 5))
    same = np.sqrt(((averaged - small) ** 2).mean())
    other = np.sqrt(((averaged - np.roll(small, 1, 0)) ** 2).mean())
    assert same < 5 and other > 40  # grey levels of 255


def test_portraits_vary_in_many_directions() -> None:
    drawn = portraits(100, 16, seed=2)
    assert drawn.min() < 60 and drawn.max() > 190  # dark and light both occur
    images = drawn.reshape(100, -1).astype(float) / 255
    assert len(np.unique(images, axis=0)) == 100
    assert images.std(0).min() > 0.08  # every pixel varies
    spectrum = np.linalg.svd(images - images.mean(0), compute_uv=False) ** 2
    # Not a low-dimensional family: twenty linear components leave a good part of the variance.
    assert 0.05 < spectrum[20:].sum() / spectrum.sum() < 0.5
