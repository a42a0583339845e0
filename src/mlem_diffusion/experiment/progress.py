"""Progress bars, and the signals that stop a run.

Ctrl-C and SIGTERM set a flag; the work saves its state and stops, or is ended after a few seconds."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .. import parallel
from ..errors import Interrupted

GRACE = 5.0  # seconds to save and stop

_asked = False


class bar(tqdm):
    """A bar on rank 0, which is also a callback (done, total) that raises Interrupted if the work should stop."""

    def __init__(
        self, label: str, total: int | None, unit: str = "img", should_stop: Callable[[], bool] = parallel.never,
        position: int | None = None,
    ):  # fmt: skip
        self.should_stop = should_stop
        seconds = 1.0 if sys.stderr.isatty() else 30.0  # a log file needs few lines
        super().__init__(
            total=total, desc=label, unit=unit, position=position, unit_scale=True, dynamic_ncols=True, leave=False,
            mininterval=seconds, disable=not parallel.is_main(),
        )  # fmt: skip

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        self.update(done - self.n)
        if done < total and self.should_stop():
            raise Interrupted("stopped; finished work is saved")


def catch_signals() -> None:
    """Handle SIGINT and SIGTERM from now on."""
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGALRM, _end)


def release_signals() -> None:
    """Restore Python's own handlers."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_asked() -> bool:
    """Whether a signal asked this process, or its parent, to stop."""
    return _asked or parallel.stop_requested()


def _stop(number: int, frame: Any) -> None:
    global _asked
    if not _asked:  # launchers often send a signal twice
        _asked = True
        signal.setitimer(signal.ITIMER_REAL, GRACE)


def _end(number: int, frame: Any) -> None:
    release_signals()  # a further signal ends the process at once
    raise KeyboardInterrupt
