"""Damaged, foreign and hostile files: the undisturbed result or one sentence, and no code from data."""

import ast
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import ROOT, outputs

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
    ("data/manifest.json", "measure_gamma", [FORCE, "data.source=???"], BOTH[:1]),
    ("checkpoints/smoke/w3/ema-0000000640.safetensors", "measure_gamma", [FORCE], BOTH[1:]),
    ("checkpoints/smoke/w3/state.pt", "train_levels", [], BOTH[1:]),
    ("results/smoke/gamma.json", "sample_compare", [FORCE], BOTH[:1]),
    ("results/smoke/plans.npz", "sample_compare", [FORCE], BOTH[1:]),
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


# ------------------------------------------------------------------------------------- readers that run no code

PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
         "torch.hub.load", "torch.jit.load", "pd.read_pickle", "joblib.load"}  # fmt: skip
INSTANTIATES = "experiment/config.py"  # only this file builds objects from a configuration


def violations(source: str, file: str) -> list[str]:
    """Imports and calls in Python source that can run code from data."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    calls = {ast.unparse(node): ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    return [text for text in imports if PICKLES.intersection(re.findall(r"\w+", text))] + [
        text
        for text, name in calls.items()
        if name in NEVER
        or (name.endswith("instantiate") and not file.endswith(INSTANTIATES))
        or re.search(r"\b(allow_pickle|shell)=(?!False)", text)
        or (name == "torch.load" and "weights_only=True" not in text)
    ]


def test_no_source_file_runs_code_from_data():
    files = [path for folder in ("src", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert {path.name: found for path in files if (found := violations(path.read_text(), str(path)))} == {}


@pytest.mark.parametrize(
    "planted",
    ["import pickle", "from marshal import loads", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(text)",
     "np.load(p, allow_pickle=True)", "hydra.utils.instantiate(x)", "subprocess.run(x, shell=True)"],
)  # fmt: skip
def test_a_planted_call_is_found(planted: str):
    assert violations(planted, "file.py")
