"""Weights & Biases in a separate process, so that the run never waits for it.

`Mirror` is the run's end. The W&B process runs this file by its path, so it imports neither torch nor the package. It
reads JSON lines from standard input until the end. If it fails, it writes the reason to standard output in one line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds for W&B to finish
WAITING = 10_000  # maximal number of lines that wait for W&B


def installed() -> bool:
    try:
        spec = importlib.util.find_spec("wandb")
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # a folder wandb/ with records of runs is no package


class Mirror:
    """The W&B process, started on construction. Raises OSError or RuntimeError if it cannot be started."""

    def __init__(self, options: dict[str, Any]):
        """options: arguments of wandb.init."""
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.send(options)
        command = [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), *sys.argv]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True
        )
        self.feeder = threading.Thread(target=_feed, args=(self.process.stdin, self.lines), daemon=True)
        try:
            self.feeder.start()
        except RuntimeError:
            self._kill()
            raise

    def send(self, line: dict[str, Any]) -> bool:
        """Queue a line without waiting; False if too many lines are queued already."""
        if self.lines.qsize() >= WAITING:
            return False
        self.lines.put((json.dumps(line, default=str) + "\n").encode())
        return True

    def failure(self) -> str | None:
        """The reason why the process has ended, or None while it runs."""
        if self.process.poll() is None:
            return None
        assert self.process.stdout is not None
        message = b"" if self.process.stdout.closed else self.process.stdout.read()
        self._kill()
        return message.decode(errors="replace").strip() or f"its process ended with {self.process.returncode}"

    def finish(self, patience: float) -> str | None:
        """Let the process finish and return the reason of a failure; after `patience` seconds kill it: TimeoutError."""
        until = time.monotonic() + patience
        self.lines.put(None)
        try:
            self.feeder.join(patience)
            status = self.process.wait(max(until - time.monotonic(), 0.01))
            return None if status == 0 else self.failure()
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            self._kill()

    def _kill(self) -> None:
        """Kill the process and all that it started, and close its pipes."""
        if self.process.poll() is None:
            _kill_group(self.process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        self.lines.put(None)
        if self.feeder.is_alive():
            self.feeder.join(1)  # no process reads from its pipe any more
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdout.close()
        if not self.feeder.is_alive():
            self.process.stdin.close()


def _feed(pipe: Any, lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError):  # the process has ended
        while (line := lines.get()) is not None:
            left = memoryview(line)
            while left:
                left = left[pipe.write(left) :]
    pipe.close()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(leader, signal.SIGKILL)
        else:  # Windows
            os.kill(leader, signal.SIGTERM)


# ---- the W&B process -------------------------------------------------------------------------------------------


def main(parent: int, argv: list[str]) -> None:
    here = Path(__file__).resolve().parent
    # otherwise W&B could import modules of this folder
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    sys.argv[:] = argv  # W&B shows the command of a run
    os.environ.setdefault("WANDB_PROGRAM", argv[0] if argv else "")
    for number in (signal.SIGINT, signal.SIGTERM):  # the run decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen = Grouped  # type: ignore[misc]
    lines, report = _detach(0), _detach(1)
    threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    try:
        mirror(iter(os.fdopen(lines, "rb")), parent)
    except BaseException as error:
        text = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
        os.write(report, text.encode())
        _kill_group(os.getpid())
        os._exit(1)


class Grouped(subprocess.Popen):
    """A child process in this process's group, so that one signal ends all: W&B starts its own program."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "start_new_session": False})


def _detach(number: int) -> int:
    """A copy of a file descriptor for this module; W&B gets an empty file in its place."""
    copy, nothing = os.dup(number), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, number)
    os.close(nothing)
    return copy


def _outlive(parent: int) -> None:
    """Once the run has ended, give this process PATIENCE seconds to finish, then end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(PATIENCE)
    _kill_group(os.getpid())


def mirror(lines: Iterator[bytes], parent: int) -> None:
    """Send lines to W&B: first the arguments of wandb.init, then {"log": record} or {"image": {key: path}}."""
    import wandb

    options = json.loads(next(lines, b"null"))
    if options is None:
        return
    settings = wandb.Settings(silent=True, console="off")
    with contextlib.suppress(Exception):  # not every version has this setting
        settings.x_stats_pid = parent  # W&B shows the resource use of this process
    run = wandb.init(**options, settings=settings)
    for line in lines:
        if not line.endswith(b"\n"):
            break  # the run was killed while it wrote this line
        entry = json.loads(line)
        record = entry.get("log", {})
        for key, path in entry.get("image", {}).items():
            with contextlib.suppress(OSError):  # the image was replaced or removed
                record[key] = wandb.Image(path)
        if record:
            run.log(record)
    run.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
