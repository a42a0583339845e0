"""Telling want of memory from other failures."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the machine could not give the memory that was asked for. On a CPU torch says so in words only."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "std::bad_alloc", "not enough memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
