"""A full disk, a folder in use, and W&B down: one sentence or warning, and nothing is lost."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline import outputs, python

from mlem_diffusion.files import locked


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; the test is skipped if mounting is not permitted."""
    (folder := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_disk_that_is_really_full(done, here, disk):
    place, filler = done[0].copy_to(disk, "data"), disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - (96 << 10))
    run = here("train_levels", place, "workers=1", code=2)
    assert "full" in run.err and "Traceback" not in run.err, run.err
    filler.unlink()
    here("train_levels", place)
    assert outputs(place, "train_levels") == outputs(done[0], "train_levels")


def test_a_folder_in_use_is_refused(done, here, tmp_path):
    place = done[0].copy_to(tmp_path)
    digest = place.digest()
    with locked(place.results / "cache", "train_levels"):
        run = here("report", place, "force=true", code=2)
    assert "in use by another run" in run.complaint and place.digest() == digest


# ------------------------------------------------------------------------------------------------------- W&B
RECORDS = 60
CHILD = f"""
import sys
from pathlib import Path
from mlem_diffusion.experiment import tracking

tracking.TIMEOUT, tracking.PATIENCE = 1.5, 1.5
folder = Path(sys.argv[1])
tracker = tracking.Tracker(folder, "train", {{"name": "fault"}}, mode="online", project="test")
for k in range({RECORDS}):
    tracker.log({{"images": k}})
tracker.finish()
print("finished")
"""


def test_wandb_is_down_and_the_records_are_complete(tmp_path: Path):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"  # closed from here on
    own = {f"WANDB_{name}_DIR": str(tmp_path / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    run = python("-c", CHILD, str(tmp_path / "run"), WANDB_BASE_URL=address, WANDB_API_KEY="a" * 40, **own)
    assert run.code == 0 and "finished" in run.out, run.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == list(range(RECORDS))
    ours = run.err.split("Exception ignored in atexit")[0]  # W&B's own words at the end of a run without its service
    assert ours.count("SlowPath") == 1 and "metrics.jsonl" in ours and "Traceback" not in ours, run.err
