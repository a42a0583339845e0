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
    name, data, training, first = index["experiment"], index["data"], index["training"], levels[0]
    side, (low, high), (licence, terms) = first["size"], first["logsnr_range"], licence_of(data)
    treated = ", ".join(f"{what}: {count:,} images" for what, count in data["treatment"].items())
    extra = [f"`{index[key]['file']}`" for key in ("gaussian", "statistics") if index[key] is not None]
    write_text(
        path,
        f"""---
license: {licence}
tags: [diffusion, multilevel-euler-maruyama]
---
# {index["title"] or name}

{len(levels)} denoising UNets of increasing size, the levels of multilevel Euler-Maruyama sampling
([arXiv:2603.24594](https://arxiv.org/abs/2603.24594)), with EMA weights rounded to bf16. `make publish` writes this card;
its numbers, and all training settings, are in the JSON files of this folder.

{table_of(levels)}

* The networks take `x = alpha * image + sigma * noise`, with pixels in [-1, 1], and the log-SNR, {low} to {high}; they predict
  {first["target"]}. Images are {side}x{side} RGB.
* Held-out loss: mean squared error of the denoised image, before rounding, over {first["held_out"]["images"]} held-out images and noise levels
  along the sampler's path.
* Levels trained again from other seeds, for the uncertainty of gamma: {", ".join(index["repeats"]) or "none"}.
* In place of the training images, a linear Gaussian denoiser and moments of features: {", ".join(extra) or "none"}.

## Use

    make sample EXPERIMENT={name} SEEDS=0-15
    make sample-compare EXPERIMENT={name}

work in a clone, without images or training. Intended use: research on samplers of diffusion models. The levels are not intended
for images that pass for real persons, for recognising or judging persons, or for data about persons.

## Data and training

{data["split"]["train"]:,} training images of `{data["source"]["name"]}` (SHA-256 {data["source"]["sha256"]}),
{side}x{side}, crop `{data["crop"]}`; {treated}. Packed array: SHA-256 {data["sha256"]}. This
folder contains no images.

Trained with `make train-levels EXPERIMENT={name}`, overrides `{" ".join(training["overrides"]) or "none"}`, commit
{training["commit"]}, finished {training["finished"]}, on {training["device"]}.

## Licence

{terms}

## Limits

Training was short, on small images: samples are visibly imperfect. They inherit the uneven distribution of the training images
(for faces: of age, skin colour, pose, make-up and lighting). The recovery of single training images from the weights has not
been examined. Rounding to bf16 changes outputs in the last digits.
""",  # noqa: E501
    )


def table_of(levels: list[dict[str, Any]]) -> str:
    """Return one row per level: shape, size, cost, training and held-out loss."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for m in levels:
        shape = ", ".join(f"{key} {value}" for key, value in m["unet"].items() if value not in ([], None))
        loss = np.mean(m["held_out"]["loss"])
        rows.append(
            (m["name"], shape, f"{m['parameters']:,}", f"{m['flops'] / 1e6:.4g}", f"{m['images']:,}", f"{loss:.5f}")
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def licence_of(data: dict[str, Any]) -> tuple[str, str]:
    """Return the licence's key and the text about it, for a manifest of images."""
    source = data["source"]
    if source["kind"] == "portraits":
        return "mit", "MIT, the licence of the repository, because a program in it draws the images."
    text = "The terms of these images apply to the weights and statistics made from them, as far as they extend"
    if source["kind"] == "download" or "celeba" in f"{data['name']} {source['name']}".lower():
        text = "For non-commercial research only, like [CelebA](https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
    return "other", f"{text}. The repository's MIT licence does not cover this folder."
