"""Scripts in processes that fork from a prepared one, so that they start within milliseconds and can be killed."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [str(ROOT / name) for name in ("src", "scripts", "tests", "tests/faults")]
PRELOAD = ["torch", "mlem_diffusion.experiment.stage", "train_levels", "sample_compare"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


class Forked:
    """A running script; kill_at: SIGKILL just before the n-th time that a file in `folder` is opened for writing,
    renamed or removed."""

    def __init__(self, script: str, arguments: list[str], folder: Path, kill_at: int = 0):
        before = os.environ.get("PYTHONPATH", "")
        os.environ |= {"PYTHONPATH": os.pathsep.join([*FOLDERS, before]), "OMP_NUM_THREADS": "1"}
        forkserver.ensure_running()
        os.environ["PYTHONPATH"] = before
        self.log = folder / "log"
        work = (script, arguments, str(folder), kill_at)
        self.process: Any = CONTEXT.Process(target=_work, args=work)  # type: ignore[attr-defined]
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit status; minus the signal if it was killed."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.text()}"
        return self.process.exitcode

    def signal_when(self, ready: Callable[[], bool], number: signal.Signals) -> None:
        """Send a signal as soon as ready() is true, unless the script has ended."""
        until = time.monotonic() + 120
        while self.process.is_alive() and not ready() and time.monotonic() < until:
            time.sleep(0.02)
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def text(self) -> str:
        return self.log.read_text()


def _work(script: str, arguments: list[str], folder: str, kill_at: int) -> None:
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ |= {"WANDB_MODE": "disabled", "PYTHONPATH": os.pathsep.join(FOLDERS)}
    sys.path[:0] = FOLDERS
    sys.argv = [f"{script}.py", *arguments]
    main = importlib.import_module(script).main
    if kill_at:
        _kill_at(kill_at, folder)
    main()


def _kill_at(event: int, folder: str) -> None:
    touched = 0

    def hook(name: str, details: tuple) -> None:
        nonlocal touched
        if name not in ("open", "os.rename", "os.remove") or not str(details[0]).startswith(folder):
            return
        if name == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR):
            return
        touched += 1
        if touched == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(grandchild for child in own for grandchild in descendants(child))]
