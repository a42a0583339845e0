"""Work shared by workers on a CPU; test_stage.py has ranks that do not come, test_training_loop.py two that do."""

import os
import signal
import time
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from mlem_diffusion import parallel
from mlem_diffusion.errors import Interrupted, UserError


def square(x: int) -> int:
    if x == 13:
        raise UserError("unlucky")
    return x * x


def slow(folder: str) -> str:
    """Works until it is told to stop, and says so in a file."""
    Path(folder, f"begun-{os.getpid()}").touch()
    until = time.monotonic() + 60
    while not parallel.stop_requested() and time.monotonic() < until:
        time.sleep(0.05)
    Path(folder, "saved").touch()
    return "stopped"


def end(_: int) -> None:
    os._exit(3)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_stops_all(workers: int):
    with pytest.raises(UserError, match="unlucky"):
        list(parallel.run(square, [1, 13, 2], workers))


def test_a_stop_between_items_is_an_interruption():
    done = []
    with pytest.raises(Interrupted):
        for index, _ in parallel.run(square, [1, 2, 3], 1, lambda: len(done) == 1):
            done.append(index)
    assert done == [0]


def test_a_worker_is_asked_to_save_and_stop(tmp_path: Path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell; workers inherit it
    get_reusable_executor().shutdown(wait=True)
    with pytest.raises(Interrupted):
        list(parallel.run(slow, [str(tmp_path)] * 4, 2, lambda: len(list(tmp_path.glob("begun-*"))) == 2))
    signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match="was killed"):
        list(parallel.run(end, [1, 2], 2))


def test_one_process_needs_no_group():
    assert (parallel.rank(), parallel.world(), parallel.is_main()) == (0, 1, True)
    assert parallel.gather({2: "b", 1: "a"}) == {1: "a", 2: "b"}
    assert parallel.agree(True) and not parallel.agree(False)
    assert parallel.mine([1, 2, 3]) == [1, 2, 3]
    assert list(parallel.run(square, [4, 2, 3], 1)) == [(0, 16), (1, 4), (2, 9)]
