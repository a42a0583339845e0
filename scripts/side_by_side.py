"""Independent pieces of work in several processes: narrow networks leave all but one core of a CPU idle."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist

stop_requested: Callable[[], bool] = bool  # in a worker: whether the parent asked it to stop


def worker_count(workers: Any, device: torch.device, tasks: int) -> int:
    """The `workers` of the configuration; "auto": one per CPU core without a GPU, else one. Always one where torchrun's
    processes share the work."""
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
    """function(*task) for every task, `workers` at a time, in order; the first error stops the others and is raised.

    function must be importable; it should look at `stop_requested` now and then. on_done(task) runs in this process.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (stop, threads_per_worker(workers))) as pool:
        futures = {pool.submit(function, *task): task for task in tasks}
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
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the parent too, which asks the workers
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
