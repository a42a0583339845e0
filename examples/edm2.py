"""EDM2 XS to XXL, class-conditional ImageNet 512x512, as the levels of one family, with EDM2's own guide.

Weights: nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions, CC BY-NC-SA 4.0. They are pickles, which run code when
they are opened, so this recipe reads safetensors only. Convert each file once, in a container without your data and
keys, with github.com/NVlabs/edm2 on PYTHONPATH: pickle.load(file)["ema"].state_dict(), by safetensors.torch.save_file,
to xs.safetensors, ..., xxl.safetensors (two or more) and uncond.safetensors, the guide. EDM2's choice for guidance:
edm2-img512-{xs-2147483-0.045, s-2147483-0.025, m-2147483-0.030, l-1879048-0.015, xl-1342177-0.020, xxl-0939524-0.015,
xs-uncond-2147483-0.015}.pkl. Network: that repository's. VAE: stabilityai/sd-vae-ft-mse. None of this was run here.
Memory: 0.12 + 0.28 + 0.50 + 0.78 + 1.12 + 1.52 B parameters and 0.12 B of the guide, kept in float32: 18 GB, plus
activations in float16.

    PYTHONPATH=edm2 python examples/edm2.py --weights weights --out edm2.png
    python examples/edm2.py --random"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from mlem_diffusion import Latents, LinearSchedule, Process, UserError, adapt, guided

CHANNELS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
CLASSES, SIGMA_DATA = 1000, 0.5
GUIDANCE = 1.2  # EDM2's for M and larger; 1.4 for XS and S
MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of the raw latents


class StandIn(common.StandIn):
    """A small network with the call of EDM2's Precond: D(x, sigma)."""

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        label = torch.full((len(x),), CLASSES, device=x.device) if class_labels is None else class_labels.argmax(dim=1)
        s = sigma[:, None, None, None]
        return (x + s * super().forward(x / (1 + s**2).sqrt(), sigma.log() / 4, label)) / (1 + s**2)


def networks(args: Namespace) -> tuple[dict[str, nn.Module], nn.Module]:
    """{name: network(x, sigma, class_labels)}, cheap to expensive, and the guide, network(x, sigma)."""
    if args.random:
        found = common.relatives(StandIn, {f"depth {n}": {"depth": n} for n in (1, 3, 8)})
        return found, found["depth 1"]
    paths = common.present(args, {n: f"{n}.safetensors" for n in CHANNELS})
    guide = Path(args.weights[0], "uncond.safetensors")
    if not guide.is_file():
        raise UserError(f"{guide} is missing: the guide, see --help.")
    kind = common.package("training.networks_edm2", "a clone of github.com/NVlabs/edm2 on PYTHONPATH").Precond

    def network(path: Path, channels: int, classes: int) -> nn.Module:
        return common.load(kind(64, 4, classes, model_channels=channels, sigma_data=SIGMA_DATA), path)

    found = {name: network(path, CHANNELS[name], CLASSES) for name, path in paths.items()}
    return found, network(guide, CHANNELS["xs"], 0)


def labels(seeds: Any) -> dict[str, Tensor]:
    """A class for each seed, one-hot."""
    classes = torch.tensor([seed * 389 % CLASSES for seed in seeds])
    return {"class_labels": nn.functional.one_hot(classes, CLASSES).float()}


def recipe(args: Namespace) -> None:
    found, unconditional = networks(args)
    shape = (4, 8, 8) if args.random else (4, 64, 64)
    decode = common.decoder(args, "stabilityai/sd-vae-ft-mse")  # which EDM2 applies to images in [0, 1]
    latents = Latents(lambda raw: 2 * decode(raw) - 1, scale=[SIGMA_DATA / std for std in STD], shift=MEAN)
    # D(y, sigma) is the denoised image, for y = image + sigma * noise
    convention: Any = {"prediction": "x0", "coordinates": "ve", "time": "sigma", "latents": latents, "shape": shape}
    levels = [adapt(n, common.ready(net, args), conditions=labels([0]), **convention) for n, net in found.items()]
    guide = adapt("guide", common.ready(unconditional, args), **convention)
    family = [guided(level, guide, GUIDANCE, common=True) for level in levels]
    # sigma from 80 to 0.002, in even steps of log sigma
    process = Process(LinearSchedule(), -2 * math.log(80), -2 * math.log(0.002))
    common.draw(args, "ode/dpmpp_2m", "systematic", family, process, shape, latents, labels)


if __name__ == "__main__":
    common.main(recipe, __doc__)
