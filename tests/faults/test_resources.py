"""Promise 5: a run that lacks a resource ends in one sentence, and running it again gives the undisturbed result.

The resources are disk space, write permission, memory, folders that another run uses, and file handles.
"""

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

from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_arrays, read_json
from mlem_diffusion.models.checkpoint import load_state

FULL = re.compile(r"\bfull\b|[Nn]ot enough disk space|No space left")
STAGES = ("prepare_data", "train_levels", "measure_gamma", "sample_compare")
MORE_STAGES = ("optimise", "sample", "report", "publish")
ARGUMENTS = {"sample": ("seeds='4-9'",)}  # the place "everything" has other seeds


@pytest.fixture(scope="module")
def disks(forkers, tmp_path_factory) -> Iterator[list[Disk]]:
    """One disk per forker."""
    base = tmp_path_factory.mktemp("disks")
    with ExitStack() as stack:
        yield [stack.enter_context(small_disk(base / str(i))) for i, _ in enumerate(forkers)]


def before(stages: Any, stage: str) -> Place:
    """The place with the stage's inputs, without its outputs (a report is always written again)."""
    return stages.after["everything"] if stage in ("sample", "report", "publish") else stages.before(stage)


def go(forker: Forker, stage: str, place: Place, *more: str, **order: Any) -> Run:
    return forker(stage, place.arguments(*ARGUMENTS.get(stage, ()), *more), **order)


def broken_files(place: Place) -> str:
    """A description of incomplete files under their final names; empty if there are none."""
    found = []
    for path in sorted(p for p in place.folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        try:
            check_file(path)
        except (UserError, ValueError, OSError, SyntaxError) as error:
            found.append(f"{path.relative_to(place.folder)} is half written ({error})")
    return "; ".join(found[:3])


def check_file(path: Path) -> None:
    """Raise an exception if the file is incomplete."""
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
    """How a run that met a fault broke the promise; empty if it holds."""
    if run.code == 0:
        return broken_files(place) if may_finish else f"it finished: {run}"
    if run.code != 2 or not expected.search(run.sentence):
        return f"no such sentence: {run}"
    return broken_files(place)


# ------------------------------------------------------------------------------------------------ disk full


def test_disk_full(stages, forkers, disks, count, whole, tmp_path):
    """A stage starts on a disk whose free space is a random part of what it needs."""
    rng = random.Random(5)
    times = dict.fromkeys(STAGES, 6) | dict.fromkeys(MORE_STAGES, 3) if whole else dict.fromkeys(STAGES[1:3], 1)
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
    """Run the stage to its end and describe how the result is wrong; empty if it is right."""
    run = go(forker, stage, place, *more)
    return result_difference(wanted, place) if run.code == 0 else f"not finished by the same command: {run}"


def result_difference(wanted: dict, place: Place) -> str:
    """A description of the files that differ, without the configuration, which records the number of workers."""

    def results(files: dict) -> dict:
        found = {name: content for name, content in files.items() if not name.endswith("config.yaml")}
        for name in (name for name in found if name.endswith("provenance.json")):
            found[name] = {key: value for key, value in found[name].items() if key != "config_sha256"}
        return found

    return difference(results(wanted), results(place.contents()))


def in_pairs(one: Callable[[int], tuple[str, str]], tasks: int) -> Iterator[tuple[str, str]]:
    """one(number) for all numbers, in two threads: even numbers use the first forker and disk, odd ones the second."""
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(lambda first: [one(n) for n in range(first, tasks, 2)], first) for first in (0, 1)]
        yield from itertools.chain(*(half.result() for half in halves))


@pytest.mark.whole
def test_disk_that_fills_up_during_the_run(stages, forkers, disks, count, whole, tmp_path):
    """Another program fills the disk while the stage runs."""
    rng = random.Random(6)
    tasks = [stage for stage in STAGES[1:] for _ in range(3 if whole else 1)][: None if whole else 2]
    moments = [rng.uniform(0.2, 0.8) * stages.seconds[stage] for stage in tasks]

    def one(number: int) -> tuple[str, str]:
        stage, disk, forker = tasks[number], disks[number % 2], forkers[number % 2]
        disk.reset()
        place = stages.before(stage).copy_to(disk.folder / "place")
        timer = threading.Timer(moments[number], disk.leave, (0,))
        timer.start()
        run = go(forker, stage, place)
        timer.cancel()
        timer.join()
        disk.make_room()
        return stage, ended_well(run, FULL, place) or again(forker, stage, place, stages.after[stage].contents())

    for stage, detail in in_pairs(one, len(tasks)):
        count(5, f"disk fills up meanwhile, {stage}", not detail, detail)


@pytest.mark.whole
def test_no_room_for_more_files(stages, forkers, disks, count, whole, tmp_path):
    """A disk that has free bytes but no free inodes."""
    rng = random.Random(7)
    tasks = [stage for stage in STAGES for _ in range(2 if whole else 1)][: None if whole else 2]
    lefts = [rng.randint(0, 12) for _ in tasks]

    def one(number: int) -> tuple[str, str]:
        stage, disk, forker = tasks[number], disks[number % 2], forkers[number % 2]
        disk.reset()
        place = stages.before(stage).copy_to(disk.folder / "place")
        disk.leave_files(lefts[number])
        run = go(forker, stage, place)
        disk.remount("nr_inodes=100000")
        return stage, ended_well(run, FULL, place) or again(forker, stage, place, stages.after[stage].contents())

    for stage, detail in in_pairs(one, len(tasks)):
        count(5, f"no room for more files, {stage}", not detail, detail)


# --------------------------------------------------------------------------------------- folders that cannot be written

READ_ONLY = re.compile(r"cannot be written|[Rr]ead-only")


def test_read_only_disk(stages, forkers, disks, count, whole, tmp_path):
    tasks = [*STAGES, *(MORE_STAGES if whole else ())][:: 1 if whole else 2]

    def one(number: int) -> tuple[str, str]:
        stage, disk, forker = tasks[number], disks[number % 2], forkers[number % 2]
        disk.reset()
        place = before(stages, stage).copy_to(disk.folder / "place")
        disk.remount("ro")
        run = go(forker, stage, place)
        disk.remount("rw")
        detail = ended_well(run, READ_ONLY, place, may_finish=False)
        if detail or stage not in STAGES:
            return stage, detail
        return stage, again(forker, stage, place, stages.after[stage].contents())

    for stage, detail in in_pairs(one, len(tasks)):
        count(5, f"read-only disk, {stage}", not detail, detail)


@pytest.mark.whole
def test_only_one_folder_is_read_only(stages, forker, disks, count, tmp_path):
    """data or checkpoints are on another disk than the results."""
    disk = disks[0]
    for stage, kind, path in (("prepare_data", "data", "data"), ("train_levels", "checkpoints", "${name}")):
        disk.reset()
        place, more = stages.before(stage).copy_to(tmp_path / stage), f"paths.{kind}='{disk.folder}/{path}'"
        disk.remount("ro")
        run = go(forker, stage, place, more)
        disk.remount("rw")
        detail = ended_well(run, READ_ONLY, place, may_finish=False)
        if not detail and (run := go(forker, stage, place, more)).code != 0:
            detail = f"not finished by the same command: {run}"
        count(5, f"read-only {kind}", not detail, detail)


@pytest.mark.whole
def test_a_file_where_a_folder_should_be(stages, forker, count, whole, tmp_path):
    cases = (
        ("train_levels", "results"),
        ("train_levels", "results/smoke"),
        ("train_levels", "checkpoints"),
        ("measure_gamma", "results/smoke/cache"),
    )
    for number, (stage, name) in enumerate(cases if whole else cases[2:]):
        place = stages.before(stage).copy_to(tmp_path / str(number))
        path = place.folder / name
        path.is_dir() and shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("something else")
        run = go(forker, stage, place)
        detail = ended_well(run, READ_ONLY, place, may_finish=False)
        path.unlink()
        if not detail and (run := go(forker, stage, place)).code != 0:
            detail = f"not finished by the same command: {run}"
        count(5, "a file where a folder should be", not detail, f"{name}: {detail}")


# ------------------------------------------------------------------------------------------------ memory

WIDE = (
    "data.size=32", "data.count=96", "data.holdout=32", "family.widths=[4]", "train.images=1024", "train.batch=512",
    "train.log_every=512", "train.snapshots=[1.0]", "gamma.images=16", "workers=1",
)  # fmt: skip
HALVED = re.compile(r"(\d+) images at a time do not fit in memory; it continues with (\d+)")
MEMORY = re.compile(r"memory")


def test_batches_that_do_not_fit_in_memory(count, whole, tmp_path):
    """If a full batch does not fit in memory, training splits it, and the trained weights are the same."""
    # freed memory must be available again, as on a device; glibc would keep blocks of this size in its heap
    forker = Forker(tmp_path / "forker", MALLOC_MMAP_THRESHOLD_="131072")
    data = Place(tmp_path / "data", [*WIDE])
    data.folder.mkdir()
    run = go(forker, "prepare_data", data)
    assert run.code == 0, str(run)
    undisturbed = data.copy_to(tmp_path / "undisturbed")
    run = go(forker, "train_levels", undisturbed)
    assert run.code == 0 and not HALVED.search(run.err), str(run)
    limits = (500, 400, 300, 200, 150, 100) if whole else (300,)

    def one(number: int) -> tuple[str, str]:
        place = data.copy_to(tmp_path / str(number))
        run = go(forker, "train_levels", place, memory=limits[number] << 20)
        what = f"{limits[number]} MB"
        if run.code == 2 and MEMORY.search(last := run.lines[-1]) and "Traceback" not in run.err:
            return "never", "" if "train.accumulate" in last or "smaller" in last else f"{what}: {run}"
        if run.code != 0 or (limits[number] <= 400 and not HALVED.search(run.err)):
            return "halved", f"{what}: {run}"
        return "halved", training_difference(undisturbed, place)

    found = [one(number) for number in range(len(limits))]
    assert any(kind == "halved" for kind, _ in found)
    for kind, detail in found:
        fault = "batch halved until it fits" if kind == "halved" else "no batch fits"
        count(5, f"memory refused, {fault}", not detail, detail)
    forker.close()


def training_difference(wanted: Place, found: Place) -> str:
    """How two trainings differ beyond rounding; empty if they agree."""
    states: list[Any] = [load_state(place.checkpoints / "w4" / "state.pt") for place in (wanted, found)]
    if states[0]["images"] != states[1]["images"]:
        return "other images were seen"
    if not np.allclose(*([h["loss"] for h in state["history"]] for state in states), rtol=1e-4):
        return f"other losses: {[state['history'] for state in states]}"
    for name, value in states[0]["ema"].items():
        if not torch.allclose(value, states[1]["ema"][name], rtol=1e-3, atol=1e-4):
            return f"{name} differs by {(value - states[1]['ema'][name]).abs().max():.2g}"
    return ""


@pytest.mark.whole
def test_memory_that_is_too_small(stages, forkers, count, whole, tmp_path):
    """Every stage ends in one sentence, and the same command with more memory gives the usual result."""
    limits = (60, 30, 15, 8, 4) if whole else (15,)
    limited_stages = STAGES if whole else STAGES[1::2]
    tasks = [(stage, mb) for stage in limited_stages for mb in limits]

    def one(number: int) -> tuple[str, str]:
        (stage, mb), forker = tasks[number], forkers[number % 2]
        place = stages.before(stage).copy_to(tmp_path / str(number))
        run = go(forker, stage, place, "workers=1", memory=mb << 20)
        messages = [line for line in run.lines if not HALVED.search(line)]
        fine = run.code == 2 and len(messages) == 1 and MEMORY.search(messages[0])
        aborted = run.code in (-signal.SIGABRT, -signal.SIGSEGV)  # a library aborted, which counts as a kill
        detail = "" if run.code == 0 or fine or aborted else f"{mb} MB, no such sentence: {run}"
        stage = f"until a library aborts, {stage}" if aborted else stage
        failure = detail or broken_files(place)
        failure = failure or again(
            forker, tasks[number][0], place, stages.after[tasks[number][0]].contents(), "workers=1"
        )
        if HALVED.search(run.err):  # half-batches change the result by rounding
            failure = "; ".join(part for part in failure.split("; ") if not part.endswith(" differs"))
        return stage, failure

    for stage, detail in in_pairs(one, len(tasks)):
        count(5, f"memory refused, {stage}", not detail, detail)


# ------------------------------------------------------------------------------------------------ two at a time

IN_USE = re.compile(r"is in use by another run \((.+), process \d+ on .+\): wait for it, or stop it")


class BackgroundRun:
    """A run in the background while other runs start."""

    def __init__(self, forker: Forker, stage: str, place: Place, *more: str):
        self.pid = 0
        self.pool = ThreadPoolExecutor(1)
        started = threading.Event()

        def during(pid: int) -> None:
            self.pid = pid
            started.set()

        self.run: Future[Run] = self.pool.submit(forker, stage, place.arguments(*more), during)
        assert started.wait(300)

    def wait_for(self, path: Path, text: str) -> None:
        """Wait until the run has written its name into a lock."""
        until = time.monotonic() + 60
        while time.monotonic() < until and not self.run.done():
            if path.is_file() and text in path.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"{text} has not taken {path}: {self.run.result() if self.run.done() else ''}")

    def end(self) -> Run:
        run = self.run.result(300)
        self.pool.shutdown()
        return run


def refused(run: Run, holder: str) -> str:
    found = IN_USE.search(run.sentence)
    fine = run.code == 2 and found is not None and holder in found[1] and run.seconds < 30
    return "" if fine else f"not refused: {run}"


@pytest.mark.whole
def test_two_runs_in_one_folder(stages, forkers, count, tmp_path):
    first, second = forkers
    long = ("workers=1", "train.images=6400", "train.save_every=1")
    place = stages.before("train_levels").copy_to(tmp_path / "twice")
    undisturbed = place.copy_to(tmp_path / "undisturbed")
    holder = BackgroundRun(first, "train_levels", place, *long)
    holder.wait_for(place.results / "cache" / ".lock", "train_levels")
    for stage in ("train_levels", "sample_compare"):
        detail = refused(second(stage, place.arguments(*long)), "train_levels")
        count(5, f"{stage} beside train_levels", not detail, detail)
    assert not holder.run.done()
    run = holder.end()
    alone = first("train_levels", undisturbed.arguments(*long))
    assert alone.code == 0, str(alone)
    detail = difference(undisturbed.contents(), place.contents()) if run.code == 0 else str(run)
    count(5, "a run beside which others were refused", not detail, detail)


@pytest.mark.whole
def test_report_beside_a_comparison(stages, forkers, count, tmp_path):
    place = stages.before("sample_compare").copy_to(tmp_path / "report")
    holder = BackgroundRun(
        forkers[0], "sample_compare", place, "workers=1", "compare.num_samples=120", "compare.bootstrap=5000"
    )
    holder.wait_for(place.results / "cache" / ".lock", "sample_compare")
    detail = refused(forkers[1]("report", place.arguments()), "sample_compare")
    count(5, "report beside sample_compare", not detail, detail)
    os.kill(holder.pid, signal.SIGKILL)
    holder.end()
    run = forkers[1]("sample_compare", place.arguments())  # the lock of the killed run does not block it
    detail = difference(stages.after["sample_compare"].contents(), place.contents()) if run.code == 0 else str(run)
    count(5, "a run after one that was killed", run.code == 0, detail)


@pytest.mark.whole
def test_jobs_of_single_levels(stages, forkers, count, tmp_path):
    """Jobs may run at the same time if their levels differ."""
    long = ("workers=1", "train.images=6400")
    place = stages.before("train_levels").copy_to(tmp_path / "jobs")
    holder = BackgroundRun(forkers[0], "train_levels", place, "only=w4", *long)
    holder.wait_for(place.checkpoints / "w4" / ".lock", "training of w4")
    detail = refused(forkers[1]("train_levels", place.arguments("only=w4", *long)), "w4")
    count(5, "a level that another job trains", not detail, detail)
    assert not holder.run.done()
    run = forkers[1]("train_levels", place.arguments("only=w2", *long))
    count(5, "another level than another job trains", run.code == 0, str(run))
    run = holder.end()
    count(5, "a job beside other jobs", run.code == 0, str(run))


def test_two_preparations_of_one_data_set(stages, forkers, count, tmp_path):
    """With separate results folders, one run draws the images and the other waits for them."""
    shared = Place(tmp_path / "0")
    shared.folder.mkdir()
    other = f"paths.results='{tmp_path}/1/${{name}}'"
    holder = BackgroundRun(forkers[0], "prepare_data", shared)
    run = forkers[1]("prepare_data", shared.arguments(other))
    runs = [holder.end(), run]
    detail = "; ".join(str(run) for run in runs if run.code != 0 or run.lines)
    wanted = {n: c for n, c in stages.after["prepare_data"].contents().items() if n.startswith("data")}
    found = {n: c for n, c in shared.contents().items() if n.startswith("data")}
    count(5, "two preparations of one data set", not (detail or difference(wanted, found)), detail)


@pytest.mark.whole
def test_a_worker_is_killed(stages, forkers, count, tmp_path):
    for stage in ("train_levels", "sample_compare"):
        place = stages.before(stage).copy_to(tmp_path / stage)
        holder = BackgroundRun(forkers[0], stage, place, "workers=2")
        workers: list[int] = []
        while not workers and not holder.run.done():
            time.sleep(0.2)
            workers = [pid for pid in children(holder.pid) if is_alive(pid) and b"spawn_main" in command(pid)]
        for pid in workers[:1]:
            os.kill(pid, signal.SIGKILL)
        run = holder.end()
        detail = "" if run.code == 2 and "worker" in run.sentence else f"no such sentence: {run}"
        detail = detail or again(forkers[0], stage, place, stages.after[stage].contents())
        count(5, f"a worker is killed, {stage}", not detail, detail)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ------------------------------------------------------------------------------------------------ handles


@pytest.mark.whole
def test_too_few_file_handles(stages, forkers, count, whole, tmp_path):
    limits = (64, 32, 20, 16, 14, 12, 10) if whole else (20, 12)
    tasks = [(stage, n) for stage in STAGES[:: 1 if whole else 2] for n in limits]

    def one(number: int) -> tuple[str, str]:
        (stage, files), forker = tasks[number], forkers[number % 2]
        place = stages.before(stage).copy_to(tmp_path / str(number))
        run = go(forker, stage, place, f"workers={1 + number % 2}", files=files)
        detail = ended_well(run, re.compile("[Tt]oo many (open )?files"), place)
        return stage, f"{files} files: {detail}" if detail else again(
            forker, stage, place, stages.after[stage].contents()
        )

    for stage, detail in in_pairs(one, len(tasks)):
        count(5, f"too few file handles, {stage}", not detail, detail)
