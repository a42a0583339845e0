"""SiT S/2, B/2, L/2 and XL/2, class-conditional ImageNet 256x256, as the levels of one family.

Weights: huggingface.co/BiliSakura/SiT-diffusers, a community's conversion to safetensors, not run here. MIT. Network:
models.py of github.com/willisma/SiT (MIT, needs timm), cloned and put on PYTHONPATH. VAE: stabilityai/sd-vae-ft-ema.
Memory: 0.03 + 0.13 + 0.46 + 0.68 B parameters in float32, since the class embeds t in float32: 5.2 GB, plus
activations. Two or more of the four sizes are enough.

    hf download BiliSakura/SiT-diffusers --include "SiT-*-2-256-*/transformer/*.safetensors" --local-dir weights
    PYTHONPATH=SiT python examples/sit.py --weights weights --out sit.png
    python examples/sit.py --random"""

from argparse import Namespace
from typing import Any

import common
import torch
from torch import Tensor, nn

from mlem_diffusion import FlowSchedule, Latents, Process, adapt, flow, guided

FILES = {
    f"SiT-{size}/2": f"SiT-{size}-2-256-diffusers/transformer/diffusion_pytorch_model.safetensors"
    for size in ("S", "B", "L", "XL")
}
NULL = 1000  # the label of no class
GUIDANCE = [(-1.7, 14.0, 1.8)]  # w = 1.8 between these log-SNRs, not at high noise; not tuned for this family


def networks(args: Namespace) -> dict[str, nn.Module]:
    """{name: network(x, t, y)}, cheap to expensive."""
    if args.random:
        return common.relatives(common.StandIn, {f"depth {n}": {"depth": n} for n in (1, 3, 8)})
    paths = common.present(args, FILES)
    kinds = common.package("models", "a clone of github.com/willisma/SiT on PYTHONPATH, and timm").SiT_models
    return {name: common.load(kinds[name](input_size=32, num_classes=1000), path) for name, path in paths.items()}


def labels(seeds: Any) -> dict[str, Tensor]:
    """A class for each seed."""
    return {"y": torch.tensor([seed * 389 % NULL for seed in seeds])}


def recipe(args: Namespace) -> None:
    found = {name: common.ready(network, args) for name, network in networks(args).items()}
    shape = (4, 8, 8) if args.random else (4, 32, 32)
    latents = Latents(common.decoder(args, "stabilityai/sd-vae-ft-ema"), scale=0.18215)
    # the velocity x0 - eps of the line t x0 + (1 - t) eps
    convention: Any = {"prediction": "velocity", "coordinates": flow(data_at=1), "time": "t"}
    convention |= {"latents": latents, "shape": shape}
    example = {"y": torch.tensor([0])}  # of one sample, to count FLOPs
    levels = [adapt(name, network, conditions=example, **convention) for name, network in found.items()]
    # one guide for all levels: the smallest network without a class
    smallest = next(iter(found.values()))
    guide = adapt("guide", smallest, conditioning={"y": torch.tensor([NULL])}, **convention)
    family = [guided(level, guide, GUIDANCE, common=True) for level in levels]
    # from log-SNR -40, where t is 0 to eight digits, to 13.8, where it is 0.999, in even steps of t
    process = Process(FlowSchedule(), -40.0, 13.8, spacing="time")
    common.draw(args, "ode/ddim", "systematic", family, process, shape, latents, labels)


if __name__ == "__main__":
    common.main(recipe, __doc__)
