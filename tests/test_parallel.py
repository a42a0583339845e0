"""Work shared by workers on a CPU, and ranks that do not come; test_training_loop.py has two of torchrun's ranks."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlem_diffusion import parallel
from mlem_diffusion.errors import Interrupted, UserError
from mlem_diffusion.experiment.config import set_up_device
from mlem_diffusion.experiment.stage import guarded, report

RANK = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


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
def test_results_come_with_their_index_and_the_first_error_stops_all(workers: int):
    assert sorted(parallel.run(square, [4, 2, 3], workers)) == [(0, 16), (1, 4), (2, 9)]
    with pytest.raises(UserError, match="unlucky"):
        list(parallel.run(square, [1, 13, 2], workers))


def test_a_stop_between_items_is_an_interruption():
    done = []
    with pytest.raises(Interrupted):
        for index, _ in parallel.run(square, [1, 2, 3], 1, lambda: len(done) == 1):
            done.append(index)
    assert done == [0]


def test_a_worker_is_asked_to_save_and_stop(tmp_path: Path):
    with pytest.raises(Interrupted):
        list(parallel.run(slow, [str(tmp_path)] * 4, 2, lambda: len(list(tmp_path.glob("begun-*"))) == 2))
    assert (tmp_path / "saved").exists()


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match="was killed"):
        list(parallel.run(end, [1, 2], 2))


def test_one_process_needs_no_group():
    assert (parallel.rank(), parallel.world(), parallel.is_main()) == (0, 1, True)
    assert parallel.gather({2: "b", 1: "a"}) == {1: "a", 2: "b"}
    assert parallel.agree(True) and not parallel.agree(False)
    assert parallel.mine([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "2"), ("LOCAL_RANK", "x"),
     ("RANK", None), ("MASTER_ADDR", None), ("MASTER_ADDR", ""), ("MASTER_PORT", "70000")],
)  # fmt: skip
def test_a_wrong_variable_of_torchrun_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None):
    for key, text in {**RANK, name: value}.items():
        monkeypatch.delenv(key, raising=False) if text is None else monkeypatch.setenv(key, text)
    with pytest.raises(SystemExit) as ended:
        guarded("train", lambda: None)
    assert ended.value.code == 2


def rank_alone(log: Path) -> None:
    sys.stderr = log.open("w")
    guarded("train", lambda: None)


@pytest.mark.parametrize(
    ("patience", "number", "status", "sentence"),
    [(0.3, None, 2, "unset WORLD_SIZE"), (60, signal.SIGTERM, 75, "waiting for 2"), (60, signal.SIGINT, 75, "again")],
)
def test_a_rank_whose_peers_do_not_come_ends(tmp_path, monkeypatch, patience, number, status, sentence):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for key, text in {**RANK, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setattr(parallel, "PATIENCE", patience, raising=False)
    alone = multiprocessing.get_context("fork").Process(target=rank_alone, args=(tmp_path / "log",))
    alone.start()
    try:
        while number is not None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except ConnectionRefusedError:  # it does not wait yet
                time.sleep(0.05)
            else:
                os.kill(alone.pid or 0, number)
                break
        alone.join(10)
        assert alone.exitcode == status and sentence in (tmp_path / "log").read_text()
    finally:
        alone.kill()


def test_a_peer_that_died_is_one_sentence(capsys):
    assert report("train", RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer")) == 75
    assert capsys.readouterr().err.count("\n") == 1


def test_threads_fit_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # stands for the limit of a container
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    set_up_device(SimpleNamespace(device="cpu", threads=None, autotune=True), training=False)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
