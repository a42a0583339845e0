"""Out-of-memory errors are distinguished from other failures."""

import pytest
import torch

from mlem_diffusion.errors import is_out_of_memory


def test_a_refused_allocation_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("can't allocate memory"), False),
        (None, False),
    ],
)
def test_kinds(error, expected):
    assert is_out_of_memory(error) is expected
