"""Run a script in several processes, one per GPU: python scripts/launch.py 8 scripts/sample.py experiment=celeba64

The processes get the same environment as under `torchrun --standalone`, which works as well. With this launcher an
error ends in one sentence and its exit status. A stopped process may finish its batch; torchrun kills it after 30
seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

PATIENCE = 60.0  # seconds for the other processes to end after one has failed


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count)), **os.environ}
    return {**threads, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(count: int, command: list[str]) -> int:
    """Run `count` processes; return the first nonzero exit status in the order of ranks, else 0."""
    port = free_port()
    started = [subprocess.Popen(command, env=environment(rank, count, port)) for rank in range(count)]

    def forward(number: int, frame: Any) -> None:
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    failed_at = None
    while any(process.poll() is None for process in started):
        time.sleep(0.05)
        if failed_at is None and any(process.returncode for process in started):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
            for process in started:
                process.kill()
    status = next((process.returncode for process in started if process.returncode), 0)
    return status if status >= 0 else 128 - status  # after a signal, as in the shell


def main() -> None:
    if len(sys.argv) < 3 or not sys.argv[1].isdigit() or int(sys.argv[1]) < 1:
        sys.exit("usage: python scripts/launch.py PROCESSES SCRIPT [OVERRIDE ...]")
    sys.exit(run(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]))


if __name__ == "__main__":
    main()
