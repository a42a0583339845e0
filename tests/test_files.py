"""Files that are complete or absent, read without pickles, and locked folders."""

import errno
import fcntl
import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mlem_diffusion import files
from mlem_diffusion.errors import SlowPath, UserError, is_out_of_memory


def test_json_is_strict_and_may_be_edited(tmp_path: Path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"b": [1, 2.5, None], "a": "ä"})
    assert files.read_json(path, "") == {"b": [1, 2.5, None], "a": "ä"}
    path.write_text(path.read_text().replace("2.5", "3"))
    assert files.read_json(path, "")["b"] == [1, 3, None]
    with pytest.raises(ValueError):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path, "")["b"] == [1, 3, None]  # a failed write leaves the old file


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[" * 100_000, "\xff"])
def test_a_damaged_json_file_is_one_sentence(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(files.Damaged, match="not valid JSON") as caught:
        files.read_json(tmp_path / "a.json", "run it again")
    assert str(caught.value).endswith("run it again.") and caught.value.path == tmp_path / "a.json"
    with pytest.raises(UserError, match=r"missing: run it again\."):
        files.read_json(tmp_path / "b.json", "run it again")


@pytest.mark.parametrize("compress", [True, False])
def test_arrays_round_trip_and_truncated_ones_are_refused(tmp_path: Path, compress: bool):
    path, arrays = tmp_path / "a.npz", {"x": np.arange(5), "text": np.array("words")}
    files.write_arrays(path, arrays, compress)
    found = files.read_arrays(path, "")
    assert found.keys() == arrays.keys() and all(np.array_equal(found[k], arrays[k]) for k in arrays)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not an archive", whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(files.Damaged):
            files.read_arrays(path, "run it again")


@pytest.mark.parametrize(("error", "sentence"), [
    (OSError(errno.ENOSPC, "No space left on device"), "is full"),
    (OSError(errno.EDQUOT, "quota"), "is full"), (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "is full"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "is full"),
    (OSError(errno.EACCES, "Permission denied"), "cannot be written"),
])  # fmt: skip
def test_a_failed_write_is_one_sentence_and_leaves_the_old_file(tmp_path: Path, error: Exception, sentence: str):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fail(temporary: Path):
        temporary.write_text("half")
        raise error

    with pytest.raises(UserError, match=sentence):
        files.atomic_write(path, fail)
    assert files.read_json(path, "") == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path):
    path, made = tmp_path / "a.npz", []

    def make():
        made.append(1)
        files.write_arrays(path, {"x": np.arange(3)})

    def found() -> list[int]:
        return files.cached(path, lambda p: files.read_arrays(p, "")["x"], make).tolist()

    assert found() == found() == [0, 1, 2] and len(made) == 1
    path.write_bytes(b"damaged")
    with pytest.warns(SlowPath, match="computed again"):
        assert found() == [0, 1, 2] and len(made) == 2


def test_unexpected_content_is_a_damage_that_can_be_pickled(tmp_path: Path):
    for use in (lambda d: d["b"], lambda d: d["a"] + "x", lambda d: int("x")):
        with pytest.raises(files.Damaged, match="unexpected content: again"), files.expect_content(tmp_path, "again"):
            use({"a": 1})
    error = pickle.loads(pickle.dumps(files.Damaged(tmp_path, "text")))
    assert (error.path, str(error)) == (tmp_path, "text")


def test_two_runs_on_one_folder_do_not_mix(tmp_path: Path):
    """Another holder is refused while the first holds the lock, and leftovers of killed writers go."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".w.1.partial").write_text("half")
    with files.locked(tmp_path, "train"):
        assert not (tmp_path / "deep" / ".w.1.partial").exists()
        with pytest.raises(UserError, match="in use by another run"), files.locked(tmp_path, "train"):
            pass
    with files.locked(tmp_path, "train"):  # it was released
        pass


def test_lack_of_memory_is_told_from_other_failures():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    for lack in (error.value, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(lack)
    for other in (RuntimeError("shapes do not fit"), ValueError("can't allocate memory"), None):
        assert not is_out_of_memory(other)


def test_a_file_system_without_locks_and_fsync_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(os, "fsync", missing)
    with pytest.warns(SlowPath, match="without locks"), files.locked(tmp_path, "a run"):
        files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
