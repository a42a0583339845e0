"""One piece of work over several processes (torchrun): who does what, and how the results come together.

Item i of a list is done by process i % world, and results are put together in the order of the items, so they do not
depend on the number of processes. Objects travel over gloo, on the CPU: initialise torch.distributed with "gloo" or
"cpu:gloo,cuda:nccl". Without a process group there is one process, and nothing here costs anything.

`gather`, `agree`, `from_main` and `deal` are collective: every process must come to the same ones in the same order. A
program that only the main process follows (it reads caches, plots and prints) lets the others `serve`: they do what it
asks them to (`ask`), until it lets them go (`dismiss`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from .errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class Interrupted(Exception):
    """The work was asked to stop, and all processes stopped after the same item."""


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
