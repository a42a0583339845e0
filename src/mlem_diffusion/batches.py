"""Work in batches that makes one file: dealt out over the processes, and kept batch by batch until the file is whole.

A stop loses at most the batches in flight. The boundaries of batches, and so the results, do not depend on how many
processes share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import shards
from .files import Damaged, make_again, read_arrays, write_arrays

Arrays = dict[str, np.ndarray]


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


def run(
    jobs: Sequence[Job],
    should_stop: Callable[[], bool] = shards.never,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Make the files that are not there yet; files are read and written by the main process alone.

    Collective: every process calls it with the same jobs. progress(job number) is called on the main process once for
    each batch of the unfinished jobs. Raises shards.Interrupted between batches.
    """
    found = [_kept(job) for job in jobs] if shards.is_main() else []
    # numbers of batches; None: the file is there
    kept = shards.from_main(lambda: [None if have is None else sorted(have) for have in found])
    todo = [(j, i) for j, have in enumerate(kept) if have is not None for i in range(jobs[j].count) if i not in have]
    parts: list[dict[int, Arrays]] = [{} for _ in jobs]

    def take(found: dict[tuple[int, int], Arrays]) -> None:
        for (j, i), arrays in found.items():
            parts[j][i] = arrays
            if progress is not None:
                progress(j)
        for j in {j for j, _ in found}:
            _finish_or_keep(jobs[j], parts[j], [i for k, i in found if k == j])

    if shards.is_main():
        for j, have in enumerate(found):
            take({(j, i): arrays for i, arrays in (have or {}).items()})
    shards.deal(
        todo,
        lambda item: jobs[item[0]].work(item[1]),
        lambda found: take({todo[n]: arrays for n, arrays in found.items()}) if shards.is_main() else None,
        should_stop,
    )


def remove_parts(folder: Path) -> None:
    """Of files that are whole: a kill may come between writing these and removing their parts."""
    for part in folder.glob("*-part[0-9]*.npz"):
        if part.with_name(f"{part.stem.rpartition('-part')[0]}.npz").is_file():
            part.unlink()


def _kept(job: Job) -> dict[int, Arrays] | None:
    """The batches that an earlier run kept; None where the whole file is there."""
    if job.path.is_file():
        return None
    found = {}
    for i in range(job.count):
        if job.part(i).is_file():
            try:
                found[i] = read_arrays(job.part(i), "remove it")
            except Damaged as error:
                make_again(error)
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
