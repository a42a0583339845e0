"""Promise 2: damaged or swapped artefacts give the right result or one sentence, never a wrong number.

Each trial damages one file of a finished pipeline and runs a stage that reads it. The fault is survived if the stage
writes the same as from undamaged files, or if it ends in one sentence that names the file and the remedy.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from pipeline import Forker, Place, difference

CURE = re.compile(r"run .*again|run `?make|delete it|remove it|restore it|overwrite=true|make it|fit it again|again\b")


@dataclass(frozen=True)
class Reader:
    """A stage that reads artefacts, with its place, its arguments and the patterns of these files."""

    name: str
    stage: str
    place: str
    arguments: tuple[str, ...]
    patterns: tuple[str, ...]


READERS = (
    Reader("images, by measure_gamma", "measure_gamma", "everything", ("force=true", "data.source=???"),
           ("data/*.npy", "data/manifest.json")),
    Reader("images, drawn again", "measure_gamma", "everything", ("force=true",), ("data/*.npy", "data/manifest.json")),
    Reader("weights, by measure_gamma", "measure_gamma", "everything", ("force=true",),
           ("checkpoints/smoke/w*/*.safetensors", "checkpoints/smoke/w*/metadata.json")),
    Reader("weights, by train_levels", "train_levels", "everything", (),
           ("checkpoints/smoke/w*/*.safetensors", "checkpoints/smoke/w*/metadata.json",
            "checkpoints/smoke/w*/state.pt")),
    Reader("resume state, by train_levels", "train_levels", "halfway", ("workers=1",),
           ("checkpoints/smoke/w*/state.pt", "checkpoints/smoke/w*/claim.json")),
    Reader("gamma and plans, by sample_compare", "sample_compare", "everything", ("force=true",),
           ("results/smoke/gamma.json", "results/smoke/plans.*")),
    Reader("cache, by sample_compare", "sample_compare", "compared", ("force=true",), ("results/smoke/cache/*",)),
    Reader("cache, by optimise", "optimise", "optimised", ("force=true",), ("results/smoke/cache/*",)),
    Reader("best sampler, by sample", "sample", "everything", ("seeds='0-3'", "force=true"),
           ("results/smoke/best.json", "results/smoke/plans.*", "checkpoints/smoke/w4/ema.safetensors")),
    Reader("results, by report", "report", "everything", (),
           ("results/smoke/*.json", "results/smoke/*.csv", "results/smoke/*.png", "results/smoke/grids/*.png",
            "results/smoke/training/*.png", "results/smoke/config.yaml")),
    Reader("published family, by sample", "sample", "published", ("seeds='0-1'", "force=true"),
           ("checkpoints/smoke/published/**/*",)),
)  # fmt: skip


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def one_bit(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def some_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(8):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


def zeroed(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 4096))
    return data[:start] + bytes(end - start) + data[end:]


def appended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 100))


def emptied(data: bytes, rng: random.Random) -> bytes:
    return b""


def digit(data: bytes, rng: random.Random) -> bytes:
    """The text with one digit changed, so that it still parses."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return one_bit(data, rng)
    changed = bytearray(data)
    at = rng.choice(places)
    changed[at] = 48 + (changed[at] - 48 + rng.randint(1, 9)) % 10
    return bytes(changed)


Damage = Callable[[bytes, random.Random], bytes]
DAMAGES: dict[str, tuple[Damage, int]] = {  # each with its weight
    "truncated": (truncated, 3), "one bit": (one_bit, 5), "8 bytes": (some_bytes, 3), "zeroed": (zeroed, 2),
    "appended": (appended, 1), "emptied": (emptied, 1), "digit": (digit, 3), "swapped": (one_bit, 3),
}  # fmt: skip


def files_of(place: Place, reader: Reader) -> list[Path]:
    found = sorted(
        {p for pattern in reader.patterns for p in place.folder.glob(pattern) if p.is_file() and p.name != ".lock"}
    )
    return [p.relative_to(place.folder) for p in found]


def damage_file(place: Place, file: Path, kind: str, others: list[Path], rng: random.Random) -> str:
    """Damage a file and describe the damage. The file is replaced, because places may share its content."""
    path = place.folder / file
    data = path.read_bytes()
    alike = [p for p in others if p.suffix == file.suffix and p != file and (place.folder / p).read_bytes() != data]
    if kind == "swapped" and alike:
        other = rng.choice(alike)
        changed, kind = (place.folder / other).read_bytes(), f"replaced by {other}"
    else:
        changed = DAMAGES[kind][0](data, rng)
    path.unlink()
    path.write_bytes(changed)
    return f"{file}, {kind}"


@pytest.fixture(scope="module")
def places(stages, forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    """A finished place, and places in other states that readers can meet."""
    base = tmp_path_factory.mktemp("places")
    found = {
        "everything": stages.after["everything"],
        "compared": stages.after["sample_compare"],
        "optimised": stages.after["optimise"],
    }
    halfway = stages.before("train_levels").copy_to(base / "halfway")
    while not all((halfway.checkpoints / f"w{width}" / "state.pt").is_file() for width in (2, 3, 4)):
        for width in (2, 3, 4):
            run = forker("train_levels", halfway.arguments("max_minutes=0", "workers=1", f"only=w{width}"))
            assert run.code == 75, str(run)
    shutil.rmtree(halfway.folder / "results", ignore_errors=True)
    published = stages.after["everything"].copy_to(base / "publishing")
    run = forker("publish", published.arguments())
    assert run.code == 0, str(run)
    clone = Place(base / "published")
    shutil.copytree(published.checkpoints / "published", clone.checkpoints / "published")
    return {**found, "halfway": halfway, "published": clone}


# what each stage writes, except files that depend on times or on the damaged file itself
WRITTEN = {
    "measure_gamma": r"results/smoke/gamma\.(json|png)$",
    "train_levels": r"checkpoints/smoke/w\d/(ema.*\.safetensors|metadata\.json)$",
    "sample_compare": r"results/smoke/(compare\.csv|speedup\.json|best\.json|grids/.*)$",
    "optimise": r"results/smoke/plans\.(json|npz)$",
    "sample": r"results/smoke/samples/.*png$",
    "report": r"results/smoke/report\.html$",
}


def outcome(forker: Forker, place: Place, reader: Reader, file: Path, wanted: dict) -> str:
    """How the stage broke the promise; empty if the fault was survived."""
    run = forker(reader.stage, place.arguments(*reader.arguments))
    if run.code == 0:
        wrong = difference(wanted, place.contents(WRITTEN[reader.stage]))
        return wrong and f"another result: {wrong}; {run}"
    sentence = run.sentence
    if not sentence:
        return f"no sentence: {run}"
    if file.name not in sentence and str(file.parent) not in sentence:
        return f"the file is not named: {sentence}"
    return "" if CURE.search(sentence) else f"no cure: {sentence}"


def trial(number: int, reader: Reader, forker: Forker, places: dict[str, Place], wanted: dict, folder: Path) -> str:
    rng = random.Random(number)
    origin = places[reader.place]
    files = files_of(origin, reader)
    # each kind of file has the same probability, whatever its number of files
    kinds = sorted({re.sub(r"[0-9a-f]{12,}|\d+", "", str(f)) for f in files})
    kind = rng.choice(kinds)
    file = rng.choice([f for f in files if re.sub(r"[0-9a-f]{12,}|\d+", "", str(f)) == kind])
    damage = rng.choices(list(DAMAGES), [weight for _, weight in DAMAGES.values()])[0]
    place = origin.copy_to(folder / str(number), link=True)
    what = damage_file(place, file, damage, files, rng)
    detail = outcome(forker, place, reader, file, wanted)
    shutil.rmtree(place.folder)
    return detail and f"trial {number}, {what}: {detail}"


@pytest.mark.parametrize(
    "index", [pytest.param(i, id=r.name, marks=() if i % 2 else pytest.mark.whole) for i, r in enumerate(READERS)]
)
def test_random_corruptions_of_artefacts(places, forkers, count, whole, tmp_path, index):
    reader = READERS[index]
    place = places[reader.place].copy_to(tmp_path / "undamaged", link=True)
    run = forkers[0](reader.stage, place.arguments(*reader.arguments))
    assert run.code == 0, str(run)
    wanted = place.contents(WRITTEN[reader.stage])
    assert wanted
    numbers = range(index, (54 if whole else 2) * len(READERS), len(READERS))

    def one(number: int) -> str:
        return trial(number, reader, forkers[number % len(forkers)], places, wanted, tmp_path)

    with ThreadPoolExecutor(len(forkers)) as pool:
        for detail in pool.map(one, numbers):
            count(2, f"corrupted {reader.name}", not detail, detail)
