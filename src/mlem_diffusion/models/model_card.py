"""The model card of a published family; all its numbers are read from the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, write_text
from .family import RESTORE
from .published import CARD

# settings of how training runs, which do not change the result
NOT_SHOWN = ("_target_", "narrow", "log_every", "save_every", "precision", "compile", "graph")


def write_card(folder: Path, index: dict[str, Any]) -> None:
    """Write README.md of a published folder from the content of family.json and the levels' metadata.json."""
    levels = [read_json(folder / name / "metadata.json", RESTORE) for name in index["levels"]]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    licence, terms = licence_of(index["data"])
    own, (low, high), side = levels[0], levels[0]["logsnr_range"], levels[0]["size"]
    parts = "".join(f"* {line}\n" for line in additional(index))
    text = f"""---
license: {licence}
tags: [diffusion, multilevel-euler-maruyama]
---
# {index["title"] or index["experiment"]}

{len(levels)} denoising UNets of increasing size, the levels of multilevel Euler-Maruyama sampling
([arXiv:2603.24594](https://arxiv.org/abs/2603.24594)). The files have EMA weights rounded to bf16 and take {size / 1e6:.2f} MB.
`make publish` writes this card; its numbers are read from the JSON files in this folder.

{level_table(levels)}

* The networks take `x = alpha * image + sigma * noise`, with pixels in [-1, 1], and the log-SNR; they predict {own["target"]}.
  Images are {side}x{side} RGB, with log-SNR {low} to {high}. Each training image counts as three evaluations in FLOPs.
* Held-out loss: mean squared error of the denoised image (weights before rounding) over {own["held_out"]["images"]} held-out images and
  {len(own["held_out"]["logsnr"])} noise levels along the sampler's path.
{parts}
## Use

In a clone, without images or training:

    make sample EXPERIMENT={index["experiment"]} SEEDS=0-15
    make sample-compare EXPERIMENT={index["experiment"]}

Levels trained in `checkpoints/{index["experiment"]}/` replace these. The bf16 weights are loaded into float32 networks; `precision=bf16`
samples in bf16.

Intended use: research on samplers of diffusion models, comparing the cost and the error of ways to combine the levels. The
levels are not intended for images that pass for real persons, for recognising or judging persons, or for data about persons.

## Data

{data_section(index["data"])}
This folder contains no training or held-out images.

## Training

{training_section(index, levels)}

## Licence

{terms}

## Limits

* Training was short, on small images (see the tables). Samples are visibly imperfect; sample quality is not the aim.
* Samples inherit the training images' uneven distribution: of age, skin colour, pose, make-up and lighting, for faces.
* The recovery of single training images from the weights has not been examined.
* The levels are meant for log-SNR {low} to {high} and for {side}x{side} images; they are untested outside these limits.
* Rounding to bf16 changes outputs slightly, so results differ in the last digits from those of the float32 weights.
"""  # noqa: E501
    write_text(folder / CARD, text)


def licence_of(data: dict[str, Any]) -> tuple[str, str]:
    """Return the licence's key and the paragraph about it, for a manifest of images."""
    source = data["source"]
    if source["kind"] == "portraits":
        return "mit", "MIT, the licence of the repository, because a program in it draws the images."
    if source["kind"] == "download" or "celeba" in f"{data['name']} {source['name']}".lower():
        terms = "[terms](https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)"
        text = f"For non-commercial research only, like CelebA ({terms}), from which these weights and statistics are made."
    else:
        text = "The terms of the images named above apply to these weights and statistics as far as they extend."
    return "other", f"{text}\nThe repository's MIT licence does not cover this folder."


def level_table(levels: list[dict[str, Any]]) -> str:
    """Return one row per level: shape, size, cost, training and held-out loss."""
    columns = (
        "level",
        "width",
        "UNet",
        "parameters",
        "MFLOP per evaluation",
        "training images seen",
        "training, TFLOP",
    )
    rows = [[*columns, "held-out loss"], ["---"] * (len(columns) + 1)]
    for m in levels:
        shape = ", ".join(f"{key} {value}" for key, value in m["unet"].items() if value not in ([], None))
        cost, training = f"{m['flops'] / 1e6:.4g}", f"{3 * m['flops'] * m['images'] / 1e12:.4g}"
        loss = f"{np.mean(m['held_out']['loss']):.5f}"
        rows.append([m["name"], m["width"], shape, f"{m['parameters']:,}", cost, f"{m['images']:,}", training, loss])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def additional(index: dict[str, Any]) -> list[str]:
    """Return a sentence for each further part of the folder."""
    lines = []
    if index["repeats"]:
        lines.append(
            f"{', '.join(index['repeats'])}: the same levels trained again from other seeds, for the uncertainty of "
            "gamma. Sampling does not use them."
        )
    if gaussian := index["gaussian"]:
        lines.append(
            f"`{gaussian['file']}`: a linear Gaussian denoiser as an additional, nearly free level. It has the mean and "
            f"{gaussian['rank']}\n  principal directions ({100 * gaussian['explained']:.1f}% of the variance) of "
            f"{gaussian['images']:,} training images, at {gaussian['flops'] / 1e6:.4g} MFLOP per evaluation."
        )
    if moments := index["statistics"]:
        lines.append(
            f"`{moments['file']}`: mean and covariance of {moments['dimensions']} features ({moments['name']}) of the "
            f"{moments['images']:,} training images, so distances\n  need no images. Distance between real images at "
            f"n = {moments['floor']['num_samples']}: {moments['floor']['distance']:.4g}."
        )
    return lines


def data_section(data: dict[str, Any]) -> str:
    """Return where the images come from and what was done to them, from their manifest."""
    split, source, (height, width) = data["split"], data["source"], data["size"]
    seed = "" if split["seed"] is None else f", seed {split['seed']}"
    return f"""{split["train"]:,} training images and {data["count"] - split["train"]:,} held-out images ({split["method"]} split{seed}) of
`{source["name"]}` (SHA-256 {source["sha256"]}), {height}x{width}, crop `{data["crop"]}`:

{"".join(f"* {what}: {count:,} images\n" for what, count in data["treatment"].items())}* resize: {data["resize"]}
* packed array: SHA-256 {data["sha256"]}, root mean square {data["rms"]:.5f};
  stages that need images refuse images with another hash
"""  # noqa: E501


def training_section(index: dict[str, Any], levels: list[dict[str, Any]]) -> str:
    """Return the commands, their circumstances, and the settings; where levels differ, each level's."""
    training, source, rows = index["training"], index["data"]["source"], []
    named = {"portraits": "", "download": " SOURCE=download"}.get(source["kind"], f" SOURCE={source['name']}")
    for key in dict.fromkeys(key for m in levels for key in m["train"] if key not in NOT_SHOWN):
        values = [str(m["train"].get(key)) for m in levels]
        each = ", ".join(f"{m['name']}: {value}" for m, value in zip(levels, values, strict=True))
        rows.append(f"| {key} | {values[0] if len(set(values)) == 1 else each} |")
    targets = [f"    make {target} EXPERIMENT={index['experiment']}" for target in ("data", "train-levels", "publish")]
    settings = "\n".join(rows)
    return f"""{targets[0]}{named}
{targets[1]}
{targets[2]}

Overrides: `{" ".join(training["overrides"]) or "none"}`. Trained with commit {training["commit"] or "unknown"}, finished {training["finished"] or "at an unknown time"}, on {training["device"] or levels[-1]["device"]};
published from commit {index["published"]["commit"]} on {index["published"]["date"]}.

| setting | value |
| --- | --- |
{settings}"""  # noqa: E501
