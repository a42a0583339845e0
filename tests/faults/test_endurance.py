"""Memory and file handles stay flat over thousands of calls.

Each kind of work runs in a process of its own (this file, as a script) with one thread. Its resident memory is read
twice: after a fifth of the calls, when everything cached on first use is loaded, and at the end. Measured growth was at
most 0.1 MB over 300 to 20,000 calls. Over 10,000 training steps it was 0.4 MB: the reported losses, which training
stores. The limit of 1.5 MB leaves room for another allocator. It still detects 1,000 calls that each leak an object of
4 KB, which one check confirms (2.8 to 3.2 MB). The number of open handles must not change.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1.5  # MB
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
Done = Callable[[int], None]  # called with the number of calls made so far


# ---- the work -------------------------------------------------------------------------------------------------------


def sampling(folder: Path, calls: int, done: Done) -> None:
    """Short multilevel samplings: every step rule of both dynamics, alternately with two kinds of coins."""
    import toys

    from mlem_diffusion.diffusion.sampler import sample
    from mlem_diffusion.diffusion.step_rules import STEP_RULES
    from mlem_diffusion.multilevel.estimators import Multilevel

    family, grid = toys.toy_family(), toys.process().grid(6)
    estimators = [Multilevel(family, np.array([1, 0.5, 0.3]), coins) for coins in ("systematic", "independent")]
    settings = list(itertools.product(estimators, STEP_RULES))
    for k in range(calls):
        estimator, (dynamics, rule) = settings[k % len(settings)]
        sample(estimator, grid, dynamics, rule, [2 * k, 2 * k + 1], toys.SHAPE)
        done(k + 1)


def training(folder: Path, steps: int, done: Done) -> None:
    """One training of a tiny network that reports, takes snapshots and saves states."""
    _train(folder, steps, every=5, report=lambda record: done(record["images"]))


def trainings(folder: Path, calls: int, done: Done) -> None:
    """One short training after another in one process."""
    for k in range(calls):
        _train(folder / str(k), 3, every=1, report=bool)
        done(k + 1)


def _train(folder: Path, steps: int, every: int, report: Callable[[dict], object]) -> None:
    import toys

    from mlem_diffusion.models.family import build_denoiser
    from mlem_diffusion.training.loop import TrainConfig, train_level

    config = TrainConfig(
        images=steps, batch=1, log_every=every, save_every=0.5, snapshots=[0.1, 0.5, 1.0], compile="off", graph="off"
    )
    denoiser = build_denoiser(4, 8, 0.5, {"multipliers": [1], "blocks": 1, "attention": []}, "v")
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)
    train_level(
        denoiser, images, toys.process(), config, folder, width=4, report=lambda record: (report(record), None)[1]
    )


def logging(folder: Path, calls: int, done: Done, mode: str = "disabled", pause: float = 0.0) -> None:
    """Many records of one tracker."""
    from mlem_diffusion.experiment.tracking import Tracker

    with Tracker(folder, "train", {}, mode=mode) as tracker:
        for k in range(calls):
            tracker.log({"level": "w4", "images": k, "loss": 0.5})
            time.sleep(pause)
            done(k + 1)


def leaking(folder: Path, calls: int, done: Done) -> None:
    """Like `logging`, but every call leaks 4 KB, and every hundredth call leaks a handle."""
    leaked: list[object] = []

    def leak(made: int) -> None:
        leaked.append(bytearray(os.urandom(4096)))
        if made % 100 == 0:
            leaked.append(open(os.devnull))  # noqa: SIM115
        done(made)

    logging(folder, calls, leak)


def mirrored(folder: Path, calls: int, done: Done) -> None:
    """Like `logging`, but with W&B and pauses that let it keep up."""
    logging(folder, calls, done, mode="offline", pause=1e-3)


def trackers(folder: Path, calls: int, done: Done) -> None:
    """One tracker after another."""
    from mlem_diffusion.experiment.tracking import Tracker

    for k in range(calls):
        with Tracker(folder, "train", {}, mode="disabled", fresh=k % 2 == 0) as tracker:
            tracker.log({"level": "w4", "images": k, "loss": 0.5})
            tracker.rewind("w4", k - 1)
        done(k + 1)


def resident() -> float:
    """Resident memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


def main(work: str, calls: int) -> None:
    import torch

    torch.set_num_threads(1)
    found = []

    def done(made: int) -> None:
        if made in (calls // 5, calls):
            gc.collect()
            found.append((resident(), len(os.listdir("/proc/self/fd"))))

    with tempfile.TemporaryDirectory() as folder:
        globals()[work](Path(folder), calls, done)
    print(json.dumps([after - before for before, after in zip(*found, strict=True)]))


# ---- the tests ------------------------------------------------------------------------------------------------------


def measure(work: Callable[..., None], calls: int, folder: Path) -> tuple[float, int]:
    """The growth of the process in MB and in handles."""
    own = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    ran = subprocess.run(
        [sys.executable, __file__, work.__name__, str(calls)], capture_output=True, text=True, timeout=1800,
        env={**os.environ, **own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0 and "W&B is off" not in ran.stderr, ran.stderr[-3000:]
    memory, handles = json.loads(ran.stdout.splitlines()[-1])
    print(f"{work.__name__}, {calls:,} calls: {memory:+.2f} MB, {handles:+} handles")
    return memory, handles


@pytest.mark.parametrize(
    ("work", "what", "short", "long"),
    [
        (sampling, "sampling, {} calls", 1_000, 8_000),
        (training, "training, {} steps", 1_000, 10_000),
        (trainings, "short trainings, {} calls", 15, 300),
        (logging, "logging, {} records", 5_000, 20_000),
        (mirrored, "logging with W&B, {} records", 0, 20_000),
        (trackers, "opening and closing records, {} calls", 300, 5_000),
    ],
)
def test_memory_and_handles_stay_flat(tmp_path: Path, count, whole: bool, work, what: str, short: int, long: int):
    if not (calls := long if whole else short):
        pytest.skip("only if FAULTS=whole")
    memory, handles = measure(work, calls, tmp_path)
    survived = memory < TOLERANCE and handles == 0
    count(6, what.format(f"{calls:,}"), survived, f"{memory:+.2f} MB, {handles:+} handles")


def test_a_leak_is_detected(tmp_path: Path):
    memory, handles = measure(leaking, 1_000, tmp_path)
    assert memory > TOLERANCE and handles == 8


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
