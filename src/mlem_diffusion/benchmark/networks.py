"""The networks that are timed: this repository's, and diffusers' UNet2DModel of the same widths and blocks."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..models.family import build_denoiser
from ..models.unet import Denoiser


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel as the network of a `Denoiser`: [B,3,S,S], logsnr [B] or 0-dim -> [B,3,S,S].

    As in `unet.UNet`: base width, multipliers, residual blocks, attention (heads of 64 channels, in the middle too),
    conditioning by scale and shift, and resampling inside residual blocks.
    """

    def __init__(self, width: int, size: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int]):
        super().__init__()
        from diffusers import UNet2DModel

        channels = [width * m for m in multipliers]
        attends = [size // 2**i in attention for i in range(len(channels))]
        heads = max(1, channels[-1] // 64)
        # one number of groups for all norms: that of unet.UNet at its base width, which divides all other widths
        groups = max(g for g in range(1, 33) if width % g == 0 and (width // g >= 4 or g == 1))
        self.unet = UNet2DModel(
            sample_size=size,
            block_out_channels=tuple(channels),
            layers_per_block=blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
            add_attention=size // 2 ** (len(channels) - 1) <= max(attention, default=0),
            attention_head_dim=channels[-1] // heads if channels[-1] % heads == 0 else channels[-1],
            norm_num_groups=groups,
            attn_norm_num_groups=groups,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        timestep = 1000 * torch.sigmoid(-logsnr.float())
        return self.unet(x.to(self.unet.conv_in.weight.dtype), timestep, return_dict=False)[0]


def denoisers(width: int, size: int, unet: Mapping[str, Any], device: torch.device) -> dict[str, Denoiser]:
    """Denoisers on the device with random weights: "" is ours, "_diffusers" theirs, if it is installed (test extra)."""
    found = {"": build_denoiser(width, size, 0.5, unet, "v")}
    if find_spec("diffusers"):
        found["_diffusers"] = Denoiser(DiffusersUNet(width, size, **unet), 0.5, "v")
    for denoiser in found.values():
        for parameter in denoiser.parameters():
            # layers initialised to zero would output zeros; products with zeros draw less power and so run faster
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return found
