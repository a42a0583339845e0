"""FLOPs of one evaluation of a network, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_flops(network: nn.Module, *inputs: Tensor, keywords: Mapping[str, Any] | None = None) -> float:
    """Return the FLOPs of network(*inputs, **keywords) for tensors on the meta device; the network is left alone.

    A multiply-add counts 2; norms and activations count 0. On the CPU the counter would miss fused attention.
    """
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(network, meta, inputs, dict(keywords or {}))
    return float(counter.get_total_flops())


def flops_per_evaluation(network: nn.Module, size: int, channels: int = 3) -> float:
    """Return the FLOPs of one forward pass on one [channels, size, size] image and its log-SNR."""
    x, logsnr = torch.empty(1, channels, size, size, device="meta"), torch.empty(1, device="meta")
    return count_flops(network, x, logsnr)
