"""SANA 0.6B and 1.6B, text to image at 1024x1024, as the levels of one family.

Weights: Efficient-Large-Model/Sana_600M_1024px_diffusers and Sana_1600M_1024px_diffusers of the Hugging Face hub, or
folders with copies; only safetensors are read. NVIDIA's NSCL v2-custom (non-commercial), and Gemma's terms for the text
encoder, Gemma-2-2B. VAE (DC-AE) and text encoder are those of the last. Not run here.
Memory: 0.59 + 1.60 B parameters in float16 and 0.3 B of the VAE in bfloat16: 5.0 GB, plus activations; before that the
text encoder, 2.6 B in bfloat16: 5.2 GB. Needs diffusers and transformers. Costs, by the configurations: 1.12 and 2.97
TFLOPs for each evaluation.

    python examples/sana.py --out sana.png --weights Efficient-Large-Model/Sana_600M_1024px_diffusers \\
        Efficient-Large-Model/Sana_1600M_1024px_diffusers
    python examples/sana.py --random"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

GUIDANCE = 4.5
Texts = dict[str, Tensor]


def random_parts() -> tuple[dict[str, Any], Any, Any, Texts, Texts]:
    """What `loaded_parts` returns, small and random; here the levels are three."""
    diffusers = common.package("diffusers", "pip install diffusers")
    small = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "caption_channels": 16, "cross_attention_dim": 32}
    small |= {"attention_head_dim": 8, "cross_attention_head_dim": 8, "num_cross_attention_heads": 4}
    sizes = {f"depth {n}": {**small, "num_attention_heads": 4, "num_layers": n} for n in (1, 3, 8)}
    tiny = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    tiny = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in tiny.items()}
    vae = diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **tiny)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    texts = {"encoder_hidden_states": torch.randn(len(common.PROMPTS), 6, 16)}
    texts["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]]).expand(len(common.PROMPTS), 6)
    empty = {name: torch.ones_like(rows[:1]) for name, rows in texts.items()}
    transformers = common.relatives(diffusers.SanaTransformer2DModel, sizes)
    return transformers, vae, diffusers.DPMSolverMultistepScheduler(**flow), texts, empty


@torch.no_grad()
def loaded_parts(args: Namespace) -> tuple[dict[str, Any], Any, Any, Texts, Texts]:
    """{name: transformer}, cheap to expensive, VAE, scheduler, embedded prompts and the empty prompt."""
    common.package("transformers", "pip install transformers")
    half, wide = (torch.float32,) * 2 if args.device == "cpu" else (torch.float16, torch.bfloat16)
    last, options = args.weights[-1], {"use_safetensors": True, "variant": "fp16"}
    pipeline = common.pretrained("SanaPipeline", last, transformer=None, vae=None, torch_dtype=wide, **options)
    pipeline.text_encoder.to(args.device)
    # without the long instruction that the pipeline puts before a prompt
    found = pipeline.encode_prompt(list(common.PROMPTS), device=args.device)
    texts, empty = ({"encoder_hidden_states": e, "encoder_attention_mask": mask} for e, mask in (found[:2], found[2:]))
    scheduler = pipeline.scheduler
    del pipeline  # frees the text encoder
    kind, options = "SanaTransformer2DModel", {**options, "torch_dtype": half, "subfolder": "transformer"}
    transformers = {Path(repo).name: common.pretrained(kind, repo, **options) for repo in args.weights}
    vae = common.pretrained("AutoencoderDC", last, subfolder="vae", use_safetensors=True, torch_dtype=wide)
    return transformers, vae, scheduler, texts, {name: rows[:1] for name, rows in empty.items()}


def recipe(args: Namespace) -> None:
    parts = random_parts() if args.random else loaded_parts(args)
    # its process is the scheduler's flow, with its shift of 3
    common.draw(args, "ode/ddim", "systematic", *common.text_family(args, *parts, GUIDANCE))


if __name__ == "__main__":
    common.main(recipe, __doc__)
