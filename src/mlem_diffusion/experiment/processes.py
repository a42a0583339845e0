"""A script as one of several processes (launch.py or torchrun): its GPU, and a common end of all processes."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from .. import parallel
from ..errors import UserError

FAILED, LEFT = "mlem-diffusion/failed", "mlem-diffusion/left"  # counters that all processes see
PATIENCE = 30.0  # seconds for the other processes to notice that one has failed


def count() -> int:
    """The number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def own_gpu() -> torch.device:
    """This process's GPU; UserError if there are fewer GPUs than processes."""
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', count())} processes need as many GPUs, but this machine has {gpus}: "
            "start fewer processes (NPROC)."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


class Watch:
    """Ends all processes after an error on one of them; the others may be blocked in a collective operation."""

    def __init__(self) -> None:
        # a separate connection: that of torch.distributed may be blocked by another process
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.over.wait(0.25):
            try:
                failed = self.store.add(FAILED, 0) > 0
            except Exception:  # the process that holds the store has ended
                failed = True
            if failed and not self.over.is_set():
                self.leave(2)

    def stop(self) -> None:
        self.over.set()
        self.thread.join()

    def first_to_fail(self) -> bool:
        self.over.set()
        try:
            return self.store.add(FAILED, 1) == 1
        except Exception:
            return False

    def leave(self, status: int) -> NoReturn:
        """End this process at once, because an orderly exit could wait for processes that have ended.

        The main process holds the store, so it ends last.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            if is_main():
                until = time.monotonic() + PATIENCE
                while self.store.add(LEFT, 0) < count() - 1 and time.monotonic() < until:
                    time.sleep(0.05)
            else:
                self.store.add(LEFT, 1)
        finally:
            os._exit(status)


def together(work: Callable[[], None], report: Callable[[BaseException], int], stopped: type[Exception]) -> None:
    """Run work() as one of several processes.

    An error on any process ends all. The first one that fails calls report(error), which returns the exit status.
    An exception of type `stopped` occurs on all processes, after the same step, and is raised again.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # gloo transfers Python objects
        # a process waits for the slowest batch, and for work that only the main process does
        dist.init_process_group(backend, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    watch = Watch()
    end: Exception | None = None
    try:
        try:
            work()
        except stopped as error:
            end = error
        parallel.agree(True)  # no process ends while another one still saves
        watch.stop()
        parallel.agree(True)  # nor while another one reads the store
    except BaseException as error:
        watch.leave(report(error) if watch.first_to_fail() else 2)
    if end is not None:
        raise end
