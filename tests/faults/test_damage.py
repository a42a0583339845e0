"""Damaged, foreign and hostile files: the undisturbed result or one sentence, and no code from data."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import outputs

FORCE = "force=true"


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def damaged(path: Path, kind: str, executed: Path) -> bytes:
    """Half of the file, or a file of its kind that runs code in a reader that trusts it."""
    if kind == "truncated":
        return path.read_bytes()[: path.stat().st_size // 2]
    out, objects = io.BytesIO(), np.array([Payload(executed)] * 320, dtype=object)
    if path.suffix == ".pt":
        torch.save({"model": Payload(executed), "identity": ""}, out)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            names = stored.files
        np.savez(out, **dict.fromkeys(names, objects))  # pyright: ignore[reportArgumentType]
    elif path.suffix == ".npy":
        np.save(out, objects, allow_pickle=True)
    else:
        return pickle.dumps(Payload(executed))
    return out.getvalue()


BOTH, SEEDS = ("truncated", "hostile"), "seeds='0-2,5'"
FILES = [
    ("data/images.npy", "measure_gamma", [FORCE, "data.source=???"], BOTH),
    ("data/split.npy", "measure_gamma", [FORCE, "data.source=???"], BOTH[1:]),
    ("data/manifest.json", "measure_gamma", [FORCE, "data.source=???"], BOTH[:1]),
    ("checkpoints/smoke/w3/ema-0000000640.safetensors", "measure_gamma", [FORCE], BOTH[1:]),
    ("checkpoints/smoke/w3/state.pt", "train_levels", [], BOTH[1:]),
    ("results/smoke/gamma.json", "sample_compare", [FORCE], BOTH[:1]),
    ("results/smoke/plans.npz", "sample_compare", [FORCE], BOTH[1:]),
    ("results/smoke/cache/setting-*.npz", "sample_compare", [FORCE], BOTH[1:]),
    ("results/smoke/cache/reference-*.npz", "sample_compare", [FORCE], BOTH[:1]),
    ("checkpoints/smoke/gauss-*.safetensors", "sample", [FORCE, SEEDS], BOTH[1:]),
    ("results/smoke/best.json", "sample", [FORCE, SEEDS], BOTH[:1]),
    ("results/smoke/compare.csv", "report", [], BOTH),
]
CASES = [(*case, kind) for *case, kinds in FILES for kind in kinds]


@pytest.mark.parametrize(("pattern", "stage", "more", "kind"), CASES)
def test_a_damaged_file_gives_the_same_result_or_one_sentence(done, here, tmp_path, pattern, stage, more, kind):
    place = done[0].copy_to(tmp_path)
    paths = sorted(place.folder.glob(pattern))
    assert paths, pattern
    path, executed = paths[0], tmp_path / "executed"
    if path.name == "state.pt":  # of a level whose training has not ended
        (path.parent / "metadata.json").unlink()
    path.write_bytes(damaged(path, kind, executed))
    run = here(stage, place, *more, code=None)
    assert not executed.exists()
    if run.code == 0:
        assert outputs(place, stage) == outputs(done[0], stage)
    else:
        assert run.code == 2 and (path.name in run.complaint or str(path.parent) in run.complaint), run.err
