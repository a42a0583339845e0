from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlem_diffusion.data import images as data
from mlem_diffusion.data import sources as archives
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_json

Files = dict[str, bytes]


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def faces(count: int = 12, folder: str = "img_align_celeba/") -> Files:
    return {f"{folder}{i:06d}.png": encode(noise(i)) for i in range(1, count + 1)}


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return path


def write_tar(path: Path, files: Files, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # pyright: ignore
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return path


def write_folder(path: Path, files: Files) -> Path:
    for name, contents in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(contents)
    return path


def prepare(source: Path | str, destination: Path, **settings) -> dict:
    settings = {"name": "test", "size": 16, "holdout": 2} | settings
    return data.prepare(str(source), destination, **settings)


def one(pixels: np.ndarray, tmp_path: Path, size: int, crop: str = "celeba") -> tuple[np.ndarray, dict]:
    """Prepare three copies of one image; return the first as [size,size,3] and the manifest."""
    source = write_folder(tmp_path / "one", {f"{i}.png": encode(pixels) for i in range(3)})
    manifest = prepare(source, tmp_path / "packed", size=size, crop=crop, holdout=1)
    return data.load(tmp_path / "packed").images[0].transpose(1, 2, 0), manifest


def assert_refused(source: Path | str, destination: Path, *words: str, **settings) -> None:
    """Check that preparation fails in one sentence with these words and leaves nothing on disk."""
    with pytest.raises(UserError) as caught:
        prepare(source, destination, **settings)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, text
    assert not destination.exists()
    assert not list(destination.parent.glob(".*partial*"))


# ------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "folder", "mislabelled"])
def test_every_kind_of_source_gives_the_same_array(tmp_path: Path, kind: str) -> None:
    files = dict(reversed(faces().items())) | {
        "readme.txt": b"text",
        "__MACOSX/img_align_celeba/000001.png": b"resource fork",
        "img_align_celeba/._000001.png": b"resource fork",
        ".hidden/1.jpg": b"x",
    }
    if kind == "folder":
        source = write_folder(tmp_path / "images", files)
    elif kind == "zip":
        source = write_zip(tmp_path / "images.zip", files)
    elif kind == "mislabelled":  # recognised by content
        source = write_tar(tmp_path / "images.zip", files)
    else:
        source = write_tar(tmp_path / f"images.{kind}", files, "w:" + kind.partition(".")[2])
    calls = []
    manifest = prepare(source, tmp_path / "packed", progress=lambda done, total: calls.append((done, total)))
    loaded = data.load(tmp_path / "packed")
    assert isinstance(loaded.images, np.memmap) and not loaded.images.flags.writeable
    expected = np.stack([noise(i).transpose(2, 0, 1) for i in range(1, 13)])
    assert np.array_equal(loaded.images, expected)  # sorted by name, unchanged byte for byte
    assert loaded.manifest == manifest == read_json(tmp_path / "packed/manifest.json", "")
    assert calls == [(i, 12) for i in range(1, 13)]
    assert manifest["count"] == 12 and manifest["size"] == [16, 16]
    assert manifest["treatment"] == {"already 16x16: unchanged": 12}
    assert manifest["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert manifest["source"]["name"] == source.name and str(tmp_path) not in json.dumps(manifest)
    assert manifest["source"]["kind"] == {"mislabelled": "tar"}.get(kind, kind.partition(".")[0])
    if kind != "folder":
        assert manifest["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    train = expected[loaded.train()] / 127.5 - 1
    assert manifest["mean"] == pytest.approx(train.mean(), abs=1e-12)
    assert manifest["rms"] == pytest.approx(np.sqrt((train**2).mean()), abs=1e-12)
    assert sorted(os.listdir(tmp_path / "packed")) == ["images.npy", "manifest.json", "split.npy"]
    assert not list(tmp_path.glob(".*"))


def test_folder_hash_follows_names_and_contents(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", faces())
    first = archives.source_sha256(source, "folder")
    (source / "notes.txt").write_text("not an image")
    assert archives.source_sha256(source, "folder") == first
    (source / "img_align_celeba/000001.png").rename(source / "img_align_celeba/000013.png")
    second = archives.source_sha256(source, "folder")
    (source / "img_align_celeba/000002.png").write_bytes(encode(noise(99)))
    assert len({first, second, archives.source_sha256(source, "folder")}) == 3


def test_later_duplicates_in_an_archive_win(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", faces(5, ""))
    with tarfile.open(source, "a") as archive:
        member = tarfile.TarInfo("000001.png")
        member.size = len(contents := encode(noise(77)))
        archive.addfile(member, io.BytesIO(contents))
    assert prepare(source, tmp_path / "packed")["count"] == 5
    assert np.array_equal(data.load(tmp_path / "packed").images[0].transpose(1, 2, 0), noise(77))


def test_later_duplicates_in_a_zip_win(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", faces(5, ""))
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("000001.png", encode(noise(77)))
    assert prepare(source, tmp_path / "packed")["count"] == 5
    assert np.array_equal(data.load(tmp_path / "packed").images[0].transpose(1, 2, 0), noise(77))


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    first, *others = [Image.fromarray(noise(i)) for i in range(3)]
    files = {}
    for i, default in enumerate((False, True, False)):
        first.save(buffer := io.BytesIO(), "PNG", save_all=True, append_images=others, default_image=default)
        files[f"{i}.png"] = buffer.getvalue()
    prepare(write_folder(tmp_path / "a", files), tmp_path / "packed", holdout=1)
    assert (data.load(tmp_path / "packed").images == noise(0).transpose(2, 0, 1)).all()


def test_count_keeps_the_first_names(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    assert prepare(source, tmp_path / "packed", count=7)["count"] == 7
    assert np.array_equal(data.load(tmp_path / "packed").images[6].transpose(1, 2, 0), noise(7))
    assert_refused(source, tmp_path / "more", "data.count=13", "12 images", count=13)


def test_portraits(tmp_path: Path) -> None:
    manifest = prepare("portraits", tmp_path / "packed", count=70, holdout=10, seed=3)
    loaded = data.load(tmp_path / "packed")
    assert np.array_equal(loaded.images, data.portraits.render(70, 16, seed=3))
    assert manifest["source"]["kind"] == "portraits" and manifest["treatment"] == {"drawn at 16x16": 70}
    assert len(loaded.train()) == 60 and len(loaded.held_out()) == 10
    other = prepare("portraits", tmp_path / "other", count=70, holdout=10, seed=4)
    assert other["source"]["sha256"] != manifest["source"]["sha256"]


# ---------------------------------------------------------------------------------- crop and resize


@pytest.mark.parametrize(("width", "height", "side"), [(178, 218, 148), (89, 109, 74), (356, 436, 296), (45, 55, 37)])
def test_celeba_crop_keeps_exactly_the_centred_square(tmp_path: Path, width: int, height: int, side: int) -> None:
    pixels = np.full((height, width, 3), 255, np.uint8)  # white outside the square that the crop must keep
    left, top = (width - side) // 2, (height - side) // 2
    inner = noise(1, side, side) // 2
    pixels[top : top + side, left : left + side] = inner
    result, manifest = one(pixels, tmp_path, side)
    assert np.array_equal(result, inner)
    (words,) = manifest["treatment"]
    assert "178:218" in words and "148/178" in words and "not resized" in words


@pytest.mark.parametrize(("width", "height"), [(178, 218), (89, 109)])
def test_resize_is_antialiased_and_centred(tmp_path: Path, width: int, height: int) -> None:
    checks = ((np.indices((height, width)).sum(0) % 2) * 255).astype(np.uint8)
    result, manifest = one(np.repeat(checks[..., None], 3, 2), tmp_path, 16)
    # A checkerboard far above the new resolution averages to grey; point sampling would give black and white.
    assert np.abs(result.astype(int) - 127).max() < 40 and "bicubic" in manifest["resize"]
    assert next(iter(manifest["treatment"])).endswith("reduced to 16x16")


def test_a_centred_mark_stays_centred(tmp_path: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[109 - 10 : 109 + 10, 89 - 10 : 89 + 10] = 255
    result, _ = one(pixels, tmp_path, 64)
    assert np.array_equal(result, result[::-1]) and np.array_equal(result, result[:, ::-1])
    # 20 of 148 pixels are 8.65 of 64
    assert result[32, :, 0].sum() / 255 == pytest.approx(20 / 148 * 64, abs=0.1)


@pytest.mark.parametrize(
    ("crop", "height", "width", "words"),
    [
        ("celeba", 40, 60, "other aspect ratio: largest centred square, reduced to 16x16"),
        ("celeba", 40, 40, "square: whole frame, reduced to 16x16"),
        ("celeba", 10, 14, "other aspect ratio: largest centred square, enlarged to 16x16"),
        ("square", 109, 89, "largest centred square, reduced to 16x16"),
        ("none", 109, 89, "whole frame squashed to a square, reduced to 16x16"),
    ],
)
def test_the_treatment_is_recorded(tmp_path: Path, crop: str, height: int, width: int, words: str) -> None:
    result, manifest = one(noise(4, height, width), tmp_path, 16, crop)
    assert manifest["treatment"] == {words: 3} and manifest["crop"] == crop
    side = min(height, width)
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    image = Image.fromarray(noise(4, height, width))
    image = image if crop == "none" else image.crop((*box[:2], box[0] + side, box[1] + side))
    assert np.array_equal(result, np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))


def test_mixed_treatments_are_counted(tmp_path: Path) -> None:
    files = {f"{i}.png": encode(noise(i, *shape)) for i, shape in enumerate([(16, 16)] * 3 + [(109, 89)] * 2)}
    manifest = prepare(write_folder(tmp_path / "a", files), tmp_path / "packed")
    assert sorted(manifest["treatment"].values()) == [2, 3]


@pytest.mark.parametrize(
    ("width", "height", "yes"),
    [
        (178, 218, True),
        (89, 109, True),
        (64, 78, True),
        (36, 44, True),
        (178, 178, False),
        (200, 218, False),
        (4, 4, False),
    ],
)
def test_which_frames_count_as_celeba(width: int, height: int, yes: bool) -> None:
    assert data._celeba_shaped(width, height) is yes


def test_every_colour_mode_becomes_rgb(tmp_path: Path) -> None:
    grey, alpha = noise(1)[..., 0], noise(2)[..., 0]
    alpha[0, 0], alpha[0, 1] = 0, 255
    palette = Image.fromarray(noise(3)).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    files = {
        "0_grey.png": encode(grey),
        "1_rgba.png": encode(np.dstack([noise(4), alpha])),
        "2_palette.png": buffer.getvalue(),
        "3_grey16.png": encode(grey.astype(np.uint16) * 256),
        "4_grey_alpha.png": encode(np.dstack([grey, alpha])),
        "5.jpeg": encode(noise(5), "JPEG"),
    }
    prepare(write_folder(tmp_path / "a", files), tmp_path / "packed")
    images = data.load(tmp_path / "packed").images.transpose(0, 2, 3, 1)
    assert np.array_equal(images[0], np.repeat(grey[..., None], 3, 2))
    assert (images[1][0, 0] == 255).all() and np.array_equal(images[1][0, 1], noise(4)[0, 1])  # over white
    assert np.array_equal(images[2], np.asarray(palette.convert("RGB")))
    assert np.array_equal(images[3], images[0])
    assert (images[4][0, 0] == 255).all() and (images[4][0, 1] == grey[0, 1]).all()


def test_exif_orientation_is_respected(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    files = {f"{i}.png": encode(noise(1), exif=exif) for i in range(3)}
    prepare(write_folder(tmp_path / "a", files), tmp_path / "packed", holdout=1)
    image = data.load(tmp_path / "packed").images[0].transpose(1, 2, 0)
    assert np.array_equal(image, np.rot90(noise(1), -1))


# -------------------------------------------------------------------------------------------- split

PARTITION = "".join(f"{i:06d}.jpg {(i > 8) + (i > 10)}\n" for i in range(1, 30)).encode()


@pytest.mark.parametrize("place", ["inside", "beside", "folder", "csv"])
def test_official_partition(tmp_path: Path, place: str) -> None:
    if place == "inside":
        source = write_zip(tmp_path / "a.zip", faces() | {"Eval/list_eval_partition.txt": PARTITION})
    elif place == "folder":
        source = write_folder(tmp_path / "a", faces() | {"list_eval_partition.txt": PARTITION})
    else:
        source = write_zip(tmp_path / "a.zip", faces())
        suffix, text = (
            ("csv", b"image_id,partition\n" + PARTITION.replace(b" ", b",")) if place == "csv" else ("txt", PARTITION)
        )
        (tmp_path / f"list_eval_partition.{suffix}").write_bytes(text)
    manifest = prepare(source, tmp_path / "packed")
    assert manifest["split"] == {"method": "official", "seed": None, "train": 8, "valid": 2, "test": 2}
    assert data.load(tmp_path / "packed").split.tolist() == [0] * 8 + [1] * 2 + [2] * 2
    assert data.load(tmp_path / "packed").held_out().tolist() == [8, 9, 10, 11]


def test_partition_that_does_not_fit(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    beside = tmp_path / "list_eval_partition.txt"
    beside.write_bytes(PARTITION)
    # The first eight are all training images: a seeded split, and the manifest says why.
    split = prepare(source, tmp_path / "first", count=8)["split"]
    assert split["method"] == "seeded" and "one side" in split["note"]
    beside.write_text("elsewhere.jpg 0\n")
    split = prepare(source, tmp_path / "other")["split"]
    assert split["method"] == "seeded" and "other images" in split["note"]
    beside.write_bytes(PARTITION[:50])
    assert_refused(source, tmp_path / "part", "list_eval_partition.txt", "of 12 images")


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_broken_partition_list_is_refused(tmp_path: Path, kind: str) -> None:
    name = "list_eval_partition.txt"
    if kind == "zip":  # a seeded split instead would be another data set
        source = write_zip(tmp_path / "a.zip", faces() | {name: PARTITION})
        source.write_bytes(source.read_bytes().replace(b"000007.jpg 0", b"000007.jpg 1"))
    else:
        source = write_folder(tmp_path / "a", faces())
        (source / name).symlink_to("nowhere")
    assert_refused(source, tmp_path / "packed", name, "broken", "fetch it again")


def test_an_oversized_partition_list_is_refused(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    (tmp_path / "list_eval_partition.txt").touch()
    os.truncate(tmp_path / "list_eval_partition.txt", archives.MAX_FILE + 1)  # takes no space
    assert_refused(source, tmp_path / "packed", "list_eval_partition.txt", "larger than", "remove it")


def test_seeded_split_is_reproducible(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    splits = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        manifest = prepare(source, tmp_path / name, holdout=5, seed=seed)
        assert manifest["split"] == {"method": "seeded", "seed": seed, "train": 7, "valid": 2, "test": 3}
        splits.append(data.load(tmp_path / name).split)
    assert np.array_equal(splits[0], splits[1]) and not np.array_equal(splits[0], splits[2])
    assert_refused(source, tmp_path / "d", "data.holdout=6", "half", holdout=6)


# -------------------------------------------------------------------- again, interrupted, replaced


def test_a_second_run_reuses_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    first = prepare(source, tmp_path / "packed")
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", None)  # decoding anything would fail
        assert prepare(source, tmp_path / "packed") == first
    write_zip(source, faces(11))
    assert prepare(source, tmp_path / "packed")["count"] == 11  # another source
    assert prepare(source, tmp_path / "packed", size=8)["size"] == [8, 8]  # other settings
    assert data.load(tmp_path / "packed").images.shape == (11, 3, 8, 8)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("earlier", [False, True])
def test_interruption_leaves_nothing_and_keeps_the_earlier(
    tmp_path: Path, stop: type[BaseException], earlier: bool
) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    before = prepare(source, tmp_path / "packed") if earlier else None

    def interrupt(done: int, total: int) -> None:
        if done == 6:
            raise stop

    with pytest.raises(stop):
        prepare(source, tmp_path / "packed", size=8, progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == (["a.zip", "packed"] if earlier else ["a.zip"])
    if earlier:
        loaded = data.load(tmp_path / "packed")
        assert loaded.manifest == before and loaded.images.shape == (12, 3, 16, 16)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / f".packed.partial-{data.socket.gethostname()}-999999999"
    stale.mkdir()
    (stale / "images.npy.partial").write_bytes(b"half")
    prepare(write_zip(tmp_path / "a.zip", faces()), tmp_path / "packed")
    assert not stale.exists()


def test_other_files_in_the_destination_stay(tmp_path: Path) -> None:
    write_folder(tmp_path / "packed", {"notes.txt": b"mine"})
    prepare(write_zip(tmp_path / "a.zip", faces()), tmp_path / "packed")
    assert (tmp_path / "packed/notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["missing", "incomplete", "truncated", "shape", "split", "json"])
def test_load_refuses_broken_or_mismatched_files(tmp_path: Path, damage: str) -> None:
    packed = tmp_path / "packed"
    if damage != "missing":
        prepare(write_zip(tmp_path / "a.zip", faces()), packed)
    if damage == "incomplete":
        (packed / "manifest.json").unlink()
    elif damage == "truncated":
        os.truncate(packed / "images.npy", 1000)
    elif damage == "shape":
        np.save(packed / "images.npy", np.zeros((12, 3, 8, 8), np.uint8))
    elif damage == "split":
        np.save(packed / "split.npy", np.zeros(3, np.uint8))
    elif damage == "json":
        (packed / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="make data SOURCE="):
        data.load(packed)


# ------------------------------------------------------------------------------------ wrong inputs


def test_missing_source(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.zip", tmp_path / "packed", "nowhere.zip does not exist")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"<!DOCTYPE html><html><title>Quota exceeded</title>", ("HTML page", "not an archive", "quota")),
        (b"\n<HTML><body>Sign in", ("HTML page",)),
        (b"", ("empty file",)),
        (b"just some words\n", ("plain text",)),
        (bytes(range(256)) * 9, ("unknown binary data",)),
        (b"7z\xbc\xaf\x27\x1c", ("7z archive",)),
        (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS pointer",)),
        (encode(noise(0), "JPEG"), ("a single JPEG image",)),
        (gzip.compress(b"no tar" * 400), ("holds no readable tar",)),
    ],
)
def test_not_an_archive(tmp_path: Path, contents: bytes, words: tuple[str, ...]) -> None:
    source = tmp_path / "img_align_celeba.zip"
    source.write_bytes(contents)
    assert_refused(source, tmp_path / "packed", "img_align_celeba.zip", *words)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_archive(tmp_path: Path, kind: str, keep: float) -> None:
    source = tmp_path / f"images.{kind}"
    if kind == "zip":
        write_zip(source, faces())
    else:
        write_tar(source, faces(), "w:" + kind.partition(".")[2])
    os.truncate(source, int(source.stat().st_size * keep))
    assert_refused(source, tmp_path / "packed", f"images.{kind}", "truncated")


def test_tar_that_ends_between_two_members(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", faces(3))
    with tarfile.open(source) as archive:
        end = archive.getmembers()[2].offset
    os.truncate(source, end)
    assert_refused(source, tmp_path / "packed", "truncated", "end marker")


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_no_images(tmp_path: Path, kind: str) -> None:
    files = {"notes.txt": b"none", "inner/img_align_celeba.zip": b"PK"}
    writer = {"zip": write_zip, "tar": write_tar, "folder": write_folder}[kind]
    source = writer(tmp_path / "source", files)
    assert_refused(source, tmp_path / "packed", "no JPEG or PNG image", "inner/img_align_celeba.zip")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "folder"])
@pytest.mark.parametrize("damage", ["cut", "text", "crc", "dangling"])
def test_broken_image_among_good_ones(tmp_path: Path, kind: str, damage: str) -> None:
    files = faces(12, "") | {"000005.jpg": encode(noise(5, 64, 64), "JPEG")}
    files["000005.jpg"] = b"not an image" if damage == "text" else files["000005.jpg"][:-500]
    del files["000005.png"]
    source = tmp_path / f"images.{kind}"
    if kind == "folder":
        write_folder(source, files)
        if damage == "dangling":
            (source / "000005.jpg").unlink()
            (source / "000005.jpg").symlink_to("nowhere")
    elif kind == "zip":
        write_zip(source, files)
        if damage == "crc":
            raw = source.read_bytes()
            source.write_bytes(raw.replace(files["000005.jpg"], files["000005.jpg"][:-1] + b"\x00"))
    else:
        write_tar(source, files, "w:gz")
    assert_refused(source, tmp_path / "packed", "000005.jpg", "broken", "data.skip_broken=true")
    manifest = prepare(source, tmp_path / "packed", skip_broken=True)
    loaded = data.load(tmp_path / "packed")
    assert manifest["skipped"] == ["000005.jpg"] and manifest["count"] == 11 == len(loaded.split)
    good = [i for i in range(1, 13) if i != 5]
    assert np.array_equal(loaded.images, np.stack([noise(i).transpose(2, 0, 1) for i in good]))
    assert prepare(source, tmp_path / "packed", skip_broken=True) == manifest
    with pytest.raises(UserError, match="is broken"):  # the result without the broken image is not reused
        prepare(source, tmp_path / "packed")


def test_all_images_broken(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", {f"{i}.jpg": b"x" for i in range(9)})
    assert_refused(source, tmp_path / "packed", "All 9 images", skip_broken=True)


def test_encrypted_zip(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", faces(6))
    raw = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # set the flag of every member
        at = raw.find(signature)
        while at >= 0:
            raw[at + offset] |= 1
            at = raw.find(signature, at + 4)
    source.write_bytes(raw)
    assert_refused(source, tmp_path / "packed", "encrypted", "password")


def test_zip_with_a_rare_method(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("000001.png", encode(noise(1)))
    assert_refused(tmp_path / "a.zip", tmp_path / "packed", "a.zip", "000001.png", "unpack it and give the folder")


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_names_that_would_break_a_sentence(tmp_path: Path, kind: str) -> None:
    files = faces(6, "") | {"new\nline\x1b[31m.png": b"not an image"}
    writer = {"zip": write_zip, "tar": write_tar, "folder": write_folder}[kind]
    source = writer(tmp_path / "source", files)
    assert_refused(source, tmp_path / "packed", "new\\nline\\x1b[31m.png in source is broken")


@pytest.mark.parametrize(("width", "height"), [(9000, 8000), (32769, 1), (1, 32769)])
def test_too_large_pictures(tmp_path: Path, recwarn: pytest.WarningsRecorder, width: int, height: int) -> None:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    source = write_zip(tmp_path / "a.zip", faces() | {"large.png": buffer.getvalue()})
    assert_refused(source, tmp_path / "packed", f"large.png in a.zip is broken ({width}x{height} pixels")
    assert prepare(source, tmp_path / "packed", skip_broken=True)["skipped"] == ["large.png"]
    assert not recwarn.list


def test_little_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images wait for the decoders, not in memory."""
    monkeypatch.setattr(data, "_MAX_WAITING", 1000)
    waiting = []
    read = archives.read_members

    def watch(source: archives.Source, names: list[str]):
        for member in read(source, names):
            waiting.append(member.name)
            yield member

    monkeypatch.setattr(archives, "read_members", watch)
    most = []
    progress = lambda done, total: most.append(len(waiting) - done)  # noqa: E731
    prepare(write_zip(tmp_path / "a.zip", faces(40)), tmp_path / "packed", progress=progress)
    assert max(most) <= 2


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
    assert_refused(source, tmp_path / "packed", "Not enough disk space", "MB")


@pytest.mark.parametrize("when", ["reserving", "writing"])
def test_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    source = write_zip(tmp_path / "a.zip", faces())

    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (data.os, "posix_fallocate") if when == "reserving" else (data.np, "save")
    monkeypatch.setattr(*target, full, raising=False)
    assert_refused(source, tmp_path / "packed", "is full")


def test_destination_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_zip(tmp_path / "a.zip", faces())
    (tmp_path / "file").write_text("here first")
    with pytest.raises(UserError, match="is a file"):
        prepare(source, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(source, tmp_path / "file/packed")

    def refuse(*args, **kwargs) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert_refused(source, tmp_path / "packed", "cannot be written", "Permission denied")


@pytest.mark.parametrize(("setting", "value"), [("crop", "round"), ("size", 2), ("holdout", 0), ("count", 1)])
def test_nonsense_settings(tmp_path: Path, setting: str, value: object) -> None:
    assert_refused("portraits", tmp_path / "packed", f"data.{setting}={value}", **{setting: value})


# ----------------------------------------------------------------------------------------- download


def test_a_failed_download_names_the_files_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("torchvision.datasets.utils")

    def quota(file_id: str, root: str, filename: str, md5: str) -> None:
        write_folder(Path(root), {filename: b"<html>Quota exceeded</html>"})
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(utils, "download_file_from_google_drive", quota)
    words = (
        "img_align_celeba.zip",
        "list_eval_partition.txt",
        "make data SOURCE=path/to/img_align_celeba.zip",
    )
    assert_refused("download", tmp_path / "packed", "File not found or corrupted)", *words)
    assert not list((tmp_path / "celeba-download").iterdir())


def test_download_is_prepared_with_the_official_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("torchvision.datasets.utils")

    def arrive(file_id: str, root: str, filename: str, md5: str) -> None:
        Path(root).mkdir(exist_ok=True)
        if filename.endswith(".zip"):
            write_zip(Path(root) / filename, faces())
        else:
            (Path(root) / filename).write_bytes(PARTITION)

    monkeypatch.setattr(utils, "download_file_from_google_drive", arrive)
    manifest = prepare("download", tmp_path / "packed")
    assert manifest["split"]["method"] == "official" and manifest["source"]["kind"] == "download"
    assert manifest["source"]["name"] == "img_align_celeba.zip"
