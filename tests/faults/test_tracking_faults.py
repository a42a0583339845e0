"""W&B down, slow, absent or killed: metrics.jsonl is complete and training never waits. The server is local."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlem_diffusion.experiment.tracking import PATIENCE

pytest.importorskip("wandb")
FAULT = "W&B down, slow or absent"
RECORDS = 200
CHILD = f"""
import json, os, signal, sys, time
from pathlib import Path
from mlem_diffusion.experiment.tracking import Tracker

folder, mode, fault, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
if fault == "absent":
    sys.modules["wandb"] = None
started = time.monotonic()
tracker = Tracker(folder, "train", {{"name": "fault"}}, mode=mode)
logging = time.monotonic() - started
pid = tracker.wandb.process.pid if tracker.wandb else None
for k in range({RECORDS}):
    if k == {RECORDS // 2}:
        if fault == "mirror":
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        if fault == "parent":
            time.sleep(moment)
            os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    tracker.log({{"level": "w4", "images": k, "loss": 0.5}})
    logging += time.monotonic() - started
started = time.monotonic()
tracker.finish()
print(json.dumps({{"logging": logging, "finish": time.monotonic() - started, "wandb": "wandb" in sys.modules}}))
"""


def run(
    folder: Path, mode: str, fault: str, moment: float = 0.0, **environment: str
) -> tuple[subprocess.Popen, str, str]:
    """The ended child process, its stdout and its stderr."""
    own = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", CHILD, str(folder / "run"), mode, fault, str(moment)]
    child = subprocess.Popen(
        command, env={**inherited, **own, "WANDB_DIR": str(folder), "WANDB_API_KEY": "a" * 40, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        return child, *child.communicate(timeout=90)
    finally:
        child.kill()


def started_by(folder: Path) -> list[str]:
    """Processes whose environment names the folder: the child and its descendants."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and os.fsencode(folder) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode().replace("\0", " ")[:200])
    return found


def seconds_until_gone(folder: Path, limit: float) -> float:
    started = time.monotonic()
    while started_by(folder) and time.monotonic() - started < limit:
        time.sleep(0.2)
    return time.monotonic() - started


def failures(folder: Path, child: subprocess.Popen, out: str, err: str, warning: str | None) -> str:
    """How the fault broke the promise; empty if it was survived."""
    if child.returncode != 0:
        return f"exit status {child.returncode}: {err[-500:]}"
    seconds, found = json.loads(out), []
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    if [json.loads(line)["images"] for line in lines] != list(range(RECORDS)):
        found.append(f"{len(lines)} records")
    if seconds["logging"] > 1 or seconds["finish"] > PATIENCE + 1 or (seconds["wandb"] and warning != "not installed"):
        found.append(str(seconds))
    warnings_found = [line for line in err.splitlines() if "Warning: " in line]
    if "Traceback" in err or len(warnings_found) != (warning is not None) or (warning or "") not in err:
        found.append(err)
    if seconds_until_gone(folder, 5) > 5:
        found.append(f"still running: {started_by(folder)}")
    return "; ".join(found)


# ---- servers that do not do what they should ---------------------------------------------------------------------


def silent(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def error_500(connection: socket.socket) -> None:
    while b"\r\n\r\n" not in connection.recv(65536):
        pass
    connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def slow_garbage(connection: socket.socket) -> None:
    while True:
        connection.sendall(os.urandom(1))
        time.sleep(1)


@contextlib.contextmanager
def server(behave) -> Iterator[str]:
    """The address of a server that answers as `behave` does."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            behave(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# ---- the faults ----------------------------------------------------------------------------------------------------


def test_no_server_answers(tmp_path: Path, count):
    found = failures(
        tmp_path, *run(tmp_path, "online", "down", WANDB_BASE_URL=closed_port()), "did not finish within 10 s"
    )
    count(5, FAULT, not found, found)


@pytest.mark.parametrize("behave", [silent, error_500, slow_garbage])
def test_a_useless_server(tmp_path: Path, count, whole: bool, behave):
    if not whole:
        pytest.skip("only if FAULTS=whole")
    with server(behave) as address:
        found = failures(tmp_path, *run(tmp_path, "online", "slow", WANDB_BASE_URL=address), "W&B")
    count(5, FAULT, not found, f"{behave.__name__}: {found}")


@pytest.mark.whole
def test_wandb_is_not_installed(tmp_path: Path, count):
    found = failures(tmp_path, *run(tmp_path, "online", "absent"), "not installed")
    count(5, FAULT, not found, found)


@pytest.mark.whole
def test_wandb_cannot_be_imported(tmp_path: Path, count):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no such library')\n")
    found = failures(
        tmp_path, *run(tmp_path, "online", "broken", PYTHONPATH=str(tmp_path / "broken")), "no such library"
    )
    count(5, FAULT, not found, found)


def moments(whole: bool) -> list[float]:
    """Seconds at which to kill the process: while it starts and while it runs."""
    return [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5] if whole else [0.5]


def test_the_wandb_process_is_killed(tmp_path: Path, count, whole: bool):
    for k, moment in enumerate(moments(whole)):
        folder = tmp_path / str(k)
        found = failures(folder, *run(folder, "offline", "mirror", moment), "ended with -9")
        count(5, FAULT, not found, f"killed after {moment} s: {found}")


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_wandb_process_does_not_outlive_a_killed_run(tmp_path: Path, count, whole: bool, mode: str):
    if mode == "online" and not whole:
        pytest.skip("only if FAULTS=whole")
    for k, moment in enumerate(moments(whole) if mode == "offline" else [0.0, 3.0]):
        folder = tmp_path / str(k)
        child, _, err = run(folder, mode, "parent", moment, WANDB_BASE_URL=closed_port())
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        seconds = seconds_until_gone(folder, 20)
        survived = child.returncode == -signal.SIGKILL and len(lines) == RECORDS // 2 and seconds < 15 and not err
        found = f"{len(lines)} records; after {seconds:.1f} s {started_by(folder)}; {err}"
        count(5, FAULT, survived, f"{mode}, run killed after {moment} s: {found}")
