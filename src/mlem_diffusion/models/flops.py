"""FLOPs of one evaluation of a network."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_per_evaluation(network: nn.Module, size: int, channels: int = 3) -> float:
    """Return the FLOPs (a multiply-add counts 2) of one forward pass on one [channels, size, size] image.

    They are counted on the meta device, because on the CPU the counter misses fused attention. Norms and activations
    count 0.
    """
    network = copy.deepcopy(network).to("meta").eval()
    x, logsnr = torch.empty(1, channels, size, size, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, logsnr)
    return float(counter.get_total_flops())
