"""One piece of work over several processes (torchrun): who does what, and how the results come together.

Item i of a list is done by process i % world, and results are put together in the order of the items, so they do not
depend on the number of processes. Objects travel over gloo, on the CPU: initialise torch.distributed with "gloo" or
"cpu:gloo,cuda:nccl". Without a process group there is one process, and nothing here costs anything.

`gather`, `agree`, `from_main` and `deal` are collective: every process must come to the same ones in the same order. A
program that only the main process follows (it reads caches, plots and prints) lets the others `serve`: they do what it
asks them to (`ask`), until it lets them go (`dismiss`).

`run_jobs` makes files in batches: dealt out over the processes, and kept batch by batch until the file is whole. A stop loses
at most the batches in flight. The boundaries of batches, and so the results, do not depend on how many processes share them.
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
    """What all processes hold under their numbers, in the order of the numbers, on every process. Arrays must be on the CPU."""
    if world() == 1:
        return dict(sorted(parts.items()))
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, parts)
    return dict(sorted(item for part in found for item in part.items()))


def agree(flag: bool) -> bool:
    """Whether the flag is set on any process, on every process."""
    return any(gather({rank(): bool(flag)}).values())


def from_main(make: Callable[[], T]) -> T:
    """What make() gives on the main process, on every process: only there it is called."""
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
    """work(item) for all items, one per process at a time; take(results by item number) after each such round, in order.

    take is called with the same results on every process. Raises Interrupted between two rounds where should_stop() is
    true on any process.
    """
    for first in range(0, len(items), world()):
        number = first + rank()
        take(gather({number: work(items[number])} if number < len(items) else {}))
        if first + world() < len(items) and agree(should_stop()):
            raise Interrupted(f"stopped as asked after {first + world()} of {len(items)} batches")


# ------------------------------------------------------------------------------- one that leads, others that serve


def ask(function: Callable[..., object], *args: Any) -> None:
    """On the main process: let all others call function(context, *args), as it goes on to do its own part of the same.

    function must be importable by its name, the arguments must pickle; `context` is what each process gave to `serve`.
    """
    if world() > 1:
        if not is_main():
            raise UserError("Only the main process can ask the others to work.")
        from_main(lambda: (function, args))


def serve(context: Any) -> None:
    """On all other processes: do what the main one asks for until it dismisses them."""
    while True:
        order: Any = from_main(lambda: None)
        if order is None:
            return
        function, args = order
        with contextlib.suppress(Interrupted):  # so is the main process, which decides what follows
            function(context, *args)


def dismiss() -> None:
    """On the main process: no more work; `serve` returns on the others."""
    if world() > 1:
        from_main(lambda: None)


# ------------------------------------------------------------------------------- batches that make one file


@dataclass(frozen=True)
class Job:
    """A file made of `count` batches.

    work(i) gives the arrays of batch i, the same names for every batch; write(arrays) makes the file from all of them,
    joined along their first axis in the order of the batches. The name of the file must say what it depends on.
    """

    path: Path
    count: int
    work: Callable[[int], Arrays]
    write: Callable[[Arrays], object]

    def part(self, i: int) -> Path:
        """Where batch i is kept until all are there."""
        return self.path.with_name(f"{self.path.stem}-part{i:06d}.npz")


def run_jobs(
    jobs: Sequence[Job],
    should_stop: Callable[[], bool] = never,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Make the files that are not there yet; files are read and written by the main process alone.

    Collective: every process calls it with the same jobs. progress(job number) is called on the main process once for
    each batch of the unfinished jobs. Raises Interrupted between batches.
    """
    found = [_cached_batches(job) for job in jobs] if is_main() else []
    # numbers of batches; None: the file is there
    cached = from_main(lambda: [None if have is None else sorted(have) for have in found])
    todo = [(j, i) for j, have in enumerate(cached) if have is not None for i in range(jobs[j].count) if i not in have]
    parts: list[dict[int, Arrays]] = [{} for _ in jobs]

    def take(found: dict[tuple[int, int], Arrays]) -> None:
        for (j, i), arrays in found.items():
            parts[j][i] = arrays
            if progress is not None:
                progress(j)
        for j in {j for j, _ in found}:
            _finish_or_keep(jobs[j], parts[j], [i for k, i in found if k == j])

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
    """Of files that are whole: a kill may come between writing these and removing their parts."""
    for part in folder.glob("*-part[0-9]*.npz"):
        if part.with_name(f"{part.stem.rpartition('-part')[0]}.npz").is_file():
            part.unlink()


def _cached_batches(job: Job) -> dict[int, Arrays] | None:
    """The batches that an earlier run kept; None where the whole file is there."""
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


def _finish_or_keep(job: Job, parts: dict[int, Arrays], new: list[int]) -> None:
    """Write the whole file where all batches are there, else the new batches."""
    if len(parts) < job.count:
        for i in new:
            if not job.part(i).is_file():
                write_arrays(job.part(i), parts[i])
        return
    job.write({name: np.concatenate([parts[i][name] for i in range(job.count)]) for name in parts[0]})
    parts.clear()
    for i in range(job.count):
        job.part(i).unlink(missing_ok=True)
