"""Progress bars with rate and time left."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

from .. import parallel
from ..errors import Interrupted


class bar:
    """A progress bar that is also a callback (done, total); the call raises Interrupted if the work should stop.

    disable: None is silent unless on a terminal; ranks other than 0 are always silent.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "img",
        should_stop: Callable[[], bool] = parallel.never,
        disable: bool | None = False,
        position: int | None = None,
    ):
        self.should_stop = should_stop
        self.tqdm = tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,  # a log file needs few lines
            leave=False,
            position=position,
            disable=disable if parallel.is_main() else True,
        )

    def __enter__(self) -> bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.tqdm.close()

    def __call__(self, done: int, total: int) -> None:
        self.tqdm.total = total
        self.tqdm.update(done - self.tqdm.n)
        if done < total and self.should_stop():
            raise Interrupted("stopped; finished work is saved")
