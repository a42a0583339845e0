"""Promise 1: after a kill at any moment, the same command run again gives the result of an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import Forker, Place, Run, children, difference, is_alive

SOON = 10.0  # seconds within which a run must end after a stop signal
STAGES = ("prepare_data", "train_levels", "measure_gamma", "sample_compare")
Action = Callable[[int], None]


def later(seconds: float, act: Action) -> Action:
    """Apply `act` to the process after some seconds."""

    def during(pid: int) -> None:
        timer = threading.Timer(seconds, act, (pid,))
        timer.daemon = True
        timer.start()

    return during


def kill(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """Kill the process and all its descendants, like a scheduler or a closed terminal."""
    for each in [pid, *children(pid)]:
        kill(each)


def kill_a_worker(pid: int) -> None:
    """Kill one worker, like the kernel when memory runs out."""
    for each in children(pid):
        name = Path(f"/proc/{each}/cmdline").read_bytes() if is_alive(each) else b""
        if b"spawn_main" in name:
            return kill(each)
    kill(pid)


def finish(forker: Forker, place: Place, stage: str, wanted: dict) -> str:
    """Run the stage to its end and describe how the result is wrong; empty if it is right."""
    again = forker(stage, place.arguments())
    if again.code != 0:
        return f"not finished by the same command: {again}"
    return difference(wanted, place.contents())


def test_killed_at_random_times(stages, forkers, count, whole, tmp_path):
    rng = random.Random(1)
    times = dict(zip(STAGES, (8, 16, 8, 20) if whole else (0, 1, 0, 1), strict=True))
    wanted = {stage: stages.after[stage].contents() for stage in STAGES}
    actions = {"the process": kill, "the process and its workers": kill_group, "a worker": kill_a_worker}
    tasks = [(stage, i) for stage in STAGES for i in range(times[stage])]
    moments = [
        (rng.uniform(0.05, 1.0) * stages.seconds[stage], *rng.choice(list(actions.items()))) for stage, _ in tasks
    ]

    def one(number: int) -> tuple[str, str, str]:
        (stage, _), (moment, name, action) = tasks[number], moments[number]
        forker = forkers[number % len(forkers)]
        place = stages.before(stage).copy_to(tmp_path / str(number))
        run = forker(stage, place.arguments(), later(moment, action))
        # a worker's death is reported in one sentence
        detail = "" if run.code in (0, -9) or run.sentence else f"after the kill: {run}"
        return stage, name, detail or finish(forker, place, stage, wanted[stage])

    with ThreadPoolExecutor(len(forkers)) as pool:
        for stage, name, detail in pool.map(one, range(len(tasks))):
            count(1, f"SIGKILL at a random time, {stage}", not detail, f"{name}: {detail}")


def test_killed_when_a_file_is_touched(stages, forkers, count, whole, tmp_path):
    """Kills at the most dangerous moments: just before a file is opened for writing, renamed or removed."""
    rng, tasks = random.Random(2), []
    times = dict(zip(STAGES, (4, 10, 4, 10) if whole else (0, 1, 0, 1), strict=True))
    wanted = {}
    for stage in (stage for stage in STAGES if times[stage]):
        place = stages.before(stage).copy_to(tmp_path / stage)
        events = forkers[0](stage, place.arguments("workers=1")).events
        assert events is not None and events > 5
        wanted[stage] = place.contents()
        tasks += [(stage, rng.randint(1, events)) for _ in range(times[stage])]

    def one(number: int) -> tuple[str, str]:
        stage, event = tasks[number]
        forker, place = forkers[number % len(forkers)], stages.before(stage).copy_to(tmp_path / str(number))
        run = forker(stage, place.arguments("workers=1"), kill_at=event)
        if run.code != -9:
            return stage, f"not killed at event {event}: {run}"
        again = forker(stage, place.arguments("workers=1"))
        if again.code != 0:
            return stage, f"event {event}, not finished by the same command: {again}"
        return stage, difference(wanted[stage], place.contents())

    with ThreadPoolExecutor(len(forkers)) as pool:
        for stage, detail in pool.map(one, range(len(tasks))):
            count(1, f"SIGKILL as a file is touched, {stage}", not detail, detail)


def interrupted_run(
    forker: Forker, place: Place, stage: str, moment: float, action: Action, *more: str
) -> tuple[Run, float]:
    """The interrupted run and the seconds from the signal to its end."""
    sent = [0.0]

    def act(pid: int) -> None:
        sent[0] = time.monotonic()
        if is_alive(pid):
            action(pid)

    run = forker(stage, place.arguments(*more), later(moment, act), group=True)
    return run, time.monotonic() - sent[0] if sent[0] else 0.0


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def control_c(pid: int) -> None:
    """Signal the process group, like a terminal."""
    os.killpg(pid, signal.SIGINT)


def test_stop_signals(stages, forkers, count, whole, tmp_path):
    rng = random.Random(3)
    each = 3 if whole else 1
    tasks = [
        (stage, action) for stage in (*STAGES, "optimise") for action in (terminate, control_c) for _ in range(each)
    ]
    tasks = tasks if whole else [("train_levels", terminate), ("sample_compare", control_c)]
    wanted = {stage: stages.after[stage].contents() for stage in STAGES}
    moments = [rng.uniform(0.3, 0.9) * stages.seconds[stage] for stage, _ in tasks]

    def one(number: int) -> tuple[str, str, str]:
        stage, action = tasks[number]
        forker = forkers[number % len(forkers)]
        place = stages.before(stage).copy_to(tmp_path / str(number))
        run, seconds = interrupted_run(forker, place, stage, moments[number], action)
        reported = run.code == 0 or ("run the same command again" in run.sentence)
        if not reported or seconds > SOON:
            return stage, action.__name__, f"{seconds:.1f} s after the signal: {run}"
        if stage == "optimise":  # only the exit status is checked, because plans can depend on seconds
            again = forker(stage, place.arguments())
            return stage, action.__name__, "" if again.code == 0 else str(again)
        return stage, action.__name__, finish(forker, place, stage, wanted[stage])

    with ThreadPoolExecutor(len(forkers)) as pool:
        for stage, name, detail in pool.map(one, range(len(tasks))):
            signal_name = "SIGTERM" if name == "terminate" else "Ctrl-C"
            count(1, f"{signal_name}, {stage}", not detail, detail)


def test_a_stop_signal_during_a_long_batch(stages, forker, count, whole, tmp_path):
    """A stop does not wait for a batch that takes minutes."""
    place = stages.before("sample_compare").copy_to(tmp_path / "long")
    for workers in (1, 2) if whole else (2,):
        run, seconds = interrupted_run(
            forker, place, "sample_compare", 4.0, terminate, "metrics._target_=null",
            "process.base_steps=1000", "compare.num_samples=2000", "compare.num_reference=2000", "compare.batch=2000",
            f"workers={workers}",
        )  # fmt: skip
        fine = run.code == 75 and "run the same command again" in run.sentence and seconds < SOON
        count(1, "SIGTERM in a batch of minutes", fine, f"{seconds:.1f} s after the signal: {run}")


def test_workers_end_with_their_parent(stages, forker, count, tmp_path):
    place = stages.before("train_levels").copy_to(tmp_path / "orphans")
    workers: list[int] = []

    def act(pid: int) -> None:
        workers.extend(children(pid))
        kill(pid)

    forker("train_levels", place.arguments("workers=2", "train.images=64000"), later(5.0, act))
    assert len(workers) >= 2
    until = time.monotonic() + 20  # a worker that is still importing ends afterwards
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [pid for pid in workers if is_alive(pid)]
    for pid in left:
        kill(pid)
    count(1, "parent killed: its workers end too", not left, f"{len(left)} of {len(workers)} were left")
