"""Damaged, foreign and hostile files: the undisturbed result or one sentence, and no code from data."""

import ast
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from outputs import outputs
from pipeline import ROOT, Place

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
        np.savez(out, **dict.fromkeys(names, objects))
    elif path.suffix == ".npy":
        np.save(out, objects, allow_pickle=True)
    else:
        return pickle.dumps(Payload(executed))
    return out.getvalue()


BOTH, SEEDS = ("truncated", "hostile"), "seeds='0-2,5'"
FILES = [
    ("data/images.npy", "measure_gamma", [FORCE, "data.source=???"], BOTH),
    ("data/manifest.json", "measure_gamma", [FORCE, "data.source=???"], BOTH[:1]),
    ("checkpoints/smoke/w3/ema-0000000640.safetensors", "measure_gamma", [FORCE], BOTH),
    ("checkpoints/smoke/w3/metadata.json", "measure_gamma", [FORCE], BOTH[:1]),
    ("checkpoints/smoke/w3/state.pt", "train_levels", [], BOTH),
    ("results/smoke/gamma.json", "sample_compare", [FORCE], BOTH[:1]),
    ("results/smoke/plans.json", "sample_compare", [FORCE], BOTH[:1]),
    ("results/smoke/plans.npz", "sample_compare", [FORCE], BOTH),
    ("results/smoke/cache/setting-*.npz", "sample_compare", [FORCE], BOTH[1:]),
    ("results/smoke/cache/reference-*.npz", "sample_compare", [FORCE], BOTH[:1]),
    ("results/smoke/cache/gauss-*.safetensors", "sample", [FORCE, SEEDS], BOTH[1:]),
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
    run = here(stage, place, *more)
    assert not executed.exists()
    if run.code == 0:
        assert outputs(place, stage) == outputs(done[0], stage)
    else:
        assert run.code == 2 and (path.name in run.complaint or str(path.parent) in run.complaint), run.err


def weights_of_another_level(place: Place) -> None:
    name = "ema-0000000640.safetensors"
    shutil.copy(place.checkpoints / "w2" / name, place.checkpoints / "w3" / name)


def metadata_of_another_level(place: Place) -> None:
    shutil.copy(place.checkpoints / "w2" / "metadata.json", place.checkpoints / "w3" / "metadata.json")


def state_of_another_level(place: Place) -> None:
    (place.checkpoints / "w3" / "metadata.json").unlink()
    shutil.copy(place.checkpoints / "w2" / "state.pt", place.checkpoints / "w3" / "state.pt")


@pytest.mark.parametrize(
    ("make", "stage", "words"),
    [
        (weights_of_another_level, "measure_gamma", "not the file named in its level's metadata.json"),
        (metadata_of_another_level, "measure_gamma", "does not describe the level w3"),
        (state_of_another_level, "train_levels", "is not the state of this network"),
    ],
)
def test_files_of_another_level_are_refused(done, here, tmp_path, make, stage, words):
    place = done[0].copy_to(tmp_path)
    make(place)
    run = here(stage, place, FORCE, "workers=1")
    assert run.code == 2 and words in run.complaint and "w3" in run.complaint


# ------------------------------------------------------------------------------------- readers that run no code

PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
         "torch.hub.load", "torch.jit.load", "pd.read_pickle", "joblib.load"}  # fmt: skip
INSTANTIATES = "experiment/config.py"  # only this file builds objects from a configuration


def violations(source: str, file: str) -> Iterator[str]:
    """Imports and calls in Python source that can run code from data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"{file} imports {name}" for name in names if name.split(".")[0] in PICKLES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in NEVER or (name.endswith("instantiate") and not file.endswith(INSTANTIATES)):
                yield f"{file} calls {name}"
            if name == "torch.load" and given.get("weights_only") != "True":
                yield f"{file} calls torch.load without weights_only=True"
            if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
                yield f"{file} calls {name} with {given}"


def test_no_source_file_runs_code_from_data():
    files = [path for folder in ("src", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert [found for path in files for found in violations(path.read_text(), str(path))] == []


@pytest.mark.parametrize(
    "planted",
    ["import pickle", "from marshal import loads", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(text)",
     "np.load(p, allow_pickle=True)", "hydra.utils.instantiate(x)", "subprocess.run(x, shell=True)"],
)  # fmt: skip
def test_a_planted_call_is_found(planted: str):
    assert list(violations(planted, "file.py"))
