"""Work shared by processes: torchrun's ranks (one per GPU), and joblib's workers on a CPU.
Under torchrun every rank runs the whole program. Rank i of n takes the items i, i + n, ... of a list, and the ranks
meet at a barrier. Batches and seeds do not depend on the number of ranks, and so neither do the results."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from .errors import Interrupted, UserError

T = TypeVar("T")
PATIENCE = 120.0  # seconds for all ranks to meet


def connect(should_stop: Callable[[], bool]) -> None:
    """Meet the other ranks, if torchrun's variables in the environment say that there are any.
    UserError for a missing or wrong variable, or ranks later than PATIENCE; Interrupted if should_stop() is true."""
    ranks = _variable("WORLD_SIZE", 1, default="1")
    if ranks == 1 or dist.is_initialized():
        return
    local = [("LOCAL_RANK", ranks - 1)] if torch.cuda.is_available() else []  # which GPU is this process's own
    for name, highest in (("RANK", ranks - 1), *local, ("MASTER_PORT", 65535)):
        _variable(name, 0, highest)
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise UserError(f"The environment variable MASTER_ADDR is not set: {_CURE}.")
    failed: list[str] = []

    def meet() -> None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # gloo transfers Python objects
        try:
            dist.init_process_group(backend, timeout=timedelta(days=7))  # one rank may do hours of work alone
        except Exception as error:
            failed.append(str(error).partition("\n")[0])

    meeting = threading.Thread(target=meet, daemon=True)  # torch does not hear signals while it waits
    meeting.start()
    until = time.monotonic() + PATIENCE
    while meeting.is_alive() and not failed:
        meeting.join(0.1)
        if should_stop():
            raise Interrupted(f"stopped while waiting for {ranks} processes (WORLD_SIZE)")
        if time.monotonic() > until:
            failed.append(f"not all came within {PATIENCE:g} s")
    if failed:
        where = f"{address}:{os.environ['MASTER_PORT']}"
        raise UserError(f"WORLD_SIZE={ranks} processes could not meet at {where} ({failed[0]}): {_CURE}.")


_CURE = "start with NPROC=2 (torchrun), or unset WORLD_SIZE"


def _variable(name: str, lowest: int, highest: int = 65535, default: str | None = None) -> int:
    """The whole number in a variable of the environment."""
    text = os.environ.get(name, default)
    with contextlib.suppress(ValueError):
        if text is not None and lowest <= int(text) <= highest:
            return int(text)
    found = "is not set" if text is None else f"is {text!r}, not a number from {lowest} to {highest}"
    raise UserError(f"The environment variable {name} {found}: {_CURE}.")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of torchrun's processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    gather({})


def mine(items: Sequence[T]) -> Sequence[T]:
    """The items of this rank."""
    return items[rank() :: world()]


def gather(parts: dict[int, T]) -> dict[int, T]:
    """The numbered parts of all ranks, sorted by number, on every rank. Arrays must be on the CPU."""
    found: list[Any] = [parts]
    if world() > 1:
        found = [None] * world()
        dist.all_gather_object(found, parts)
    return dict(sorted(item for part in found for item in part.items()))


def agree(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer."""
    return any(gather({rank(): bool(flag)}).values())


def never() -> bool:
    return False


_stop = threading.Event()
stop_requested = _stop.is_set  # in a worker: whether its parent asked it to save and stop


def run(
    function: Callable[[T], Any], items: Sequence[T], workers: int = 1, should_stop: Callable[[], bool] = never
) -> Iterator[tuple[int, Any]]:
    """Yield (index, function(item)) as they finish, from this process or from `workers` processes side by side.
    function must be importable; long work in it should look at `stop_requested`. The first error stops all. Raises
    Interrupted between items if should_stop() is true, UserError if a worker was killed."""
    if workers <= 1:
        for index, item in enumerate(items):
            yield index, function(item)
            _check(should_stop, len(items) - index - 1)
        return
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # it reports what killed workers left
    threads = max(1, torch.get_num_threads() // workers)
    tasks = [delayed(_work)(function, index, item, threads, os.getpid()) for index, item in enumerate(items)]
    watch = threading.Thread(target=_pass_on, args=(should_stop, done := threading.Event()), daemon=True)
    watch.start()
    left = len(items)
    try:
        options: Any = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": workers}
        options["max_nbytes"] = None  # no files in /dev/shm or TMPDIR, which containers keep small
        for found in Parallel(workers, **options)(tasks):
            left -= 1
            yield found  # pyright: ignore[reportReturnType]
            _check(should_stop, left)
    except TerminatedWorkerError as error:
        _check(should_stop, left)
        text = "A worker process was killed, perhaps because memory ran out: run the same command again to continue"
        raise UserError(f"{text}, with ARGS=workers=1 if memory is short.") from error
    except BaseException as error:
        _ask_to_stop()
        # killing is safe: they write files atomically
        get_reusable_executor().shutdown(wait=True, kill_workers=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        done.set()


def _check(should_stop: Callable[[], bool], left: int) -> None:
    if left and should_stop():
        raise Interrupted("stopped; finished work is saved")


def _pass_on(should_stop: Callable[[], bool], done: threading.Event) -> None:
    """Ask the workers to stop when this process should stop."""
    while not done.wait(0.2):
        if should_stop():
            _ask_to_stop()
            return


def _ask_to_stop() -> None:
    for worker in multiprocessing.active_children():
        worker.terminate()  # SIGTERM


def _work(function: Callable[[Any], Any], index: int, item: Any, threads: int, parent: int) -> tuple[int, Any]:
    _become_worker(parent)
    torch.set_num_threads(threads)
    return index, function(item)


_is_worker = False


def _become_worker(parent: int) -> None:
    """Once per worker: SIGTERM sets a flag, Ctrl-C and SIGHUP are the parent's, and the worker ends with its parent."""
    global _is_worker
    if _is_worker or os.getpid() == parent:  # joblib works here without /dev/shm
        return
    _is_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # a killed parent's worker must not work beside the next run

    threading.Thread(target=watch, daemon=True).start()
