"""Exceptions and warnings for users; their texts are sentences."""

import errno

import torch


class UserError(Exception):
    """Bad input or a missing artefact; scripts print only the text and exit with status 2."""


class Interrupted(Exception):
    """The work stopped on request and saved its progress; the same command resumes it."""


class SlowPath(UserWarning):
    """A fast method failed and a slow one replaces it; the text is one sentence with the method and the reason."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the machine ran out of memory. On a CPU, torch reports this only in the error text."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return str(error) in _EXACT or any(word in str(error) for word in _WORDS)
    return isinstance(error, ImportError) and "failed to map segment" in str(error)  # a library loaded on first use


_WORDS = (
    "can't allocate memory",
    "std::bad_alloc",
    "not enough memory",
    "CUDA out of memory",
    "can't start new thread",
)
# oneDNN; its messages for unsupported operations begin alike but are longer
_EXACT = ("could not create a primitive", "could not execute a primitive")

# messages for errors of the operating system
SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk cannot be written",
    errno.EACCES: "a file may not be read or written",
    errno.EPERM: "a file may not be read or written",
    errno.EIO: "the disk has an input/output error",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
}
