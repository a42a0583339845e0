"""BK-SDM tiny, small and base with Stable Diffusion 1.4, whose blocks they lack, as the levels of one family.

Weights: nota-ai/bk-sdm-tiny, -small, -base and CompVis/stable-diffusion-v1-4 of the Hugging Face hub, or folders with
copies; CreativeML OpenRAIL-M. Only safetensors are read. VAE and text encoder are those of the last. Not run here.
Memory: 0.33 + 0.49 + 0.58 + 0.86 B parameters in float16, and 0.2 B of VAE and text encoder: 4.9 GB, plus activations.
Needs diffusers and transformers. The costs are close, by the configurations 486, 511, 523 and 803 GFLOPs: in as many
steps no plan can cost less than 0.6 of Stable Diffusion alone.

    python examples/bk_sdm.py --out bk_sdm.png --weights nota-ai/bk-sdm-tiny nota-ai/bk-sdm-small nota-ai/bk-sdm-base \\
        CompVis/stable-diffusion-v1-4
    python examples/bk_sdm.py --random"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

GUIDANCE = 7.5
Texts = dict[str, Tensor]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def random_parts() -> tuple[dict[str, Any], Any, Any, Texts, Texts]:
    """What `loaded_parts` returns, small and random: three UNets, with text in the middle block."""
    diffusers = common.package("diffusers", "pip install diffusers")
    small = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 8, "cross_attention_dim": 16}
    small |= {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {f"depth {n}": {**small, "layers_per_block": n} for n in (1, 5, 13)}
    unets = common.relatives(diffusers.UNet2DConditionModel, sizes)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    texts = {"encoder_hidden_states": torch.randn(len(common.PROMPTS), 8, 16)}
    empty = {"encoder_hidden_states": torch.zeros(1, 8, 16)}
    return unets, vae, diffusers.DDIMScheduler(**BETAS), texts, empty


@torch.no_grad()
def loaded_parts(args: Namespace) -> tuple[dict[str, Any], Any, Any, Texts, Texts]:
    """{name: UNet}, cheap to expensive, VAE, scheduler, embedded prompts [P,77,768] and empty prompt [1,77,768]."""
    options = {"use_safetensors": True, "torch_dtype": torch.float32 if args.device == "cpu" else torch.float16}
    common.package("transformers", "pip install transformers")
    kind, last = "UNet2DConditionModel", args.weights[-1]
    unets = {Path(r).name: common.pretrained(kind, r, subfolder="unet", **options) for r in args.weights}
    pipeline = common.pretrained("StableDiffusionPipeline", last, unet=None, safety_checker=None, **options)
    pipeline.to(args.device)
    texts, empty = pipeline.encode_prompt(list(common.PROMPTS), args.device, 1, True)
    texts, empty = ({"encoder_hidden_states": rows} for rows in (texts, empty[:1]))
    return unets, pipeline.vae, pipeline.scheduler, texts, empty


def recipe(args: Namespace) -> None:
    parts = random_parts() if args.random else loaded_parts(args)
    # an SDE, with coins that are independent between steps
    common.draw(args, "sde/dpmpp_2m", "independent", *common.text_family(args, *parts, GUIDANCE))


if __name__ == "__main__":
    common.main(recipe, __doc__)
