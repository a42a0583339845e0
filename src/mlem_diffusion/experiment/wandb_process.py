"""Weights & Biases in a process of its own: whatever it waits for, nothing else does.

`Mirror` is this end. The process runs this file, by its path, so that it imports neither torch nor the package: it reads
JSON lines from its standard input until that ends, and says in one line on its standard output why it gives up, if it does.
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

PATIENCE = 10.0  # seconds that W&B has to finish
WAITING = 10_000  # lines that wait for W&B at most


def installed() -> bool:
    try:
        spec = importlib.util.find_spec("wandb")
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # a folder of W&B's runs is no package


class Mirror:
    """Starts the process. Raises OSError or RuntimeError where that cannot be done."""

    def __init__(self, options: dict[str, Any]):
        """options: of wandb.init."""
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
        """False where too many lines wait already. Does not wait itself."""
        if self.lines.qsize() >= WAITING:
            return False
        self.lines.put((json.dumps(line, default=str) + "\n").encode())
        return True

    def failure(self) -> str | None:
        """Why the process has ended, where it has; nothing can be sent then."""
        if self.process.poll() is None:
            return None
        assert self.process.stdout is not None
        said = b"" if self.process.stdout.closed else self.process.stdout.read()
        self._kill()
        return said.decode(errors="replace").strip() or f"its process ended with {self.process.returncode}"

    def finish(self, patience: float) -> str | None:
        """Let the process finish; why it could not, where it could not. TimeoutError after so many seconds: it is killed."""
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
        """With all that it started; its pipes are closed."""
        if self.process.poll() is None:
            _kill_group(self.process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        self.lines.put(None)
        if self.feeder.is_alive():
            self.feeder.join(1)  # nobody reads what it writes any more
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdout.close()
        if not self.feeder.is_alive():
            self.process.stdin.close()


def _feed(pipe: Any, lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError):  # the process is gone
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


# ---- the process -----------------------------------------------------------------------------------------------


def main(parent: int, argv: list[str]) -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]  # else `import data` finds ours
    sys.argv[:] = argv  # W&B shows the command of a run
    os.environ.setdefault("WANDB_PROGRAM", argv[0] if argv else "")
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides when it ends
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen = Grouped  # type: ignore[misc]
    lines, report = _keep(0), _keep(1)
    threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    try:
        mirror(iter(os.fdopen(lines, "rb")), parent)
    except BaseException as error:
        text = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
        os.write(report, text.encode())
        _kill_group(os.getpid())
        os._exit(1)


class Grouped(subprocess.Popen):
    """Stays in this process's group, so that one signal ends all: W&B starts a program of its own."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "start_new_session": False})


def _keep(number: int) -> int:
    """A file of this process, for itself: W&B gets an empty one."""
    kept, nothing = os.dup(number), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, number)
    os.close(nothing)
    return kept


def _outlive(parent: int) -> None:
    """When the other process is gone this one has as long to finish as if it had been asked to."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(PATIENCE)
    _kill_group(os.getpid())


def mirror(lines: Iterator[bytes], parent: int) -> None:
    """The first line: options of wandb.init; every other one: {"log": record} or {"image": {key: path}}."""
    import wandb

    options = json.loads(next(lines, b"null"))
    if options is None:
        return
    settings = wandb.Settings(silent=True, console="off")
    with contextlib.suppress(Exception):  # not every version knows it
        settings.x_stats_pid = parent  # whose use of the machine W&B shows
    run = wandb.init(**options, settings=settings)
    for line in lines:
        if not line.endswith(b"\n"):
            break  # the other process was killed while it wrote this
        entry = json.loads(line)
        record = entry.get("log", {})
        for key, path in entry.get("image", {}).items():
            with contextlib.suppress(OSError):  # it has been replaced or removed
                record[key] = wandb.Image(path)
        if record:
            run.log(record)
    run.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
