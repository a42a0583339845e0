"""FLOPs of one evaluation of a network, counted on the meta device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_flops(network: nn.Module, *inputs: Tensor, **keywords: Any) -> float:
    """Return the FLOPs of one call with tensors on the meta device, where fused attention counts too.

    A multiply-add counts 2; norms and activations count 0.
    """
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(network, meta, inputs, keywords)
    return float(counter.get_total_flops())


def flops_per_evaluation(network: nn.Module, size: int, channels: int = 3) -> float:
    """Return the FLOPs of one forward pass on one [channels, size, size] image and its log-SNR."""
    return count_flops(network, torch.empty(1, channels, size, size, device="meta"), torch.empty(1, device="meta"))
