"""Files are complete or absent, and are checked before they are used."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mlem_diffusion.errors import SlowPath, UserError
from mlem_diffusion.files import (
    SEAL,
    Damaged,
    atomic_write,
    cached,
    check_zip,
    read_arrays,
    read_json,
    remove_partial,
    seal_zip,
    write_arrays,
    write_json,
)


def refused(read, *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------------- JSON


def test_json_is_read_without_its_seal(tmp_path: Path):
    path, value = tmp_path / "a.json", {"x": [1, 2.5, None], "y": {"z": "ü"}, "n": 1e-300}
    write_json(path, value)
    assert read_json(path, "") == value
    assert list(json.loads(path.read_text())) == ["x", "y", "n", SEAL]


def test_layout_and_order_do_not_matter(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1, "y": [2, 3]})
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=8))
    assert read_json(path, "") == {"x": 1, "y": [2, 3]}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"x": 2, "content_sha256": "0"}', "changed or damaged"),
        ('{"x": 2}', "does not carry its checksum"),
        ("[1, 2]", "does not contain a JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, text: str, what: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    message = refused(read_json, path, "make it again")
    assert what in message and "make it again" in message and "a.json" in message


def test_every_changed_digit_is_detected(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"gamma": 2.517, "levels": {"w4": 12}, "text": "7"})
    text = path.read_text()
    for i, character in enumerate(text):
        if character.isdigit():
            path.write_text(text[:i] + str((int(character) + 1) % 10) + text[i + 1 :])
            assert "a.json" in refused(read_json, path, "")


def test_a_seal_can_be_optional(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('{"x": 2}')
    assert read_json(path, "", sealed=False) == {"x": 2}
    write_json(path, {"x": 2})
    path.write_text(path.read_text().replace("2,", "3,"))
    assert "changed or damaged" in refused(lambda: read_json(path, "", sealed=False))


# ------------------------------------------------------------------------------------------------- arrays


def arrays() -> dict:
    return {"a": np.arange(12.0).reshape(3, 4), "b": np.array("text"), "c": np.zeros(0, np.float32)}


@pytest.mark.parametrize("compress", [True, False])
def test_arrays_round_trip_and_other_programs_read_them(tmp_path: Path, compress: bool):
    path = tmp_path / "a.npz"
    write_arrays(path, arrays(), compress)
    found = read_arrays(path, "")
    with np.load(path) as stored:
        for name, value in arrays().items():
            assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
            assert np.array_equal(stored[name], value)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_every_changed_bit_is_detected(tmp_path: Path):
    path = tmp_path / "a.npz"
    write_arrays(path, {"a": np.arange(3)})
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        assert "a.npz is damaged" in refused(read_arrays, path, "remove it")
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert "a.npz is damaged" in refused(read_arrays, path, "remove it")


def test_a_file_under_another_name_is_refused(tmp_path: Path):
    write_arrays(tmp_path / "a.npz", {"x": np.ones(2)})
    os.replace(tmp_path / "a.npz", tmp_path / "b.npz")
    assert "not the file of this name" in refused(read_arrays, tmp_path / "b.npz", "")


def test_pickled_objects_are_not_loaded(tmp_path: Path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.savez(file, x=np.array([{"a": 1}], dtype=object))
    seal_zip(path, path.name)
    assert "cannot be read" in refused(read_arrays, path, "")


def test_torch_reads_a_sealed_file(tmp_path: Path):
    path = tmp_path / "state.pt"
    torch.save({"x": torch.arange(3)}, path)
    seal_zip(path, path.name)
    check_zip(path, "")
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))
    with pytest.raises(ValueError):
        seal_zip(path, path.name)  # once


# ------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (OSError(errno.EACCES, "Permission denied"), "cannot be written"),
    ],
)
def test_a_failed_write_gives_one_sentence(tmp_path: Path, error: Exception, what: str):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    assert what in refused(atomic_write, path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    for name in (".a.json.123.partial", "deep/.b.npz.7.partial", "a.json", "deep/b.partial"):
        (tmp_path / name).write_text("x")
    remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.json", "b.partial"]


# --------------------------------------------------------------------------------------------------- caches


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path):
    path, made = tmp_path / "x.json", []

    def make() -> None:
        made.append(1)
        write_json(path, {"x": len(made)})

    def read(path: Path) -> dict:
        return read_json(path, "")

    assert cached(path, read, make) == {"x": 1} == cached(path, read, make) and len(made) == 1
    path.write_text("{")
    with pytest.warns(SlowPath, match=r"x\.json was damaged, so it is computed again"):
        assert cached(path, read, make) == {"x": 2}


def test_a_damage_error_can_be_pickled(tmp_path: Path):
    error = pickle.loads(pickle.dumps(Damaged(tmp_path / "a", "a is damaged: remove it.")))
    assert isinstance(error, Damaged) and error.path == tmp_path / "a" and str(error) == "a is damaged: remove it."
