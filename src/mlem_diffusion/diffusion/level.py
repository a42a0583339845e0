"""Levels: denoisers of increasing accuracy and cost. Any callable can be a level; a family is a list of levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Level:
    """One denoiser f^k.

    denoise maps (x [B,C,H,W], logsnr) to the denoised image [B,C,H,W], for x = alpha x0 + sigma eps with
    alpha^2 = sigmoid(logsnr). logsnr is 0-dimensional if all samples share it, else [B]. flops is the cost of one
    evaluation of one image, in FLOPs or another common unit.
    """

    name: str
    denoise: Callable[[Tensor, Tensor], Tensor]
    flops: float


def check_family(levels: Sequence[Level]) -> None:
    """Raise UserError unless the levels have distinct names and strictly increasing, positive cost."""
    if not levels:
        raise UserError("A family needs at least one level.")
    if len({level.name for level in levels}) < len(levels):
        raise UserError(f"Levels need distinct names, not {', '.join(level.name for level in levels)}.")
    costs = [level.flops for level in levels]
    if costs[0] <= 0 or any(b <= a for a, b in pairwise(costs)):
        raise UserError("The levels of a family must be ordered by cost, from cheap to expensive, all above zero.")
