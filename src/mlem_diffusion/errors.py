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
        return str(error) in _EXACT or any(word in str(error) for word in _PART)
    return isinstance(error, ImportError) and "failed to map segment" in str(error)  # a library loaded on first use


_PART = ("can't allocate memory", "std::bad_alloc", "not enough memory", "CUDA out of memory", "can't start new thread")
# oneDNN; its messages for unsupported operations begin alike but are longer
_EXACT = ("could not create a primitive", "could not execute a primitive")

# errors of the operating system that the user can mend: disk full or read-only, no permission, a limit on files
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
SYSTEM_ERRORS = (*_DISK, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
