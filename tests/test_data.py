import hashlib
import io
import json
import os
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from toys import portraits

from mlem_diffusion.data import images as data
from mlem_diffusion.data import pixels
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_json

Files = dict[str, bytes]
KINDS = ("zip", "tar", "tar.gz", "folder")


def encode(picture: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def faces(count: int = 12, folder: str = "img_align_celeba/") -> Files:
    return {f"{folder}{i:06d}.png": encode(noise(i)) for i in range(1, count + 1)}


def write(path: Path, kind: str, files: Files, mode: Any = "w") -> Path:
    if kind == "folder":
        for name, contents in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(contents)
    elif kind == "zip":
        with zipfile.ZipFile(path, mode) as archive:
            for name, contents in files.items():
                archive.writestr(name, contents)
    else:
        with tarfile.open(path, f"{mode}:{kind.partition('.')[2]}") as archive:  # pyright: ignore
            for name, contents in files.items():
                add(archive, name, contents)
    return path


def add(archive: tarfile.TarFile, name: str, contents: bytes = b"", link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.linkname, member.type = len(contents), link, tarfile.SYMTYPE if link else tarfile.REGTYPE
    archive.addfile(member, io.BytesIO(contents))


DEFAULTS = {"name": "test", "size": 16, "count": None, "crop": "celeba", "holdout": 2, "seed": 0}


def prepare(source: Path | str, destination: Path, workers: int = 1, progress=lambda *_: None, **settings) -> dict:
    return data.prepare(str(source), destination, DEFAULTS | settings, workers, progress)


def packed(folder: Path) -> np.ndarray:
    return data.load(folder).images.transpose(0, 2, 3, 1)


def assert_refused(source: Path | str, destination: Path, words: str, **settings) -> None:
    """Check that preparation fails with these words and leaves no file but the lock."""
    with pytest.raises(UserError, match=words):
        prepare(source, destination, **settings)
    assert [path.name for path in destination.rglob("*")] in ([], [".lock"])


@pytest.mark.parametrize("kind", [*KINDS, "tar.xz"])
def test_every_kind_of_source_gives_the_same_array(tmp_path: Path, kind: str) -> None:
    others = ["__MACOSX/img_align_celeba/000001.png", "img_align_celeba/._000001.png", ".hidden/1.jpg", "Thumbs.db"]
    files = dict(reversed(faces().items())) | dict.fromkeys([*others, "readme.txt"], b"no image")
    source = write(tmp_path / "images.zip", kind, files)  # the kind is recognised by content
    manifest = prepare(source, tmp_path / "packed")
    loaded = data.load(tmp_path / "packed")
    expected = np.stack([noise(i).transpose(2, 0, 1) for i in range(1, 13)])
    assert isinstance(loaded.images, np.memmap) and not loaded.images.flags.writeable
    assert np.array_equal(loaded.images, expected)  # sorted by name, unchanged byte for byte
    assert loaded.manifest == manifest == read_json(tmp_path / "packed/manifest.json", "")
    assert manifest["count"] == 12 and manifest["size"] == [16, 16]
    assert manifest["treatment"] == {"already 16x16: unchanged": 12}
    assert manifest["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert manifest["source"]["name"] == source.name and str(tmp_path) not in json.dumps(manifest)
    assert manifest["source"]["kind"] == kind.partition(".")[0]
    assert kind == "folder" or manifest["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    train = expected[loaded.train()] / 127.5 - 1
    assert manifest["rms"] == pytest.approx(np.sqrt((train**2).mean()), abs=1e-12)


def test_a_folders_hash_follows_names_and_contents(tmp_path: Path) -> None:
    source, found = write(tmp_path / "images", "folder", faces(6, "")), []
    changes = (
        lambda: (source / "notes.txt").write_text("not an image"),
        lambda: (source / "000001.png").rename(tmp_path / "moved.png"),
        lambda: (source / "000000.png").symlink_to(tmp_path / "moved.png"),  # links to images are followed
        lambda: None,
    )
    for change in changes:
        found.append(prepare(source, tmp_path / "packed")["source"]["sha256"])
        change()
    assert found[0] == found[1] and len(set(found)) == 3
    # and so a changed source is packed again
    assert np.array_equal(packed(tmp_path / "packed"), np.stack([noise(i) for i in range(1, 7)]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_last_of_members_that_share_a_name_counts(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "a", kind, faces(5, ""))
    write(source, kind, {"000001.png": encode(noise(77))}, mode="a")
    assert prepare(source, tmp_path / "packed")["count"] == 5
    assert np.array_equal(packed(tmp_path / "packed")[0], noise(77))


PIXEL = bytes.fromhex(  # a black PNG of 1x1
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478"
    "9c6360606000000004000160c0d9ea0000000049454e44ae426082"
)


def test_hash_and_fingerprint_of_plain_sources_stay(tmp_path: Path) -> None:
    """Those of commit 8d1619c, so that data prepared then are not prepared again."""
    files = {f"img/{i}.PNG": PIXEL for i in range(5)} | {LIST: b"0 0\n1 1\n2 2\n3 0\n4 0\n", "x.txt": b""}
    manifest = prepare(write(tmp_path / "a", "folder", files), tmp_path / "packed", size=4)
    assert manifest["source"]["sha256"].startswith("1132ec01c3f41d33")
    assert manifest["fingerprint"].startswith("ab9cbbd7aad82677")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_backslashes_of_windows_archives(tmp_path: Path) -> None:
    files = {"faces 2/z.png": encode(noise(0))} | faces(12, "faces/") | {"faces/": b"", LIST: b"z 2\n" + PARTITION}
    first, windows = prepare(write(tmp_path / "a", "zip", files), tmp_path / "packed"), tmp_path / "w"
    files = {"faces/000003.png": b"the first of two"} | {n.replace("/", "\\"): files[n] for n in files}
    again = prepare(write(windows, "zip", files | {"__MACOSX\\x.png": b""}), tmp_path / "again")
    assert [again[key] for key in ("count", "sha256", "split", "notes")] == [13, first["sha256"], first["split"], []]


def test_every_format_is_read_and_the_rest_counted(tmp_path: Path) -> None:
    kinds = dict(webp="WEBP", bmp="BMP", tif="TIFF", gif="GIF", ppm="PPM", jfif="JPEG", MPO="MPO", jpg="WEBP")
    files = {f"a.{suffix}": encode(noise(3), kind) for suffix, kind in kinds.items()}
    others = {"a.txt": b"", "b.TXT": b"", "c.eps": b"%!PS-Adobe-3.0 EPSF-3.0", "none": b"", "desktop.ini": b""}
    for kind in KINDS:
        manifest = prepare(write(tmp_path / f"a{kind}", kind, files | others), tmp_path / "packed")
        assert manifest["count"] == 8 and manifest["notes"] == ["passed over 4 files of other formats (.txt 2, .eps 1)"]
    eps = write(tmp_path / "eps", "zip", faces() | {"a.jpg": others["c.eps"]})
    assert_refused(eps, tmp_path / "other", r"'a.jpg' in eps is broken .*no image that can be read: b'%!PS")


def test_links_to_folders_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, outside = write(tmp_path / "a", "folder", faces(6, "b/")), write(tmp_path / "o", "folder", faces(3, "c/"))
    alone = prepare(source, tmp_path / "alone")
    for link, target in (("a", source / "b"), ("b/loop", source), ("b/self", "self")):
        (source / link).symlink_to(target)
    assert prepare(source, tmp_path / "alone")["source"] == alone["source"]  # the folder's own path counts
    (source / "link").symlink_to(outside)
    (outside / "back").symlink_to(source)
    assert prepare(source, tmp_path / "packed")["count"] == 9
    assert np.array_equal(packed(tmp_path / "packed")[6:], np.stack([noise(i) for i in range(1, 4)]))
    scandir = os.scandir  # chmod does not stop root
    monkeypatch.setattr(os, "scandir", lambda path: scandir("/nowhere" if str(path).endswith("/c") else path))
    assert_refused(source, tmp_path / "other", "The folder .*cannot be read")


def test_portraits(tmp_path: Path) -> None:
    manifest = prepare("portraits", tmp_path / "packed", workers=2, count=20, holdout=5, seed=3)
    loaded = data.load(tmp_path / "packed")
    assert np.array_equal(loaded.images, portraits(20, 16, seed=3))
    assert manifest["source"]["kind"] == "portraits" and len(loaded.train()) == 15


@pytest.mark.parametrize(
    ("size", "seed", "digest"), [(8, 0, "6b13ad8da756a8bc"), (16, 1, "99e0b2986e8fc8b9"), (64, 2, "3e6bc35d67e53237")]
)
def test_portraits_are_those_of_version_1(size: int, seed: int, digest: str) -> None:
    images = portraits(24, size, seed)
    assert images.shape == (24, 3, size, size) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith(digest)


CELEBA = [(178, 218, 148), (89, 109, 74), (356, 436, 296), (64, 78, 53), (36, 44, 30)]  # 148/178 of the width is kept
OTHERS = [("celeba", 60, 40, 40), ("celeba", 14, 10, 10), ("square", 89, 109, 89), ("none", 89, 109, 109)]


@pytest.mark.parametrize(("crop", "width", "height", "side"), [*(("celeba", *sizes) for sizes in CELEBA), *OTHERS])
def test_the_centred_square_is_kept_and_resized(crop: str, width: int, height: int, side: int) -> None:
    picture = Image.fromarray(noise(4, height, width))
    left, top = (width - side) // 2, (height - side) // 2
    square = picture if crop == "none" else picture.crop((left, top, left + side, top + side))
    for size in (16, side):
        result, done = pixels.decode(encode(picture), size, crop)
        assert ("178:218" in done) == ((width, height, side) in CELEBA)
        expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
        assert np.array_equal(result.transpose(1, 2, 0), expected)


def test_every_colour_mode_becomes_upright_rgb() -> None:
    grey, colour, opaque, exif = noise(1)[..., 0], noise(2), noise(3)[..., :1] > 127, Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    upright, jpeg = np.repeat(grey[..., None], 3, 2), encode(colour, "JPEG")
    jpeg_pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
    alpha, palette = (255 * opaque).astype(np.uint8), Image.fromarray(colour).quantize(16)
    cases = [
        (encode(grey), upright),
        (encode(grey.astype(np.uint16) * 256), upright),
        (encode(np.dstack([grey, alpha])), np.where(opaque, upright, 255)),  # over white
        (encode(np.dstack([colour, alpha])), np.where(opaque, colour, 255)),
        (encode(palette), np.asarray(palette.convert("RGB"))),
        (encode(colour, exif=exif), np.rot90(colour, -1)),
        (encode(colour, save_all=True, append_images=[Image.fromarray(noise(3))]), colour),  # the first frame
        (jpeg, jpeg_pixels),
        (encode(Image.fromarray(colour), "MPO", save_all=True, append_images=[palette.convert("RGB")]), jpeg_pixels),
        (encode(Image.fromarray(grey > 127)), 255 * (upright > 127)),
        (encode(grey.astype(np.uint16) * 256, "TIFF", exif=exif), np.rot90(upright, -1)),
        (encode(colour, "WEBP", lossless=True, exif=exif), np.rot90(colour, -1)),
    ]
    for content, expected in cases:
        assert np.array_equal(pixels.decode(content, 16, "celeba")[0].transpose(1, 2, 0), expected)


LIST = "list_eval_partition.txt"
PARTITION = "".join(f"{i:06d}.jpg {(i > 8) + (i > 10)}\n" for i in range(1, 30)).encode()
TABLE = b"image_id,partition\n" + PARTITION.replace(b" ", b",")
LISTS = {
    "table": TABLE,
    "with a mark": b"\xef\xbb\xbf" + PARTITION,
    "UTF-16": PARTITION.replace(b" ", b"\t").decode().encode("utf-16"),
    "quoted": TABLE.replace(b",", b'","').replace(b"\n", b'"\r\n"'),
    "semicolons": TABLE.replace(b",", b";"),
    "index": b"," + TABLE.replace(b"0000", b"7,0000").replace(b"\n", b".0\n").replace(b"n.0", b"n"),
    "folders, other case": PARTITION.upper().replace(b"0000", b"img\\0000"),
}


@pytest.mark.parametrize("place", ["inside", "beside", *LISTS])
def test_official_partition(tmp_path: Path, place: str) -> None:
    source = write(tmp_path / "a", "zip", faces() | ({f"Eval/{LIST}": PARTITION} if place == "inside" else {}))
    if place == "beside":
        (tmp_path / LIST).write_bytes(PARTITION)
    elif place != "inside":
        (tmp_path / "list_eval_partition.csv").write_bytes(LISTS[place])
    manifest = prepare(source, tmp_path / "packed")
    assert manifest["split"] == {"method": "official", "train": 8, "valid": 2, "test": 2}
    assert data.load(tmp_path / "packed").split.tolist() == [0] * 8 + [1] * 2 + [2] * 2
    assert data.load(tmp_path / "packed").held_out().tolist() == [8, 9, 10, 11]


def test_a_partition_that_does_not_fit(tmp_path: Path) -> None:
    source = write(tmp_path / "a.zip", "zip", faces())
    (tmp_path / LIST).write_bytes(PARTITION)
    # The first eight are all training images: a seeded split.
    assert prepare(source, tmp_path / "first", count=8)["notes"] == [f"{LIST} has these images on one side only"]
    (tmp_path / LIST).write_text("elsewhere.jpg 0\n")
    manifest = prepare(source, tmp_path / "other")
    assert manifest["split"]["method"] == "seeded" and manifest["notes"] == [f"{LIST} has none of these images"]
    (tmp_path / LIST).write_bytes(PARTITION)  # a folder prepared with another split is not reused
    assert prepare(source, tmp_path / "other")["split"]["method"] == "official"
    wrong = {PARTITION[:50]: "of 12 images", PARTITION + b"000003.jpg 1": "more than one part"}
    for content, words in (wrong | dict.fromkeys([b"", b"<html>", b'"' + 9999 * PARTITION], "no line with")).items():
        (tmp_path / LIST).write_bytes(content)
        assert_refused(source, tmp_path / "part", words)
    write(source, "zip", faces() | {LIST: PARTITION})
    source.write_bytes(source.read_bytes().replace(b"000007.jpg 0", b"000007.jpg 1"))  # its checksum does not fit
    assert_refused(source, tmp_path / "broken", f"{LIST}.*broken")


def test_names_of_a_partition_in_folders_and_in_any_bytes(tmp_path: Path) -> None:
    names = ["a/1.png", "b/1.png", "a/É 2.png", "b/é 2.png", "b/ü.png"]
    source = tmp_path / (os.fsdecode(b"faces\xff") if sys.platform == "linux" else "faces\\xff")  # the name is no UTF-8
    write(source, "folder", {unicodedata.normalize("NFD", name): PIXEL for name in names})
    (tmp_path / LIST).write_text("x/a/1.jpg 0\nx/b/1.jpg 1\na/É 2.jpg 0\nb/é 2.jpg 2\nü.jpg 0\n", encoding="utf-8")
    assert prepare(source, tmp_path / "packed", size=4)["source"]["name"] == "faces\\xff"
    assert data.load(tmp_path / "packed").split.tolist() == [0, 0, 1, 2, 0]


def test_a_seeded_split_of_the_first_names(tmp_path: Path) -> None:
    source, splits = write(tmp_path / "a.zip", "zip", faces(14)), []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        manifest = prepare(source, tmp_path / name, holdout=5, seed=seed, count=12)
        assert manifest["split"] == {"method": "seeded", "train": 7, "valid": 2, "test": 3}
        splits.append(data.load(tmp_path / name).split.tolist())
    assert splits[0] == splits[1] != splits[2]
    assert np.array_equal(packed(tmp_path / "a"), np.stack([noise(i) for i in range(1, 13)]))


def test_a_second_run_reuses_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.zip", "zip", faces())
    first = prepare(source, tmp_path / "packed")
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "decode", lambda *_, **__: 1 / 0)
        assert prepare(source, tmp_path / "packed") == first
    assert prepare(source, tmp_path / "packed", size=8)["size"] == [8, 8]  # other settings
    assert data.load(tmp_path / "packed").images.shape == (12, 3, 8, 8)


def test_an_interruption_leaves_the_earlier_data_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.zip", "zip", faces())
    before = prepare(source, tmp_path / "packed")
    (tmp_path / "packed" / ".images.npy.999999.partial").touch()  # of a run that was killed
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "packed", size=8, progress=Mock(side_effect=[*[None] * 5, KeyboardInterrupt]))
    assert sorted(os.listdir(tmp_path / "packed")) == [".lock", "images.npy", "manifest.json", "split.npy"]
    loaded = data.load(tmp_path / "packed")
    assert loaded.manifest == before and loaded.images.shape == (12, 3, 16, 16)
    np.save(tmp_path / "packed" / "images.npy", np.zeros((12, 3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="make data SOURCE="):  # an array that does not fit the manifest
        data.load(tmp_path / "packed")
    monkeypatch.setattr(data, "write_json", lambda *args: 1 / 0)  # a stop between the files leaves no manifest
    with pytest.raises(ZeroDivisionError):
        prepare(source, tmp_path / "packed", size=8)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        data.load(tmp_path / "packed")


def test_sources_with_too_few_images(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", "zip", {"notes.txt": b""})
    assert_refused(empty, tmp_path / "packed", r"no image that can be read; passed over 1 file .*\(.txt 1\)")
    nested = write(tmp_path / "nested", "folder", {"sub/inner.zip": empty.read_bytes()})
    assert_refused(nested, tmp_path / "packed", "give the archive 'sub/inner.zip'")
    full = write(tmp_path / "full", "zip", faces())
    assert_refused(full, tmp_path / "packed", "more than the 12 images", count=13)
    assert_refused(full, tmp_path / "packed", "data.holdout=6", holdout=6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
@pytest.mark.parametrize("keep", [0, 0.5, 512 * 9])
def test_a_truncated_archive(tmp_path: Path, kind: str, keep: float) -> None:
    source = write(tmp_path / f"images.{kind}", kind, faces())
    end = int(source.stat().st_size * keep) if keep < 1 else int(keep)  # a tar has 1536 bytes for each of these files
    os.truncate(source, end)
    assert_refused(source, tmp_path / "packed", "truncated")


def test_archives_that_python_does_not_read(tmp_path: Path) -> None:
    source, other = write(tmp_path / "a.zip", "zip", faces()), tmp_path / "other.zip"
    # of a member's two headers, the bytes for: encrypted, Deflate64, begins in another part
    for local, central, value, words in ((6, 8, 1, "encrypted"), (8, 10, 9, "method"), (0, 34, 80, "split archive")):
        content = bytearray(source.read_bytes())
        content[content.find(b"PK\3\4") + local] = content[content.find(b"PK\1\2") + central] = value
        other.write_bytes(content)
        assert_refused(other, tmp_path / "packed", f"{words}.* unpack it")
    os.truncate(other, 300)
    assert_refused(other.rename(tmp_path / "a.zip.001"), tmp_path / "packed", "split archive.*join the parts")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_and_links_inside_an_archive_lead_nowhere(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret.png").write_bytes(encode(noise(1)))
    outside = ["../x.png", "a/../../x.png", "/x.png", "C:\\x.png"]
    source = write(tmp_path / "evil", kind, faces(8, "") | {name: encode(noise(50)) for name in outside})
    if kind == "tar":
        with tarfile.open(source, "a") as archive:
            add(archive, "within.png", link="000003.png")
    assert prepare(source, tmp_path / "packed")["count"] == 12 + (kind == "tar")
    assert sorted(os.listdir(tmp_path)) == ["evil", "packed", "secret.png"] and not Path("/x.png").exists()
    if kind == "tar":
        assert np.array_equal(packed(tmp_path / "packed")[-1], noise(3))
        with tarfile.open(source, "a") as archive:
            add(archive, "without.png", link="../secret.png")
        assert_refused(source, tmp_path / "other", "'without.png' in evil is broken")


LARGE = encode(Image.new("1", (20000, 10000)))  # 200 megapixels, above Pillow's limit
BROKEN = {"cut": encode(noise(5, 64, 64), "JPEG")[:-500], "text": b"not an image", "large": LARGE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [*BROKEN, "damaged"])
def test_a_broken_image_among_good_ones(tmp_path: Path, kind: str, damage: str) -> None:
    name, content = "new\nline.jpg", BROKEN.get(damage, b"checksum")
    source = write(tmp_path / f"images.{kind}", kind, faces(12, "") | {name: content})
    if damage == "damaged" and kind == "folder":
        (source / name).unlink()
        (source / name).symlink_to("nowhere")
    elif damage == "damaged" and kind == "zip":
        source.write_bytes(source.read_bytes().replace(content, b"checkSUM"))
    assert_refused(source, tmp_path / "packed", r"'new\\nline.jpg' in images.* is broken")
