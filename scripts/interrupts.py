"""Ctrl-C and SIGTERM: the work is asked to stop, and soon ended where it is; what was finished is kept either way.

Importing this in a script answers signals from then on, so it comes before what takes seconds to import.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 5.0  # seconds in which the work may come to a place where it can save its state; then it is ended where it is
AGAIN = 2.0  # seconds after which a second signal means now; launchers often deliver one signal twice
TRY_AGAIN = 75  # exit status of work that was asked to stop
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The work was asked to stop and has saved what it had; exit status 75 (try again)."""


class StopNow(KeyboardInterrupt):
    """The same, in the midst of something: raised by a signal, and no ordinary Exception so that nothing takes it for a failure
    of its own."""


class Interrupts:
    """What signals have asked for. patient: the work looks at `asked` now and then, and is given GRACE seconds."""

    def __init__(self) -> None:
        self.asked = 0.0  # when the first signal came
        self.patient = False
        self._before: dict[Any, Any] = {}

    def begin(self, patient: bool = False) -> None:
        """Answer signals from now on."""
        self.patient = patient
        if threading.current_thread() is not threading.main_thread():
            return
        handlers = {number: self._handle for number in SIGNALS}
        if hasattr(signal, "SIGALRM"):
            handlers[signal.SIGALRM] = self._now
        for number, handler in handlers.items():
            before = signal.signal(number, handler)
            self._before.setdefault(number, before)

    def end(self) -> None:
        """Signals do again what they did before `begin`."""
        if threading.current_thread() is threading.main_thread():
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, before in self._before.items():
                signal.signal(number, before)
            self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self.asked > AGAIN:
                raise KeyboardInterrupt
            return
        self.asked = time.monotonic()
        if not self.patient:
            raise StopNow
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _now(self, number: int, frame: FrameType | None) -> None:
        raise StopNow


def _before_work(number: int, frame: Any) -> None:
    text = f"{Path(sys.argv[0]).stem}: stopped before it began; run the same command again."
    os.write(2, text.encode() + b"\n")
    os._exit(TRY_AGAIN)


def _is_script() -> bool:
    return Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent


def leave_to_parent() -> None:
    """In a worker: its parent is told too, and asks it to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if "__mp_main__" in sys.modules:  # so is the script called in a worker, which imports it while it starts
    leave_to_parent()
elif _is_script():
    for _number in SIGNALS:
        signal.signal(_number, _before_work)
