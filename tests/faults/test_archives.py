"""Hostile and damaged archives, folders and images: the right data set or one sentence, never anything else."""

from __future__ import annotations

import gzip
import io
import os
import resource
import signal
import socket
import stat
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ledger import Count
from PIL import Image

from mlem_diffusion.data import images as data
from mlem_diffusion.errors import UserError

GB = 1 << 30
TARS = ("tar", "tar.gz")


def png(pixels: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


IMAGES = {f"images/{i:06d}.png": noise(i) for i in range(24)}


def prepare(source: Path, destination: Path, **settings) -> dict:
    return data.prepare(str(source), destination, name="test", size=12, holdout=4, **settings)


def write(path: Path, kind: str, files: dict[str, bytes]) -> Path:
    if kind == "folder":
        for name, contents in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(contents)
    elif kind.startswith("zip"):
        method = zipfile.ZIP_DEFLATED if kind == "zip deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, contents in files.items():
                archive.writestr(name, contents)
    else:
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:  # pyright: ignore
            for name, contents in files.items():
                archive.addfile(member(name, size=len(contents)), io.BytesIO(contents))
    return path


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


# --------------------------------------------------------------------------------------- hostile


def refusal(source: Path, *words: str) -> str:
    """How the refusal of `source` was wrong; empty if it was right."""
    home = source.parent
    before, start = sorted(home.parent.rglob("*")), time.time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(30)  # interrupts a read that never returns
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(source, home / "packed")
        return "it was prepared"
    except UserError as error:
        text = str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    missing = [word for word in (source.name, *words) if word not in text]
    if missing or len(text.splitlines()) != 1 or not text.endswith("."):
        return f"{missing} missing in: {text}"
    if sorted(home.parent.rglob("*")) != before:
        return "files were written"
    return f"{grown:.0f} MB, {time.time() - start:.1f} s" if grown > 200 or time.time() - start > 10 else ""


@pytest.fixture
def refused(tmp_path: Path, count: Count) -> Callable[..., None]:
    def check(fault: str, source: Path, *words: str) -> None:
        problem = refusal(source, *words)
        count(2, fault, not problem, f"{source.name}: {problem}")

    (tmp_path / "home").mkdir()
    return check


OUTSIDE = (
    "/x.png",
    "C:\\x.png",
    "C:/x.png",
    "\\x.png",
    "../x.png",
    "a/../../x.png",
    "..\\x.png",
    "../notes.txt",
    "/tmp/",
)


@pytest.mark.parametrize("kind", ["zip", *TARS])
def test_paths_that_lead_outside(tmp_path: Path, refused: Callable[..., None], kind: str) -> None:
    for i, name in enumerate(OUTSIDE):
        source = write(tmp_path / "home" / f"evil{i}.{kind}", kind, IMAGES | {name: noise(0)})
        refused("path that leads out of the archive", source, name.rstrip("/").partition("\\")[0], "leads out")


@pytest.mark.parametrize("kind", TARS)
@pytest.mark.parametrize("name", ["images/x.png", "x", "list_eval_partition.txt"])
def test_links_and_devices_in_a_tar(tmp_path: Path, refused: Callable[..., None], kind: str, name: str) -> None:
    types = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    for i, what in enumerate(types):
        source = tmp_path / "home" / f"evil{i}.{kind}"
        with tarfile.open(source, "w:" + kind.partition(".")[2]) as archive:  # pyright: ignore
            for image, contents in IMAGES.items():
                archive.addfile(member(image, size=len(contents)), io.BytesIO(contents))
            archive.addfile(member(name, type=what, linkname="images/000001.png", devmajor=1, devminor=5))
        refused("link, device or pipe in an archive", source, name, "link" if i < 2 else "a device or a pipe")


def test_links_and_devices_in_a_zip(tmp_path: Path, refused: Callable[..., None]) -> None:
    for i, what in enumerate((stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK)):
        source = write(tmp_path / "home" / f"evil{i}.zip", "zip", IMAGES)
        with zipfile.ZipFile(source, "a") as archive:
            info = zipfile.ZipInfo("images/x.png")
            info.external_attr = (what | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        refused("link, device or pipe in an archive", source, "images/x.png", "link" if i < 1 else "a device or a pipe")


def test_members_that_are_not_files_are_harmless(tmp_path: Path) -> None:
    for kind in ("zip", "tar"):
        source = write(tmp_path / f"good.{kind}", kind, IMAGES | {"notes.txt": b"text"})
        if kind == "zip":
            with zipfile.ZipFile(source, "a") as archive:
                archive.writestr(zipfile.ZipInfo("images/"), "")
        else:
            with tarfile.open(source, "a") as archive:
                archive.addfile(member("./images", type=tarfile.DIRTYPE))
        assert prepare(source, tmp_path / kind)["count"] == 24


def deflated(total: int, unit: bytes = bytes(1 << 20)) -> bytes:
    """A raw deflate stream that repeats `unit` up to `total` bytes, built quickly."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = packer.compress(unit) + packer.flush(zlib.Z_FULL_FLUSH)
    return once * (total // len(unit)) + zlib.compress(b"")[2:-4]


def raw_zip(path: Path, members: list[tuple[str, bytes, int]]) -> Path:
    """A zip with the images and the given members (name, deflated bytes, claimed size)."""
    body, table = b"", b""
    good = [(name, zlib.compress(contents)[2:-4], len(contents)) for name, contents in IMAGES.items()]
    crc = {name: zlib.crc32(contents) for name, contents in IMAGES.items()}
    members = good + members
    for name, packed, claimed in members:
        fields = struct.pack("<5H3L2H", 20, 0, 8, 0, 33, crc.get(name, 0), len(packed), claimed, len(name), 0)
        table += b"PK\1\2\x14\3" + fields + struct.pack("<3H2L", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + fields + name.encode() + packed
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(table), len(body), 0)
    path.write_bytes(body + table + end)
    return path


def raw_tar_gz(path: Path, head: bytes, zeros: int) -> Path:
    """A tar.gz of some headers and many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + deflated(zeros)
    path.write_bytes(gzip.compress(b"")[:10] + packed + bytes(8))
    return path


def header(name: str, size: int, **fields) -> bytes:
    return member(name, size=size, **fields).tobuf(tarfile.GNU_FORMAT)


def test_bombs_in_a_zip(tmp_path: Path, refused: Callable[..., None]) -> None:
    home, bomb, small = tmp_path / "home", deflated(GB), deflated(32 << 20)
    tiny, nothing = zlib.compress(noise(1))[2:-4], zlib.compress(b"")[2:-4]
    assert len(bomb) < 2e6
    many = [(f"{i}.png", small, 32 << 20) for i in range(64)]
    fault = "decompression bomb"
    refused(fault, raw_zip(home / "a.zip", [("x.png", bomb, 4 * GB - 2)]), "x.png", "claims 4,295 MB")
    refused(fault, raw_zip(home / "b.zip", [("notes.txt", bomb, GB)] * 2), "times as much")
    refused(fault, raw_zip(home / "c.zip", many), "times as much")
    refused(fault, raw_zip(home / "d.zip", [("list_eval_partition.txt", bomb, GB)]), "claims 1,074 MB")
    lie = "header that lies about a size"
    refused(lie, raw_zip(home / "e.zip", [("x.png", bomb, 1000)]), "x.png", "broken")
    refused(lie, raw_zip(home / "f.zip", [("x.png", tiny, 60 << 20)]), "x.png", "broken")
    refused(
        lie, raw_zip(home / "g.zip", [("x.png", nothing, 60 << 20)]), "x.png", "differs from the size in the archive"
    )
    with zipfile.ZipFile(home / "h.zip", "w", zipfile.ZIP_BZIP2) as archive:  # 50 bytes of bzip2 become 46 MB
        archive.writestr("x.png", noise(1))
    refused(fault, home / "h.zip", "x.png", "not supported")


@pytest.mark.parametrize("kind", TARS)
def test_bombs_in_a_tar(tmp_path: Path, refused: Callable[..., None], kind: str) -> None:
    good = b"".join(header(n, len(raw)) + raw + bytes(-len(raw) % 512) for n, raw in IMAGES.items())
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    cases = {
        "image": (header("x.png", 4 * GB), "claims 4,295 MB"),
        "list": (header("list_eval_partition.txt", 4 * GB), "claims 4,295 MB"),
        "other": (header("notes.txt", 4 * GB), "times as much"),
        "long-name": (header("x", 3 * GB, type=tarfile.GNUTYPE_LONGNAME), "a header of more than"),
        "extended": (header("x", 3 * GB, type=tarfile.XHDTYPE), "a header of more than"),
        "backwards": (header("x.png", -512), "no sensible size"),
        "endless": (header("x", -1024, type=tarfile.GNUTYPE_SPARSE), "truncated or damaged"),
        "nested": (header("x", 0, type=tarfile.GNUTYPE_LONGNAME) * 2000, "truncated or damaged"),
        "map": (
            member("x.png", size=1024, pax_headers=sparse).tobuf(tarfile.PAX_FORMAT) + b"99999999\n".ljust(512, b"1"),
            "truncated or damaged",
        ),
    }
    for name, (head, words) in cases.items():
        source = tmp_path / "home" / f"{name}.{kind}"
        if kind == "tar":
            source.write_bytes(good + head + bytes(10240))
        else:
            raw_tar_gz(source, good + head, GB)
        refused("decompression bomb", source, words)
    if kind == "tar.gz":
        refused("decompression bomb", raw_tar_gz(tmp_path / "home" / "tail.tar.gz", good, 2 * GB), "times as much")
    lying = write(tmp_path / "home" / f"lying.{kind}", kind, IMAGES)
    raw = lying.read_bytes() if kind == "tar" else gzip.decompress(lying.read_bytes())
    last = raw.index(b"images/000023.png")
    raw = raw[:last] + header("images/000023.png", 10 << 20) + raw[last + 512 :]
    lying.write_bytes(raw if kind == "tar" else gzip.compress(raw))
    refused("header that lies about a size", lying, "truncated")


def blank_png(width: int, height: int) -> bytes:
    """A white PNG with one bit per pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    row = b"\0" + b"\xff" * ((width + 7) // 8)
    check = 1
    for _ in range(height):
        check = zlib.adler32(row, check)
    pixels = b"\x78\x9c" + deflated(height * len(row), row) + struct.pack(">L", check)
    head = struct.pack(">2L5B", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_images_of_absurd_size(tmp_path: Path, refused: Callable[..., None]) -> None:
    for kind in ("folder", "zip", "tar.gz"):
        for width, height in ((50000, 50000), (40000, 4), (4, 40000), (9000, 8000)):
            contents = IMAGES | {"images/000005.png": blank_png(width, height)}
            source = write(tmp_path / "home" / f"{width}x{height}-{kind}", kind, contents)
            refused("image of absurd size", source, "000005.png", f"{width}x{height} pixels")
    source = write(tmp_path / "home" / "huge", "folder", IMAGES)
    os.truncate(source / "images/000003.png", 1 << 42)  # takes no space
    refused("image of absurd size", source, "000003.png", "larger than")


def test_special_files_in_a_folder(tmp_path: Path, refused: Callable[..., None], monkeypatch) -> None:
    fault, home = "pipe, device or socket in a folder", tmp_path / "home"
    for name in ("images/000007.png", "list_eval_partition.txt"):
        for kind in ("pipe", "device", "socket", "link"):
            source = write(home / f"{kind}-{name[:4]}", "folder", IMAGES)
            (source / name).unlink(missing_ok=True)
            if kind == "socket":
                monkeypatch.chdir((source / name).parent)  # a socket's path must be short
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(Path(name).name)
            elif kind == "device":
                (source / name).symlink_to("/dev/zero")
            elif kind == "pipe":
                os.mkfifo(source / name)
            else:
                os.mkfifo(home / f"pipe for {name[:4]}")
                (source / name).symlink_to(home / f"pipe for {name[:4]}")
            refused(fault, source, Path(name).name, "not a regular file")
    os.mkfifo(home / "images.zip")
    refused(fault, home / "images.zip", "neither a file nor a folder")


def test_folders_nested_too_deep(tmp_path: Path, count: Count) -> None:
    source, made = write(tmp_path / "deep", "folder", IMAGES), []
    while len(str(deep := made[-1] if made else source)) < 2400:
        os.mkdir(deep / "d")
        made.append(deep / "d")
    try:
        found = outcome(source, tmp_path / "packed")
    finally:
        for folder in reversed(made):
            os.rmdir(folder)
    count(2, "folder nested thousands deep", found in ("right", "refused"), found)


def test_links_to_images_in_a_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "there", "folder", IMAGES)
    (tmp_path / "linked").mkdir()
    for name in IMAGES:
        (tmp_path / "linked" / Path(name).name).symlink_to(tmp_path / "there" / name)
    assert prepare(tmp_path / "linked", tmp_path / "packed")["count"] == 24


# --------------------------------------------------------------------------------------- damaged


def zeroed(raw: bytes, random: np.random.Generator) -> bytes:
    """The data with one block zeroed. The end is spared, because a tar with zeros at its end is a valid shorter tar."""
    end = len(raw.rstrip(b"\0"))
    size = min(int(random.choice([64, 512, 4096])), end // 2)
    start = random.integers(end - size)
    return raw[:start] + bytes(size) + raw[start + size :]


def changed(raw: bytes, random: np.random.Generator) -> bytes:
    array = np.frombuffer(raw, np.uint8).copy()
    array[random.integers(len(raw), size=8)] = random.integers(0, 256, 8)
    return array.tobytes()


def flipped(raw: bytes, random: np.random.Generator) -> bytes:
    array = np.frombuffer(raw, np.uint8).copy()
    array[random.integers(len(raw))] ^= 1 << random.integers(8)
    return array.tobytes()


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "cut short": lambda raw, random: raw[: random.integers(len(raw))],
    "one bit flipped": flipped,
    "eight bytes changed": changed,
    "a block zeroed": zeroed,
    "garbage appended": lambda raw, random: raw + random.bytes(int(random.integers(1, 3000))),
    "emptied": lambda raw, random: b"",
}
KINDS = ("zip", "zip deflated", "tar", "tar.gz", "tar.xz", "folder")


def outcome(source: Path, destination: Path, broken: str = "", skip: bool = False) -> str:
    """ "right", "refused", or a description of anything else. A refusal must name the file `broken`."""
    try:
        manifest = prepare(source, destination, skip_broken=skip)
    except UserError as error:
        text = str(error)
        good = len(text.splitlines()) == 1 and text.endswith(".") and (broken or source.name) in text
        return "refused" if good else f"UserError: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    names = [name for name in sorted(IMAGES) if name not in manifest["skipped"]]
    expected = np.stack([pixels(IMAGES[name]) for name in names])
    found = np.load(destination / "images.npy")
    return "right" if found.shape == expected.shape and (found == expected).all() else "another data set"


def pixels(contents: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(contents))).transpose(2, 0, 1)


def test_random_damage(tmp_path: Path, count: Count, whole: bool) -> None:
    for number, kind in enumerate(KINDS):
        source = write(tmp_path / f"faces.{kind.replace(' ', '-')}", kind, IMAGES)
        assert outcome(source, tmp_path / "packed") == "right"
        for which, (damage, apply) in enumerate(DAMAGE.items()):
            for turn in range(12 if whole else 2):
                random = np.random.default_rng([number, which, turn])
                name = random.choice(list(IMAGES)) if kind == "folder" else ""
                good = (source / name).read_bytes()
                (source / name).write_bytes(apply(good, random))
                # Every second turn may skip broken images; the other images must then be right.
                found = outcome(source, tmp_path / "packed", name, skip=turn % 2 == 1)
                (source / name).write_bytes(good)
                what = "image in a folder" if kind == "folder" else "archive"
                count(2, f"{what}: {damage}", found in ("right", "refused"), f"{kind}, turn {turn}: {found}")


def test_a_damaged_png_is_never_another_picture(count: Count, whole: bool) -> None:
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    pictures = {
        "plain": Image.new("RGB", (64, 48), (200, 10, 30)),
        "smooth": Image.fromarray(np.stack([ramp, ramp[::-1], ramp // 2], -1)),
        "palette": Image.fromarray(np.stack([ramp, ramp, ramp // 2], -1)).quantize(16),
    }
    for number, picture in enumerate(pictures.values()):
        raw, right = png(picture), np.asarray(picture.convert("RGB").crop((8, 0, 56, 48))).transpose(2, 0, 1)
        assert np.array_equal(data._decode(raw, 48, "square")[0], right)
        for turn in range(2000 if whole else 200):
            random = np.random.default_rng([number, turn])
            damaged = (flipped if turn % 2 else changed)(raw, random)
            try:
                survived = np.array_equal(data._decode(damaged, 48, "square")[0], right)
            except data._BrokenImage:
                survived = True
            count(2, "PNG with bits or bytes changed", survived, f"{number}, turn {turn}: another picture")
