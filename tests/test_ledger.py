"""FLOPs per evaluation against counts by hand, and the ledger."""

import numpy as np
import pytest
from torch import Tensor, nn

from mlem_diffusion.diffusion.level import Ledger, flops_per_evaluation, joined
from mlem_diffusion.models.unet import Attention, Denoiser, UNet


class Wrapped(nn.Module):
    """Wraps a module of x as a network of (x, logsnr)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        return self.inner(x)


def test_convolution_and_linear_by_hand() -> None:
    size = 12
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * size**2, 5))
    by_hand = 2 * 3 * 8 * 3 * 3 * size**2 + 2 * 8 * size**2 * 5
    assert flops_per_evaluation(Wrapped(network), (3, size, size)) == by_hand


@pytest.mark.parametrize("channels", [16, 128])
def test_attention_by_hand(channels: int) -> None:
    """Two 1x1 convolutions (to 3C and C) and two products of length^2 x C, whatever the number of heads."""
    size = 8
    length = size**2
    by_hand = 2 * length * channels * 3 * channels + 2 * length * channels**2 + 4 * length**2 * channels
    assert flops_per_evaluation(Wrapped(Attention(channels)), (channels, size, size)) == by_hand


def test_unet_of_width_8_at_64_pixels() -> None:
    """0.233 GFLOP; twice the width costs four times as much, except in the layers that read or write three channels."""
    flops = [flops_per_evaluation(Denoiser(UNet(width, 64)), (3, 64, 64)) / 1e9 for width in (8, 16)]
    assert flops[0] == pytest.approx(0.233, rel=0.01)
    assert 3.7 < flops[1] / flops[0] < 4
    assert flops_per_evaluation(UNet(8, 64, attention=()), (3, 64, 64)) / 1e9 < 0.99 * flops[0]


def test_ledgers_add_up() -> None:
    ledger = Ledger([1.0, 10.0], np.array([[1, 1], [1, 2], [1, 0], [1, 1]]), 2.0)
    assert ledger.evaluations == [4, 4]
    assert (ledger.calls_per_image, ledger.flops_per_image, ledger.seconds_per_image) == (2, 11, 0.5)
    total = joined([ledger, Ledger([1.0, 10.0], np.array([[0, 1]]), 1.0)])
    assert (total.evaluations, total.seconds) == ([4, 5], 3.0)
    assert total.per_sample.tolist() == [[1, 1], [1, 2], [1, 0], [1, 1], [0, 1]]  # batch after batch
    assert total.flops_per_image == 54 / 5
