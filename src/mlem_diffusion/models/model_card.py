"""The model card of a published family; all its numbers are read from the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, write_text
from .family import RESTORE

COLUMNS = ("level", "UNet", "parameters", "MFLOP per evaluation", "training images seen", "held-out loss")


def write_card(path: Path, index: dict[str, Any]) -> None:
    """Write the README.md of a published folder from its family.json and the levels' metadata.json."""
    levels = [read_json(path.parent / name / "metadata.json", RESTORE) for name in index["levels"]]
    name, data, training, m = index["experiment"], index["data"], index["training"], levels[0]
    licence, terms = licence_of(data)
    treated = ", ".join(f"{what} ({count:,} images)" for what, count in data["treatment"].items())
    text = f"""---
license: {licence}
tags: [diffusion, multilevel-euler-maruyama]
---
# {index["title"] or name}

{len(levels)} denoising UNets of increasing size, with EMA weights rounded to bf16: the levels of multilevel Euler-Maruyama sampling
([arXiv:2603.24594](https://arxiv.org/abs/2603.24594)). All training settings are in the JSON files of this folder.

{table_of(levels)}

The networks take `x = alpha * image + sigma * noise`, with {m["size"]}x{m["size"]} RGB images in [-1, 1], and a log-SNR from {m["logsnr_range"][0]} to {m["logsnr_range"][1]};
they predict {m["target"]}. Held-out loss: mean squared error of the denoised image, before rounding, over {m["held_out"]["images"]} held-out images and
noise levels along the sampler's path. Trained again from other seeds, for the uncertainty of gamma: {", ".join(index["repeats"]) or "none"}.

In a clone, `make sample EXPERIMENT={name}` and `make sample-compare EXPERIMENT={name}` work without images or
training. Intended use: research on samplers of diffusion models. The levels are not intended for images that pass for
real persons, for recognising or judging persons, or for data about persons.

## Data and training

{data["split"]["train"]:,} training images of `{data["source"]["name"]}` (SHA-256 {data["source"]["sha256"]}),
crop `{data["crop"]}`: {treated}. Packed array: SHA-256
{data["sha256"]}. This folder contains no images.

Trained with `make train-levels EXPERIMENT={name}`, overrides `{" ".join(training["overrides"]) or "none"}`, commit
{training["commit"]}, finished {training["finished"]}, on {training["device"]}.

## Licence and limits

{terms}

Training was short, on small images: samples are visibly imperfect. They inherit the uneven distribution of the training
images (for faces: of age, skin colour, pose, make-up and lighting). The recovery of single training images from the
weights has not been examined.
"""  # noqa: E501
    write_text(path, text)


def table_of(levels: list[dict[str, Any]]) -> str:
    """Return one row per level: shape, size, cost, training and held-out loss."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for m in levels:
        shape = ", ".join(f"{key} {value}" for key, value in m["unet"].items() if value not in ([], None))
        loss = f"{np.mean(m['held_out']['loss']):.5f}"
        rows.append((m["name"], shape, f"{m['parameters']:,}", f"{m['flops'] / 1e6:.4g}", f"{m['images']:,}", loss))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def licence_of(data: dict[str, Any]) -> tuple[str, str]:
    """Return the licence's key and a sentence about it, for a manifest of images."""
    source = data["source"]
    if source["kind"] == "portraits":
        return "mit", "MIT, because a program in the repository draws the images."
    if source["kind"] == "download" or "celeba" in f"{data['name']} {source['name']}".lower():
        terms = "For non-commercial research only, like [CelebA](https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
    else:
        terms = "The terms of the training images apply to these files as far as they extend"
    return "other", f"{terms}.\nThe repository's MIT licence does not cover this folder."
