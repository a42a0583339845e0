"""Work shared by several processes (torchrun): who does what, and how the results are combined.

Process i % world works on item i of a list. The results are combined in the order of the items, so they do not depend
on the number of processes. Objects are sent over gloo, on the CPU: initialise torch.distributed with "gloo" or
"cpu:gloo,cuda:nccl". Without a process group there is one process and no overhead.

`gather`, `agree`, `from_main` and `deal` are collective: all processes must call them in the same order. In a program
that only the main process runs (it reads caches, plots and prints), the other processes `serve`. They call the
functions that the main process sends with `ask`, until it calls `dismiss`.

`run_jobs` makes files from batches. Each batch is cached until the file is complete, so a stop loses at most the
batches in progress. The boundaries of the batches, and so the results, do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from .errors import Interrupted, UserError
from .files import Damaged, discard_damaged, read_arrays, write_arrays

Arrays = dict[str, np.ndarray]

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def never() -> bool:
    return False


def gather(parts: dict[int, T]) -> dict[int, T]:
    """The numbered parts of all processes, sorted by number, on every process. Arrays must be on the CPU."""
    if world() == 1:
        return dict(sorted(parts.items()))
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, parts)
    return dict(sorted(item for part in found for item in part.items()))


def agree(flag: bool) -> bool:
    """Whether the flag is set on any process; all processes get the same answer."""
    return any(gather({rank(): bool(flag)}).values())


def from_main(make: Callable[[], T]) -> T:
    """The result of make() on every process; only the main process calls it."""
    if world() == 1:
        return make()
    box = [make() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def deal(
    items: Sequence[T],
    work: Callable[[T], R],
    take: Callable[[dict[int, R]], object],
    should_stop: Callable[[], bool] = never,
) -> None:
    """Call work(item) for all items, one per process in each round, and take(results by item number) after each round.

    take gets the same results on all processes. Raises Interrupted between rounds if should_stop() is true on one.
    """
    for first in range(0, len(items), world()):
        number = first + rank()
        take(gather({number: work(items[number])} if number < len(items) else {}))
        if first + world() < len(items) and agree(should_stop()):
            raise Interrupted(f"stopped on request after {first + world()} of {len(items)} batches")


# ------------------------------------------------------------------- one process leads, the others serve


def ask(function: Callable[..., object], *args: Any) -> None:
    """Make all other processes call function(context, *args); only the main process may call this.

    The main process then does its own part of the work. function must be importable by its name and the arguments must
    be picklable. `context` is the argument that each process passed to `serve`.
    """
    if world() > 1:
        if not is_main():
            raise UserError("Only the main process can ask the others to work.")
        from_main(lambda: (function, args))


def serve(context: Any) -> None:
    """Call the functions that the main process sends until it calls `dismiss`; for all other processes."""
    while True:
        order: Any = from_main(lambda: None)
        if order is None:
            return
        function, args = order
        with contextlib.suppress(Interrupted):  # it also stops the main process, which decides what follows
            function(context, *args)


def dismiss() -> None:
    """End the work of the other processes: `serve` returns on them. Only for the main process."""
    if world() > 1:
        from_main(lambda: None)


# ------------------------------------------------------------------------------- batches that make one file


@dataclass(frozen=True)
class Job:
    """A file made of `count` batches.

    work(i) returns the arrays of batch i, with the same names for all batches. write(arrays) makes the file from all
    batches, joined along their first axis in order. The file name must identify all inputs of the file.
    """

    path: Path
    count: int
    work: Callable[[int], Arrays]
    write: Callable[[Arrays], object]

    def part(self, i: int) -> Path:
        """The file that caches batch i until all batches are complete."""
        return self.path.with_name(f"{self.path.stem}-part{i:06d}.npz")


def run_jobs(
    jobs: Sequence[Job],
    should_stop: Callable[[], bool] = never,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Make the missing files; only the main process reads and writes files.

    Collective: every process calls it with the same jobs. progress(job number) is called on the main process once for
    each batch of the unfinished jobs. Raises Interrupted between batches.
    """
    found = [_cached_batches(job) for job in jobs] if is_main() else []
    # numbers of the cached batches; None if the file exists
    cached = from_main(lambda: [None if have is None else sorted(have) for have in found])
    todo = [(j, i) for j, have in enumerate(cached) if have is not None for i in range(jobs[j].count) if i not in have]
    parts: list[dict[int, Arrays]] = [{} for _ in jobs]

    def take(found: dict[tuple[int, int], Arrays]) -> None:
        for (j, i), arrays in found.items():
            parts[j][i] = arrays
            if progress is not None:
                progress(j)
        for j in {j for j, _ in found}:
            _write_or_cache(jobs[j], parts[j], [i for k, i in found if k == j])

    if is_main():
        for j, have in enumerate(found):
            take({(j, i): arrays for i, arrays in (have or {}).items()})
    deal(
        todo,
        lambda item: jobs[item[0]].work(item[1]),
        lambda found: take({todo[n]: arrays for n, arrays in found.items()}) if is_main() else None,
        should_stop,
    )


def remove_parts(folder: Path) -> None:
    """Remove the cached batches of complete files; a kill can come between writing a file and removing its batches."""
    for part in folder.glob("*-part[0-9]*.npz"):
        if part.with_name(f"{part.stem.rpartition('-part')[0]}.npz").is_file():
            part.unlink()


def _cached_batches(job: Job) -> dict[int, Arrays] | None:
    """The batches that an earlier run cached; None if the complete file exists."""
    if job.path.is_file():
        return None
    found = {}
    for i in range(job.count):
        if job.part(i).is_file():
            try:
                found[i] = read_arrays(job.part(i), "remove it")
            except Damaged as error:
                discard_damaged(error)
    return found


def _write_or_cache(job: Job, parts: dict[int, Arrays], new: list[int]) -> None:
    """Write the complete file if all batches exist, else cache the new batches."""
    if len(parts) < job.count:
        for i in new:
            if not job.part(i).is_file():
                write_arrays(job.part(i), parts[i])
        return
    job.write({name: np.concatenate([parts[i][name] for i in range(job.count)]) for name in parts[0]})
    parts.clear()
    for i in range(job.count):
        job.part(i).unlink(missing_ok=True)
