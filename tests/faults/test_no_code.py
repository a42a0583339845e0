"""Promise 3: no file that a run reads can execute code; a run refuses an unusable file in one sentence.

Each attack writes a file that would run a command in a reader that trusts it. It recomputes every checksum (they are
not signatures) and runs the stage that reads the file. The attack is survived if the command has not run, and the stage
ends as it does without the attack or in one sentence.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from no_code import sources, violations
from PIL import Image
from pipeline import ROOT, Forker, Place

from mlem_diffusion.files import SEAL, sha256_of, write_arrays, write_json
from mlem_diffusion.models.checkpoint import save_state
from mlem_diffusion.models.published import write_index

SETTING = "sampler={dynamics:ode,step_rule:ddim,estimator:single,levels:[w4],steps:4}"
SECRET = "a-word-from-the-environment"
PRODUCT = "62615533"  # the text that a template renders from {{ 7919 * 7907 }}
MARKUP = "<script>alert(7)</script><img src=x onerror=alert(7)> {{ 7919 * 7907 }} "


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def target(command: str) -> dict[str, Any]:
    """A configuration that runs a command when Hydra instantiates it; newer versions of Hydra refuse os.system."""
    return {"_target_": "no_code.run", "command": command}


@dataclass(frozen=True)
class Attack:
    """plant(place, command) writes the file; check(place) describes any further damage; empty if there is none."""

    kind: str
    stage: str
    arguments: tuple[str, ...]
    place: str
    check: Callable[[Place], str]
    plant: Callable[[Place, str], None]


Plant = Callable[[Place, str], None]
ATTACKS: list[Attack] = []


def nothing(place: Place) -> str:
    return ""


def attack(
    kind: str, stage: str, *arguments: str, place: str = "everything", check: Callable[[Place], str] = nothing
) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        ATTACKS.append(Attack(kind, stage, arguments, place, check, plant))
        return plant

    return add


# ------------------------------------------------------------------------------------ writing as an attacker does


def replace(path: Path, data: bytes) -> None:
    """Write a new file in place of the old one, because places share the content of files."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def sealed(path: Path, data: bytes) -> bytes:
    """The bytes with the checksum that files.check_zip expects."""
    return data + hashlib.sha256(path.name.encode() + data).hexdigest().encode()


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON object and seal it again."""
    content = json.loads(path.read_text())
    content.pop(SEAL, None)
    change(content)
    write_json(path, content)


def note(place: Place, *names: str) -> None:
    """Record in provenance.json that the stages wrote these results."""

    def change(content: dict[str, Any]) -> None:
        for entry in content["stages"].values() if "provenance.json" not in names else ():
            entry["outputs"] |= {n: sha256_of(place.results / n) for n in names if n in entry["outputs"]}
        if "config.yaml" in names:
            content["config_sha256"] = sha256_of(place.results / "config.yaml")

    rewrite(place.results / "provenance.json", change)


def index_again(place: Place) -> None:
    folder = published_of(place)
    write_index(folder, {k: v for k, v in json.loads((folder / "family.json").read_text()).items() if k != SEAL})


def published_of(place: Place) -> Path:
    return place.checkpoints / "published"


def objects(command: str, count: int = 1) -> np.ndarray:
    """An array of Python objects, which numpy pickles."""
    return np.array([Payload(command)] * count, dtype=object)


def zipped(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
    return out.getvalue()


def torch_pickle(command: str, **more: Any) -> bytes:
    out = io.BytesIO()
    torch.save({"model": Payload(command)}, out, **more)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ resume states


def untrained(place: Place) -> Path:
    """The state of an unfinished level, from which training must resume."""
    (place.checkpoints / "w2" / "metadata.json").unlink()
    return place.checkpoints / "w2" / "state.pt"


TRAIN = ("only=w2", "workers=1")


@attack("pickle as resume state", "train_levels", *TRAIN)
def a_plain_pickle(place: Place, command: str) -> None:
    path = untrained(place)
    replace(path, sealed(path, pickle.dumps(Payload(command), protocol=2)))  # torch warns about later protocols


@attack("pickle as resume state", "train_levels", *TRAIN)
def torchs_archive_with_objects(place: Place, command: str) -> None:
    save_state(untrained(place), {"model": Payload(command), "identity": ""})


@attack("pickle as resume state", "train_levels", *TRAIN)
def torchs_old_format(place: Place, command: str) -> None:
    path = untrained(place)
    replace(path, sealed(path, torch_pickle(command, _use_new_zipfile_serialization=False)))


@attack("pickle as resume state", "train_levels", *TRAIN)
def a_state_with_a_target(place: Place, command: str) -> None:
    path = untrained(place)
    state = torch.load(path, weights_only=True)
    save_state(path, {**state, "optimiser": target(command), "history": [target(command)]})


@attack("targets in JSON", "train_levels", *TRAIN)
def a_claim(place: Place, command: str) -> None:
    untrained(place)
    rewrite(place.checkpoints / "w2" / "claim.json", lambda content: content.update(target(command), fingerprint=1))


# ------------------------------------------------------------------------------------------------------ weights


def swap_weights(place: Place, data: bytes) -> None:
    folder = place.checkpoints / "w4"
    for name in ("ema.safetensors", "ema-0000000640.safetensors"):
        replace(folder / name, data)
    found = sha256_of(folder / "ema.safetensors")

    def change(content: dict[str, Any]) -> None:
        content["weights_sha256"] = content["snapshots"][-1]["sha256"] = found

    rewrite(folder / "metadata.json", change)


@attack("pickle as weights", "sample", SETTING, "seeds='0-1'")
def weights_from_pickle(place: Place, command: str) -> None:
    swap_weights(place, pickle.dumps(Payload(command)))


@attack("pickle as weights", "measure_gamma", "force=true")
def weights_from_torch(place: Place, command: str) -> None:
    swap_weights(place, torch_pickle(command))


@attack("pickle as weights", "sample", "seeds='0-1'", place="published")
def published_weights(place: Place, command: str) -> None:
    path = published_of(place) / "w4" / "ema-bf16.safetensors"
    replace(path, torch_pickle(command))
    rewrite(path.with_name("metadata.json"), lambda content: content.update(weights_sha256=sha256_of(path)))
    index_again(place)


@attack("pickle as weights", "sample_compare", "compare.gamma=2.5", place="published")
def a_published_gaussian(place: Place, command: str) -> None:
    replace(published_of(place) / "gauss.safetensors", torch_pickle(command))
    index_again(place)


@attack("pickle as weights", "sample", "seeds='0-1'", "force=true")
def a_cached_gaussian(place: Place, command: str) -> None:
    (path,) = (place.results / "cache").glob("gauss-*.safetensors")
    replace(path, torch_pickle(command))


# ------------------------------------------------------------------------------------------------------- arrays


def object_arrays(pattern: str) -> Plant:
    """Replace the arrays of these result files by pickled objects."""

    def plant(place: Place, command: str) -> None:
        for path in place.results.glob(pattern):
            with np.load(path, allow_pickle=False) as stored:
                names = stored.files
            write_arrays(path, {name: objects(command) for name in names})

    return plant


for pattern, stage in (("cache/setting-*.npz", "sample_compare"), ("cache/reference-*.npz", "sample_compare"),
                       ("cache/real-*.npz", "sample_compare"), ("plans.npz", "sample_compare"),
                       ("cache/candidates.npz", "optimise"), ("cache/effects-*.npz", "optimise")):  # fmt: skip
    attack("pickled arrays", stage, "force=true")(object_arrays(pattern))


@attack("pickled arrays", "sample_compare", "force=true")
def plans_from_pickle(place: Place, command: str) -> None:
    path = place.results / "plans.npz"
    replace(path, sealed(path, pickle.dumps(Payload(command))))


@attack("pickled arrays", "sample_compare", "force=true")
def a_pickle_within_plans(place: Place, command: str) -> None:
    path = place.results / "plans.npz"
    replace(path, sealed(path, zipped("table.npy", pickle.dumps(Payload(command)))))


@attack("pickled arrays", "sample_compare", "compare.gamma=2.5", place="published")
def published_statistics(place: Place, command: str) -> None:
    path = published_of(place) / "statistics.npz"
    write_arrays(path, {name: objects(command) for name in ("mean", "upper", "n")})
    index_again(place)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def images_as(name: str, make: Callable[[str], bytes]) -> Plant:
    """Replace a file of the prepared images, and its hash in the manifest."""

    def plant(place: Place, command: str) -> None:
        data = make(command)
        replace(place.data / f"{name}.npy", data)
        key = {"images": "sha256", "split": "split_sha256"}[name]
        rewrite(place.data / "manifest.json", lambda content: content.update({key: hashlib.sha256(data).hexdigest()}))

    return plant


for file in ("images", "split"):
    for make in (
        lambda command: npy(objects(command, 320)),
        lambda command: pickle.dumps(Payload(command)),
        lambda command: zipped("arr_0.npy", npy(objects(command, 320))),
    ):
        attack("pickled images", "measure_gamma", "force=true", "data.source=???")(images_as(file, make))


# -------------------------------------------------------------------------------------------------- JSON and YAML


def added(path: Callable[[Place], Path]) -> Plant:
    """Add targets to a JSON object."""

    def plant(place: Place, command: str) -> None:
        more = {**target(command), "more": target(command), "callable": target(command), "family": target(command)}
        rewrite(path(place), lambda content: content.update(more))
        note(place, path(place).name)

    return plant


def instead(path: Callable[[Place], Path], *keys: str) -> Plant:
    """Replace the values of a JSON object by targets."""

    def plant(place: Place, command: str) -> None:
        rewrite(path(place), lambda content: content.update({key: target(command) for key in keys or content}))
        note(place, path(place).name)

    return plant


def result(name: str) -> Callable[[Place], Path]:
    return lambda place: place.results / name


def own_metadata(place: Place) -> Path:
    return place.checkpoints / "w4" / "metadata.json"


def manifest(place: Place) -> Path:
    return place.data / "manifest.json"


JSONS: tuple[tuple[Callable[[Place], Path], str, tuple[str, ...], tuple[str, ...]], ...] = (
    (own_metadata, "sample", (SETTING, "seeds='0-1'"), ("unet",)),
    (own_metadata, "sample", (SETTING, "seeds='0-1'"), ("target",)),
    (own_metadata, "sample", (SETTING, "seeds='0-1'"), ("width", "size", "data_rms", "flops")),
    (own_metadata, "sample", (SETTING, "seeds='0-1'"), ("weights_file", "weights_sha256")),
    (own_metadata, "measure_gamma", ("force=true",), ("snapshots", "logsnr_range")),
    (own_metadata, "measure_gamma", ("force=true",), ()),
    (own_metadata, "train_levels", ("workers=1",), ("fingerprint",)),
    (result("best.json"), "sample", ("seeds='0-1'", "force=true"), ("levels",)),
    (result("best.json"), "sample", ("seeds='0-1'", "force=true"), ("gamma", "steps", "c")),
    (result("best.json"), "sample", ("seeds='0-1'", "force=true"), ("dynamics", "step_rule", "estimator", "plan")),
    (result("best.json"), "sample", ("seeds='0-1'", "force=true"), ("made_with",)),
    (result("best.json"), "report", (), ()),
    (result("gamma.json"), "sample_compare", ("force=true",), ("estimates",)),
    (result("gamma.json"), "report", (), ()),
    (result("plans.json"), "sample_compare", ("force=true",), ("plans",)),
    (result("plans.json"), "sample_compare", ("force=true",), ("seeds_used", "alone", "calibration")),
    (result("provenance.json"), "report", (), ("stages",)),
    (result("ablation.json"), "report", (), ()),
    (result("speedup.json"), "report", (), ()),
    (result("cache/done.json"), "report", (), ()),
    (result("cache/done.json"), "measure_gamma", ("data.source=???",), ()),
    (manifest, "measure_gamma", ("force=true", "data.source=???"), ("count", "size")),
    (manifest, "measure_gamma", ("force=true", "data.source=???"), ("sha256", "split_sha256")),
)  # fmt: skip
for path, stage, arguments, keys in JSONS:
    attack("targets in JSON", stage, *arguments)(added(path))
    attack("targets in JSON", stage, *arguments)(instead(path, *keys))


@attack("targets in published JSON", "sample", "seeds='0-1'", place="published")
def published_metadata_more(place: Place, command: str) -> None:
    rewrite(published_of(place) / "w4" / "metadata.json", lambda content: content.update(target(command)))
    index_again(place)


@attack("targets in published JSON", "sample", "seeds='0-1'", place="published")
def a_published_network(place: Place, command: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["unet"] |= target(command)

    rewrite(published_of(place) / "w4" / "metadata.json", change)
    index_again(place)


@attack("targets in published JSON", "sample_compare", "compare.gamma=2.5", place="published")
def an_index(place: Place, command: str) -> None:
    rewrite(
        published_of(place) / "family.json", lambda content: content.update(gaussian=target(command), **target(command))
    )
    index_again(place)


@attack("targets in published JSON", "sample", "seeds='0-1'", place="published")
def an_index_of_targets(place: Place, command: str) -> None:
    rewrite(
        published_of(place) / "family.json", lambda content: content.update(dict.fromkeys(content, target(command)))
    )
    index_again(place)


YAML = (
    '!!python/object/apply:os.system ["{0}"]\n',
    'name: !!python/object/apply:os.system ["{0}"]\nhome: ${{oc.env:WORD}}\n',
    "name: smoke\nfamily:\n  callable:\n    _target_: no_code.run\n    command: '{0}'\nhome: ${{oc.env:WORD}}\n",
)


def secret(place: Place) -> str:
    text = (place.results / "report.html").read_text()
    return "a variable of the environment is shown" if SECRET in text else ""


def yaml_in_results(text: str) -> Plant:
    def plant(place: Place, command: str) -> None:
        replace(place.results / "config.yaml", text.format(command).encode())
        note(place, "config.yaml")

    return plant


def yaml_in_checkpoints(text: str) -> Plant:
    def plant(place: Place, command: str) -> None:
        for width in (2, 3, 4):
            replace(place.checkpoints / f"w{width}" / "config.yaml", text.format(command).encode())

    return plant


for text in YAML:
    attack("tags and targets in YAML", "report", check=secret)(yaml_in_results(text))
    attack("tags and targets in YAML", "sample", SETTING, "seeds='0-1'")(yaml_in_checkpoints(text))


@attack("tags and targets in YAML", "train_levels", *TRAIN)
def yaml_where_training_goes_on(place: Place, command: str) -> None:
    untrained(place)
    yaml_in_checkpoints(YAML[1])(place, command)


@attack("records", "train_levels", *TRAIN)
def metrics(place: Place, command: str) -> None:
    untrained(place)
    lines = [
        {**target(command), "stage": "train_levels", "level": "w2", "images": target(command)},
        [target(command)],
        MARKUP,
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + f"!!python/object/apply:os.system ['{command}']\n"
    (place.results / "jobs" / "w2").mkdir(parents=True)
    replace(place.results / "jobs" / "w2" / "metrics.jsonl", text.encode())
    replace(place.results / "metrics.jsonl", text.encode())


# ---------------------------------------------------------------------------------------------------- the report


def raw(place: Place) -> str:
    text = (place.results / "report.html").read_text()
    bad = [part for part in ("<script", "<img src=x", PRODUCT) if part in text]
    return f"the report holds {', '.join(bad)}" if bad else ""


def markup(command: str) -> str:
    inside = f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}"
    return f'{MARKUP}{inside}{{% include "/etc/passwd" %}}"\'>'


def everywhere(value: Any, text: str) -> Any:
    """The value with every string replaced, except hashes and kinds that readers look up."""
    if isinstance(value, dict):
        return {
            k: v if k in ("outputs", "made_with", "unit", "dynamics") else everywhere(v, text) for k, v in value.items()
        }
    if isinstance(value, list):
        return [everywhere(v, text) for v in value]
    return text if isinstance(value, str) else value


@attack("markup and templates in the report", "report", check=raw)
def markup_in_provenance(place: Place, command: str) -> None:
    text = markup(command)

    def change(content: dict[str, Any]) -> None:
        content |= everywhere({k: v for k, v in content.items() if k != "stages"}, text)
        content["stages"] = {name: everywhere(entry, text) for name, entry in content["stages"].items()}
        content[text] = {text: text}

    rewrite(place.results / "provenance.json", change)


def markup_in(*names: str) -> Plant:
    def plant(place: Place, command: str) -> None:
        for name in names:
            if (place.results / name).is_file():
                rewrite(place.results / name, lambda content: content.update(everywhere(content, markup(command))))
                note(place, name)

    return plant


for name in ("best.json", "gamma.json", "speedup.json", "ablation.json", "verdicts.json", "diagnostics.json"):
    attack("markup and templates in the report", "report", check=raw)(markup_in(name))


@attack("markup and templates in the report", "report", check=raw)
def markup_in_the_comparison(place: Place, command: str) -> None:
    path = place.results / "compare.csv"
    quoted = '"' + markup(command).replace('"', '""') + '"'
    replace(path, path.read_text().replace("ddpm", quoted).replace("FD-random-conv", quoted).encode())
    note(place, "compare.csv")


@attack("markup and templates in the report", "report", check=raw)
def markup_in_a_configuration(place: Place, command: str) -> None:
    replace(place.results / "config.yaml", f"</pre>{markup(command)}".encode())
    note(place, "config.yaml")


@attack("markup and templates in the report", "report", check=raw)
def markup_in_the_names_of_files(place: Place, command: str) -> None:
    picture = (place.results / "grids" / "ode.png").read_bytes()
    for name in ("<script>alert(7)<img src=x>.png", '"onload="alert(7)".png', "{{ 7919 * 7907 }}.png"):
        replace(place.results / "grids" / name.replace("/", ""), picture)


@attack("markup and templates in the report", "report", check=raw)
def a_drawing_as_picture(place: Place, command: str) -> None:
    replace(place.results / "grids" / "ode.png", f"<svg><script>{MARKUP}</script></svg>".encode())
    note(place, "grids/ode.png")


@attack("markup and templates in the report", "report", "title='<script>alert(7)</script>{{7919*7907}}'", check=raw)
def markup_in_the_title(place: Place, command: str) -> None:
    pass


# ----------------------------------------------------------------------------------- downloads and archives


@attack("pickle as Inception's weights", "sample_compare", "force=true", "metrics=inception", "~metrics.dim")
def inception(place: Place, command: str) -> None:
    path = place.folder / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(torch_pickle(command))
    place.more.append(f"metrics.weights='{path}'")


HOSTILE = (
    "sitecustomize.py", "conftest.py", "__init__.py", "a.pth", "weights.pth", "state.pt", "a.pkl", "../../up.py",
    "../../torch.py", "split.npy", "manifest.json", "config.yaml", "numpy/__init__.py",
)  # fmt: skip


def picture() -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def members(command: str) -> dict[str, bytes]:
    """Pictures, code, and code named like a picture."""
    code = {name: f"import os; os.system('{command}')\n".encode() for name in HOSTILE}
    code |= {name: pickle.dumps(Payload(command)) for name in HOSTILE if name.endswith(("pkl", "pt", "npy"))}
    return {**code, **{f"{i}.png": picture() for i in range(6)}}


def unpacked(place: Place) -> str:
    names = {Path(name).name for name in HOSTILE} - {"split.npy", "manifest.json", "config.yaml"}
    found = [p for p in place.folder.parent.rglob("*") if p.name in names]
    found = [p for p in found if "source" not in p.relative_to(place.folder.parent).parts and "w" not in p.parent.name]
    return f"left there: {found[0]}" if found else ""


FEW = ("data.count=6", "data.holdout=2")


@attack("code in archives of images", "prepare_data", *FEW, place="nothing", check=unpacked)
def in_a_zip(place: Place, command: str) -> None:
    path = place.folder / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members(command).items():
            archive.writestr(name, data)
    place.more.append(f"data.source='{path}'")


@attack("code in archives of images", "prepare_data", *FEW, place="nothing", check=unpacked)
def in_a_tar(place: Place, command: str) -> None:
    path = place.folder / "images.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in members(command).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("torch.py")
        link.type, link.linkname = tarfile.SYMTYPE, "../../torch.py"
        archive.addfile(link)
    place.more.append(f"data.source='{path}'")


@attack("code in archives of images", "prepare_data", *FEW, place="nothing")
def in_a_folder(place: Place, command: str) -> None:
    for name, data in members(command).items():
        path = place.folder / "source" / name.replace("../", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    place.more.append(f"data.source='{place.folder}/source'")


@attack("code in archives of images", "prepare_data", *FEW, place="nothing")
def called_a_picture(place: Place, command: str) -> None:
    path = place.folder / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(6):
            archive.writestr(f"{i}.jpg", pickle.dumps(Payload(command)))
        # PostScript, for which some readers start an interpreter
        archive.writestr("6.png", f"%!PS\n({command}) (w) file\n")
    place.more.append(f"data.source='{path}'")


# -------------------------------------------------------------------------------------------------------- trials


@pytest.fixture(scope="module")
def places(stages, forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    base = tmp_path_factory.mktemp("attacked")
    publishing = stages.after["everything"].copy_to(base / "publishing")
    run = forker("publish", publishing.arguments())
    assert run.code == 0, str(run)
    published = Place(base / "published")
    shutil.copytree(published_of(publishing), published_of(published))
    return {"everything": stages.after["everything"], "nothing": stages.after["nothing"], "published": published}


def outcome(forker: Forker, origin: Place, attack: Attack, folder: Path) -> str:
    """How the stage broke the promise; empty if the attack was survived."""
    place, sentinel = origin.copy_to(folder / "place", link=True), folder / "it-has-run"
    place.more = [*place.more]
    attack.plant(place, f"touch {sentinel}")
    run = forker(attack.stage, place.arguments(*attack.arguments), environment={"WORD": SECRET})
    if sentinel.exists():
        return f"the command has run: {run}"
    if run.code != 0 and not run.sentence:
        return f"no sentence: {run}"
    return attack.check(place) if run.code == 0 else ""


def test_attacks(places, forkers, count, whole, tmp_path):
    order = list(range(len(ATTACKS)))
    random.Random(5).shuffle(order)
    chosen = sorted(order if whole else order[: len(order) // 6])

    def one(number: int) -> tuple[str, str]:
        attack, folder = ATTACKS[chosen[number]], tmp_path / str(number)
        folder.mkdir()
        detail = outcome(forkers[number % len(forkers)], places[attack.place], attack, folder)
        name = getattr(attack.plant, "__qualname__", "")
        return attack.kind, detail and f"attack {chosen[number]} ({name}), {attack.stage}: {detail}"

    with ThreadPoolExecutor(len(forkers)) as pool:
        for kind, detail in pool.map(one, range(len(chosen))):
            count(3, kind, not detail, detail)


def test_attacks_are_real(tmp_path):
    """Readers that trust their input do run the command."""
    readers: dict[str, Callable[[str], object]] = {
        "pickle": lambda command: pickle.loads(pickle.dumps(Payload(command))),
        "torch": lambda command: torch.load(io.BytesIO(torch_pickle(command)), weights_only=False),
        "numpy": lambda command: np.load(io.BytesIO(npy(objects(command))), allow_pickle=True),
        "yaml": lambda command: yaml.unsafe_load(YAML[0].format(command)),
        "hydra": lambda command: instantiate(target(command)),
    }
    for name, read in readers.items():
        sentinel = tmp_path / name
        read(f"touch {sentinel}")
        assert sentinel.exists(), name


# --------------------------------------------------------------------------------------------- the source itself

PLANTED = (
    "eval(text)", "exec(text)", "__import__(name)",
    "import pickle\npickle.load(file)", "from pickle import loads as read\nread(data)", "import marshal",
    "import shelve as s\ns.open(path)", "import yaml\nyaml.load(text)", "import yaml as y\ny.unsafe_load(text)",
    "from yaml import full_load\nfull_load(text)",
    "import torch\ntorch.load(path)", "import torch\ntorch.load(path, weights_only=False)",
    "import torch\ntorch.load(path, weights_only=safe)", "from torch import load\nload(path)",
    "import torch\ntorch.hub.load(repository, name)",
    "import numpy as np\nnp.load(path, allow_pickle=True)", "import numpy as np\nnp.load(path, allow_pickle=trusted)",
    "from numpy import load\nload(path, allow_pickle=1)",
    "from hydra.utils import instantiate\ninstantiate(config)", "import hydra\nhydra.utils.instantiate(config)",
    "from hydra.utils import instantiate as make\nmake(config)",
    "from hydra.utils import get_method\nget_method(name)()", "import os\nos.system(command)",
    "from os import system\nsystem(command)", "import os\nos.popen(command)",
    "import subprocess\nsubprocess.run(command, shell=True)",
    "from subprocess import Popen\nPopen(command, shell=quick)", "import importlib\nimportlib.import_module(name)",
)  # fmt: skip


def test_the_source_calls_nothing_that_runs_code(count):
    files = sources(ROOT)
    assert len(files) > 60
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        found = list(violations(path.read_text(), name))
        count(3, "source files that might run code from data", not found, "; ".join(found))


def test_templates_escape_their_values():
    for path in (ROOT / "src").rglob("*.jinja"):
        assert "safe" not in path.read_text(), path


def test_planted_calls_are_found(count):
    for text in PLANTED:
        found = list(violations("def read(path):\n" + textwrap.indent(text, "    "), "src/planted.py"))
        count(3, "planted calls, found in the source", bool(found), text)
    harmless = (
        "import re, torch, numpy as np\nre.compile(x)\nnp.load(p)\ntorch.load(p, weights_only=True)\nmodel.eval()\n"
    )
    assert not list(violations(harmless, "src/planted.py"))
    assert not list(
        violations("from hydra.utils import instantiate\ninstantiate(x)\n", "src/mlem_diffusion/experiment/stage.py")
    )
