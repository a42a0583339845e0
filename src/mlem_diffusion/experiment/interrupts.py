"""Ctrl-C and SIGTERM: the work may save its state and stop, and is ended after a few seconds.

Finished work stays saved. Before a stage begins, scripts/early_signals.py handles these signals.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

GRACE = 5.0  # seconds that the work has to save its state and stop; after that it is ended
AGAIN = 2.0  # a second signal after this many seconds ends the work at once; launchers often send one signal twice
TRY_AGAIN = 75  # exit status of work that was stopped
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles signals. patient: the work checks `asked` regularly, and has GRACE seconds to stop."""

    def __init__(self) -> None:
        self.asked = 0.0  # time of the first signal; 0 before it
        self.patient = False
        self._before: dict[Any, Any] = {}

    def begin(self, patient: bool = False) -> None:
        """Handle signals from now on."""
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
        """Restore the signal handlers from before `begin`."""
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
    """Ignore signals in a worker: its parent receives them too, and stops the worker."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
