"""The exceptions meant for people: their texts are sentences."""

from __future__ import annotations

import errno

import torch


class UserError(Exception):
    """Bad input or a missing artefact; scripts print the text alone and exit with status 2."""


class Interrupted(Exception):
    """The work was asked to stop, and what it had is saved: the same command goes on from there."""


class SlowPath(UserWarning):
    """Something fast did not work and the slow way is taken; the text says what and why in one sentence."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the machine could not give the memory that was asked for. On a CPU torch says so in words only."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return str(error) in _WHOLE or any(word in str(error) for word in _WORDS)
    return isinstance(error, ImportError) and "failed to map segment" in str(error)  # a library that is loaded late


_WORDS = (
    "can't allocate memory",
    "std::bad_alloc",
    "not enough memory",
    "CUDA out of memory",
    "can't start new thread",
)
_WHOLE = ("could not create a primitive", "could not execute a primitive")  # oneDNN; what it cannot do at all says more
