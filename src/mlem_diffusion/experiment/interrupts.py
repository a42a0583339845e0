"""Ctrl-C and SIGTERM: the work is asked to stop, and soon ended where it is; what was finished is kept either way.

Until a stage begins, scripts/early_signals.py answers them.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

GRACE = 5.0  # seconds in which the work may come to a place where it can save its state; then it is ended where it is
AGAIN = 2.0  # seconds after which a second signal means now; launchers often deliver one signal twice
TRY_AGAIN = 75  # exit status of work that was asked to stop
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
            raise KeyboardInterrupt
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _now(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


def leave_to_parent() -> None:
    """In a worker: its parent is told too, and asks it to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
