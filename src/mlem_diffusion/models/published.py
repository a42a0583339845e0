"""A published family: a committed folder, from which a clone can sample without training and without images.

checkpoints/<experiment>/published/ contains, for each level, <level>/ema-bf16.safetensors and <level>/metadata.json
(that of training, with the rounded weights' SHA-256). gauss.safetensors and statistics.npz replace the training images
in later stages. family.json describes the folder, README.md is the model card. Training never writes into this folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import read_json, write_json, write_text
from .family import RESTORE, load_denoiser, save_weights

FOLDER, INDEX = "published", "family.json"
WEIGHTS, GAUSSIAN, STATISTICS = "ema-bf16.safetensors", "gauss.safetensors", "statistics.npz"


def levels_folder(directory: Path, names: Sequence[str]) -> Path:
    """The published folder if it has all these levels and `directory` has not; otherwise `directory`."""

    def has_all(folder: Path) -> bool:
        return all((folder / name / "metadata.json").is_file() for name in names)

    published = directory / FOLDER
    return published if not has_all(directory) and (published / INDEX).is_file() and has_all(published) else directory


def read_index(folder: Path) -> dict[str, Any] | None:
    """The content of family.json; None if the folder has none. Raises Damaged if it cannot be read."""
    path = folder / INDEX
    return read_json(path, RESTORE) if path.is_file() else None


def publish(
    source: Path, target: Path, levels: Sequence[Mapping], repeats: Sequence[Mapping], facts: Mapping[str, Any]
) -> None:
    """Write the levels of the folder `source`, family.json and the model card into the folder `target`.

    levels, repeats: metadata, of the levels trained again too. facts: about images, training and the other files.
    """
    for m in [*levels, *repeats]:
        folder = target / m["name"]
        sha256 = save_weights(folder / WEIGHTS, load_denoiser(source / m["name"], m), torch.bfloat16)
        snapshots = [{**m["snapshots"][-1], "file": WEIGHTS, "sha256": sha256}]
        own = {"weights_file": WEIGHTS, "weights_sha256": sha256, "trained_weights_sha256": m["weights_sha256"]}
        write_json(folder / "metadata.json", {**m, "snapshots": snapshots, **own})
    names = {"levels": [m["name"] for m in levels], "repeats": [m["name"] for m in repeats]}
    write_json(target / INDEX, {**names, **facts})
    write_text(target / "README.md", model_card(levels, facts))


def model_card(levels: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The README.md of a published folder, in Markdown."""
    name, data, training, m = facts["experiment"], facts["data"], facts["training"], levels[0]
    rows = []
    for level in levels:
        unet = ", ".join(f"{key} {value}" for key, value in level["unet"].items() if value not in ([], None))
        sizes = f"{level['parameters']:,} | {level['flops'] / 1e6:.4g} | {level['images']:,}"
        rows.append(f"| {level['name']} | {unet} | {sizes} | {np.mean(level['held_out']['loss']):.5f} |")
    table = "\n".join(rows)
    licence, terms = licence_of(data)
    return f"""---
license: {licence}
tags: [diffusion, multilevel-euler-maruyama]
---
# {facts["title"] or name}

Denoising UNets of increasing size, with EMA weights rounded to bf16: the levels of multilevel Euler-Maruyama sampling
([arXiv:2603.24594](https://arxiv.org/abs/2603.24594)). In a clone, `make sample EXPERIMENT={name}` works without
images or training. All settings are in the JSON files.

| level | UNet | parameters | MFLOP per evaluation | training images seen | held-out loss |
| --- | --- | --- | --- | --- | --- |
{table}

The networks take `x = alpha * image + sigma * noise`, with {m["size"]}x{m["size"]} RGB images in [-1, 1], and a log-SNR
from {m["logsnr_range"][0]} to {m["logsnr_range"][1]}; they predict {m["target"]}. Held-out loss: mean squared error of
the denoised image, before rounding, over held-out images and noise levels along the sampler's path.

{data["split"]["train"]:,} training images of `{data["source"]["name"]}` (SHA-256 {data["source"]["sha256"]}), crop
`{data["crop"]}`; none are in this folder. Packed array: SHA-256 {data["sha256"]}. Trained with
`make train-levels EXPERIMENT={name}`, overrides `{" ".join(training["overrides"]) or "none"}`, commit
{training["commit"]}, finished {training["finished"]}, on {training["device"]}.

Intended use: research on samplers of diffusion models; not for images that pass for real persons, nor for recognising
or judging persons. Samples are visibly imperfect, and inherit the uneven distribution of the training images. The
recovery of single training images from the weights has not been examined.

Licence: {terms}
"""


def licence_of(data: Mapping[str, Any]) -> tuple[str, str]:
    """The licence's key and a sentence about it, for a manifest of images."""
    source = data["source"]
    if source["kind"] == "portraits":
        return "mit", "MIT, because a program in the repository draws the images."
    terms = "the terms of the training images apply to these files as far as they extend"
    if source["kind"] == "download" or "celeba" in f"{data['name']} {source['name']}".lower():
        terms = "for non-commercial research only, like [CelebA](https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
    return "other", f"{terms}. The repository's MIT licence does not cover this folder."
