"""Ctrl-C and SIGTERM set a flag; the work saves its state and stops, or is ended after a few seconds."""

import signal
import threading
import time
from typing import Any

from .. import parallel

GRACE = 5.0  # seconds to save and stop
TWICE = 2.0  # launchers often send one signal twice within this time
STOPPED = 75  # exit status of work that was stopped

_asked = 0.0  # time of the first signal


def catch() -> None:
    """Handle SIGINT and SIGTERM from now on."""
    global _asked
    _asked = 0.0
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _end)


def release() -> None:
    """Restore Python's own handlers."""
    if threading.current_thread() is threading.main_thread():
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def asked() -> bool:
    """Whether a signal asked this process, or its parent, to stop."""
    return bool(_asked) or parallel.stop_requested()


def _handle(number: int, frame: Any) -> None:
    global _asked
    if not _asked:
        _asked = time.monotonic()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE)
    elif time.monotonic() - _asked > TWICE:
        raise KeyboardInterrupt


def _end(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
