"""Promise 5: disks that fill up or cannot be written, memory that runs out, folders in use, and handles that run out end a
run in one sentence, and the same command afterwards ends with what an undisturbed run gives."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import Disk, small_disk
from PIL import Image
from pipeline import Forker, Place, Run, children, difference, is_alive

from mlem_diffusion.checkpoint import load_state
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_arrays, read_json

FULL = re.compile(r"\bfull\b|[Nn]ot enough disk space|No space left")
STAGES = ("prepare_data", "train_levels", "measure_gamma", "sample_compare")
MORE_STAGES = ("optimise", "sample", "report", "publish")
ARGUMENTS = {"sample": ("seeds='4-9'",)}  # "everything" has others


@pytest.fixture(scope="module")
def disks(forkers, tmp_path_factory) -> Iterator[list[Disk]]:
    """One for each forker."""
    base = tmp_path_factory.mktemp("disks")
    with ExitStack() as stack:
        yield [stack.enter_context(small_disk(base / str(i))) for i, _ in enumerate(forkers)]


def before(stages: Any, stage: str) -> Place:
    """The place in which the stage finds what it needs, and nothing of its own (a report is written anew each time)."""
    return stages.after["everything"] if stage in ("sample", "report", "publish") else stages.before(stage)


def go(forker: Forker, stage: str, place: Place, *more: str, **order: Any) -> Run:
    return forker(stage, place.arguments(*ARGUMENTS.get(stage, ()), *more), **order)


def broken_files(place: Place) -> str:
    """Files under their final names that are not whole, in words."""
    found = []
    for path in sorted(p for p in place.folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        try:
            check_file(path)
        except (UserError, ValueError, OSError, SyntaxError) as error:
            found.append(f"{path.relative_to(place.folder)} is half written ({error})")
    return "; ".join(found[:3])


def check_file(path: Path) -> None:
    """Raise something unless the file is whole."""
    if path.suffix == ".json":
        read_json(path, "", sealed=False)
    elif path.suffix == ".jsonl":
        [json.loads(line) for line in path.read_text().splitlines()]
    elif path.suffix == ".npz":
        read_arrays(path, "")
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix == ".pt":
        load_state(path)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        load_file(path)
    elif path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix in (".csv", ".html", ".yaml") and not path.stat().st_size:
        raise ValueError("empty")


def ended_well(run: Run, expected: re.Pattern[str], place: Place, may_finish: bool = True) -> str:
    """What is not as promised of a run to which a fault happened."""
    if run.code == 0:
        return broken_files(place) if may_finish else f"it finished: {run}"
    if run.code != 2 or not expected.search(run.sentence):
        return f"no such sentence: {run}"
    return broken_files(place)


# ------------------------------------------------------------------------------------------------ disk full


def test_disk_full(stages, forkers, disks, count, whole, tmp_path):
    """Before a stage begins its disk has only some bytes left, by chance between none and what the stage needs."""
    rng = random.Random(5)
    times = dict.fromkeys(STAGES, 6 if whole else 1) | dict.fromkeys(MORE_STAGES, 3 if whole else 0)
    tasks = [(stage, 1 + i % 2) for stage, n in times.items() for i in range(n)]
    rng.shuffle(tasks)
    shares = [rng.uniform(0, 0.9) for _ in tasks]
    wanted, needed = {}, {}
    for stage in [stage for stage, n in times.items() if n]:
        disks[0].reset()
        place = before(stages, stage).copy_to(disks[0].folder / "place")
        free = disks[0].free()
        run = go(forkers[0], stage, place)
        assert run.code == 0, str(run)
        wanted[stage], needed[stage] = place.contents(), max(free - disks[0].free(), 64 << 10)

    def one(number: int) -> tuple[str, str]:
        (stage, workers), disk, forker = tasks[number], disks[number % 2], forkers[number % 2]
        disk.reset()
        place = before(stages, stage).copy_to(disk.folder / "place")
        disk.leave(int(shares[number] * needed[stage]))
        run = go(forker, stage, place, f"workers={workers}")
        disk.make_room()
        return stage, ended_well(run, FULL, place) or again(forker, stage, place, wanted[stage], f"workers={workers}")

    for stage, detail in in_pairs(one, len(tasks)):
        count(5, f"disk full, {stage}", not detail, detail)


def again(forker: Forker, stage: str, place: Place, wanted: dict, *more: str) -> str:
    """Run the stage to its end; what is then not as it should be."""
    run = go(forker, stage, place, *more)
    return difference(wanted, place.contents()) if run.code == 0 else f"not finished by the same command: {run}"


def in_pairs(one: Callable[[int], tuple[str, str]], tasks: int) -> Iterator[tuple[str, str]]:
    """one(number) for all numbers: even ones on the first forker and disk, odd ones beside them on the second."""
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(lambda first: [one(n) for n in range(first, tasks, 2)], first) for first in (0, 1)]
        yield from itertools.chain(*(half.result() for half in halves))
