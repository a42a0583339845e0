"""Independent tasks in several processes: narrow networks leave all but one core of a CPU idle."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch
import torch.distributed as dist

from ..errors import Interrupted, UserError
from . import interrupts

stop_requested: Callable[[], bool] = bool  # in a worker: whether its parent has requested a stop


def worker_count(workers: Any, device: torch.device, tasks: int) -> int:
    """The number of worker processes. "auto": one per CPU core without a GPU, else one.

    Always one if torchrun's processes share the work.
    """
    if dist.is_initialized():
        return 1
    if workers != "auto":
        return int(workers)
    return 1 if device.type != "cpu" else min(tasks, torch.get_num_threads())


def threads_per_worker(workers: int) -> int:
    return max(1, torch.get_num_threads() // workers)


def run(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    workers: int,
    should_stop: Callable[[], bool],
    on_done: Callable[[tuple], object] | None = None,
) -> None:
    """Run function(*task) for every task in order, `workers` at a time; the first error stops the others and is raised.

    function must be importable and should check `stop_requested` regularly. on_done(task) runs in this process.
    Raises UserError if a worker is killed.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (stop, threads_per_worker(workers))) as pool:
        try:
            _collect(_submit(pool, function, tasks), stop, should_stop, on_done)
        except BrokenProcessPool as error:
            if should_stop():
                raise Interrupted("stopped; finished work is saved") from error
            raise UserError(
                "A worker process was killed, perhaps because memory ran out: run the same command again to continue, "
                "with ARGS=workers=1 if memory is short."
            ) from error
        except Exception:  # _collect has already stopped the other workers
            raise
        except BaseException:
            kill_workers()
            raise


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: Sequence[tuple]) -> dict[Any, tuple]:
    """Submit the tasks and return them by future; BrokenProcessPool if a worker dies while workers are started."""
    try:
        return {pool.submit(function, *task): task for task in tasks}
    except OSError as error:
        if error.errno not in (None, errno.EPIPE, errno.EBADF):
            raise
        raise BrokenProcessPool(str(error)) from error


def _collect(
    futures: dict[Any, tuple], stop: Any, should_stop: Callable[[], bool], on_done: Callable[[tuple], object] | None
) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
        if should_stop():
            stop.set()
        for future in done:
            error = future.exception()
            if error is not None:
                stop.set()
                wait([other for other in pending if not other.cancel()])
                raise error
            if on_done is not None:
                on_done(futures[future])


def _start_worker(stop: Any, threads: int) -> None:
    global stop_requested
    stop_requested = stop.is_set
    begin_worker()
    torch.set_num_threads(threads)


def begin_worker() -> None:
    """Prepare a worker: it ignores signals, and ends when its parent ends."""
    interrupts.leave_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def kill_workers() -> None:
    """Kill all workers at once. This is safe because they write every file atomically."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _end_with_parent() -> None:
    """End this worker when its parent is killed, so that it does not work beside the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(interrupts.TRY_AGAIN)
