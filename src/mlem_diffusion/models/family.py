"""A trained family on disk: checkpoints/<experiment>/<level>/ with EMA weights, resume state and metadata.
Weights are safetensors, and no pickles are read. A published family is a committed folder of the same form, with bf16
weights, from which a clone can sample without training and without images: gauss.safetensors and statistics.npz replace
these in later stages. family.json describes it, README.md is the model card. Training never writes into it."""

import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..diffusion.level import Level, check_family, flops_per_evaluation
from ..errors import UserError
from ..files import Damaged, atomic_write, expect_content, read_json, sha256_of, unreadable, write_json, write_text
from .compiled import FastDenoiser
from .gaussian import GaussianDenoiser, load_gaussian
from .unet import Denoiser, UNet

AGAIN = "train this level again (make train-levels ARGS=overwrite=true)"
RESTORE = "restore it (git checkout), or publish the family again (make publish)"
PUBLISHED, INDEX = "published", "family.json"  # folder, and its description
BF16 = "ema-bf16.safetensors"


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Write a module's parameters and buffers as safetensors; return the file's SHA-256. dtype: of the parameters."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    for name, _ in module.named_parameters():
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype)
    atomic_write(path, lambda p: p.write_bytes(save(tensors)))
    return sha256_of(path)


def check_weights(path: Path, sha256: str, hint: str = AGAIN) -> None:
    """Raise Damaged if the file has another hash, and UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing: train the level first (make train-levels).")
    if sha256_of(path) != sha256:
        raise Damaged(path, f"{path} is damaged, or not the file named in its level's metadata.json: {hint}.")


def load_weights(path: Path, module: nn.Module, sha256: str, hint: str = AGAIN) -> None:
    """Load safetensors into the module, in its dtype; UserError (`check_weights`), also if they do not fit."""
    check_weights(path, sha256, hint)
    try:
        module.load_state_dict(load(path.read_bytes()))
    except Exception as error:
        raise unreadable(error, path, f"does not fit the configured network: {hint}") from error


def load_state(path: Path) -> dict[str, Any] | None:
    """The resume state, or None without a file; Damaged if it cannot be read. No code in the file can run."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch does not compare checksums
                raise ValueError(f"the checksum of {part} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unreadable(error, path, "cannot be read: delete it to train this level again") from error


def level_name(width: int, seed: int | None = None) -> str:
    """The folder of a level; seed: that from which it was trained again."""
    return f"w{width}" if seed is None else f"w{width}-seed{seed}"


def taught_name(width: int) -> str:
    """The folder of a level that was trained on the outputs of the largest one: t for telescope."""
    return f"t{width}"


def at_width(settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The settings for a level of this width; UserError for an entry of settings["narrow"] without `upto`.
    "narrow" lists changes for narrow levels, such as {upto: 32, images: 500000}. The entry with the smallest `upto` of
    at least the width applies."""
    entries: Any = settings.get("narrow") or ()
    if any(not isinstance(entry, Mapping) or "upto" not in entry for entry in entries):
        raise UserError("Every entry of a list `narrow` needs `upto`, the largest width that it applies to.")
    fitting = [entry for entry in entries if width <= entry["upto"]]
    changes = min(fitting, key=lambda entry: entry["upto"], default={})
    return {key: value for key, value in {**settings, **changes}.items() if key not in ("narrow", "upto")}


def check_attention(widths: Iterable[int], size: int, unet: Mapping[str, Any]) -> None:
    """Raise UserError if a resolution with attention occurs in no network of the family, for images of this size."""
    networks, sizes = [at_width(unet, width) for width in widths], set()
    for own in networks:
        sizes |= {size // own.get("patch", 1) >> i for i in range(len(own.get("multipliers", ())))}
    if unknown := {wanted for own in networks for wanted in own.get("attention", ())} - sizes:
        text = f"unet.attention={sorted(unknown)}: no network of this family works at that resolution, only at "
        raise UserError(f"{text}{', '.join(map(str, sorted(sizes, reverse=True)))} (data.size, unet.multipliers).")


def build_unet(width: int, size: int, unet: Mapping[str, Any], seed: int = 0) -> UNet:
    """An untrained network; its weights depend only on the seed, the width and its settings (`at_width`).
    precondition = "gaussian" gives it the Gaussian denoiser's output as three more inputs."""
    own = at_width(unet, width)
    kind = own.pop("precondition", "scalar")
    if kind not in ("scalar", "gaussian"):
        raise UserError(f"unet.precondition = {kind!r} is unknown; expected 'scalar' or 'gaussian'.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + width)
        return UNet(width, size, **own, inputs=6 if kind == "gaussian" else 3)


def build_denoiser(
    width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str, seed: int = 0,
    gauss: GaussianDenoiser | None = None,
) -> Denoiser:  # fmt: skip
    """An untrained denoiser (`build_unet`). gauss: that of the images, for precondition = "gaussian" alone."""
    network = build_unet(width, size, unet, seed)
    return Denoiser(network, data_rms, target, gauss if network.inputs > 3 else None)


def described_denoiser(directory: Path, facts: Mapping[str, Any], seed: int = 0) -> Denoiser:
    """An untrained denoiser for a level's description; the Gaussian denoiser that it names is in the directory."""
    gauss, keys = facts.get("gauss"), ("width", "size", "data_rms", "unet", "target")
    known = load_gaussian(directory / gauss["file"], sha256=gauss["sha256"]) if gauss else None
    return build_denoiser(*(facts[key] for key in keys), seed=seed, gauss=known)


def describe(width: int, size: int, data_rms: float, unet: Mapping[str, Any], target: str) -> dict[str, Any]:
    """A level's description before training, with parameter count and FLOPs per evaluation of one image.
    Those of the Gaussian denoiser, which the levels share, are not in them."""
    network = build_unet(width, size, unet)
    return {
        "name": level_name(width), "width": width, "size": size, "target": target, "data_rms": data_rms,
        "unet": at_width(unet, width), "parameters": sum(p.numel() for p in network.parameters()),
        "flops": flops_per_evaluation(network, (network.inputs, size, size)),
    }  # fmt: skip


def read_metadata(directory: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """metadata.json of each named level; UserError if one is not trained or damaged."""
    found = []
    for path in [directory / name / "metadata.json" for name in names]:
        hint = AGAIN if path.is_file() else "run make train-levels with the same EXPERIMENT first"
        found.append(read_json(path, hint))
        if not isinstance(found[-1], dict) or found[-1].get("name") != path.parent.name:
            raise Damaged(path, f"{path} does not describe the level {path.parent.name}: {AGAIN}.")
    return found


def weights_of(metadata: Mapping[str, Any], snapshot: int | None = None) -> tuple[str, str]:
    """File name and SHA-256 of a level's final weights, or of those at a training length (an index)."""
    if snapshot is None:
        return metadata.get("weights_file", "ema.safetensors"), metadata["weights_sha256"]
    return metadata["snapshots"][snapshot]["file"], metadata["snapshots"][snapshot]["sha256"]


def identity_of(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The hashes by which artefacts name their levels: of the images and of the weights before rounding."""
    levels = {m["name"]: m.get("trained_weights_sha256", m["weights_sha256"]) for m in metadata}
    return {"levels": levels, "data": metadata[0]["data_sha256"]}


def load_denoiser(folder: Path, metadata: Mapping[str, Any], snapshot: int | None = None) -> Denoiser:
    """A level's trained denoiser, in float32 on the CPU; snapshot: as in `weights_of`."""
    hint = RESTORE if "trained_weights_sha256" in metadata else AGAIN
    with expect_content(folder / "metadata.json", hint):
        denoiser = described_denoiser(folder.parent, metadata)
        file, sha256 = weights_of(metadata, snapshot)
    load_weights(folder / file, denoiser, sha256, hint)
    return denoiser


def load_level(
    folder: Path, metadata: Mapping[str, Any], device: Any = "cpu", snapshot: int | None = None, **options: Any
) -> Level:
    """Load one trained level for sampling; options: precision, compile and batch, as for `FastDenoiser`.
    Its base is the Gaussian denoiser that preconditions it, if one does."""
    denoiser, name = load_denoiser(folder, metadata, snapshot).to(device), metadata["name"]
    return level_of(denoiser, FastDenoiser(denoiser, name=name, **options), metadata)


def level_of(denoiser: Denoiser, denoise: Callable[..., Tensor], facts: Mapping[str, Any]) -> Level:
    """The level with this description; `denoise` evaluates the denoiser, whose Gaussian denoiser is the base."""
    base, teacher = None if denoiser.gauss is None else denoiser.gauss.as_level(), facts.get("teacher", {}).get("name")
    return Level(facts["name"], denoise, float(facts["flops"]) + (base.flops if base else 0.0), base, teacher)


def load_family(directory: Path, names: Iterable[str], **options: Any) -> list[Level]:
    """Load the named levels of a trained family, cheap to expensive; options: see `load_level`."""
    levels = [load_level(directory / m["name"], m, **options) for m in read_metadata(directory, names)]
    check_family([level for level in levels if level.teacher is None])
    return sorted(levels, key=lambda level: level.flops)


def levels_folder(directory: Path, names: Sequence[str]) -> Path:
    """The published folder if it has all these levels and `directory` has not; otherwise `directory`."""

    def has_all(folder: Path) -> bool:
        return all((folder / name / "metadata.json").is_file() for name in names)

    published = directory / PUBLISHED
    return published if not has_all(directory) and (published / INDEX).is_file() and has_all(published) else directory


def read_index(folder: Path) -> dict[str, Any] | None:
    """The content of family.json; None if the folder has none. Raises Damaged if it cannot be read."""
    path = folder / INDEX
    return read_json(path, RESTORE) if path.is_file() else None


def publish(source: Path, target: Path, levels: list[dict], repeats: list[dict], facts: dict) -> None:
    """Write the levels of the folder `source`, family.json and the model card into the folder `target`.
    levels, repeats: metadata, of the levels trained again too. facts: about images, training and the other files."""
    for m in [*levels, *repeats]:
        folder = target / m["name"]
        if "gauss" in m:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / m["gauss"]["file"], target / m["gauss"]["file"])
        sha256 = save_weights(folder / BF16, load_denoiser(source / m["name"], m), torch.bfloat16)
        snapshots = [{**m["snapshots"][-1], "file": BF16, "sha256": sha256}]
        trained = m.get("trained_weights_sha256", m["weights_sha256"])  # of a level that was taken from a published one
        own = {"weights_file": BF16, "weights_sha256": sha256, "trained_weights_sha256": trained}
        write_json(folder / "metadata.json", {**m, "snapshots": snapshots, **own})
    names = {"levels": [m["name"] for m in levels], "repeats": [m["name"] for m in repeats]}
    write_json(target / INDEX, {**names, **facts})
    write_text(target / "README.md", model_card(levels, facts))


def model_card(levels: list[dict], facts: dict) -> str:
    """The README.md of a published folder, in Markdown."""
    name, data, training, m = facts["experiment"], facts["data"], facts["training"], levels[0]
    table, (licence, terms) = "", licence_of(data)
    start = f", starting from the linear Gaussian denoiser in {m['gauss']['file']}" if "gauss" in m else ""
    for level in levels:
        unet = ", ".join(f"{key} {value}" for key, value in level["unet"].items() if value not in ([], None))
        sizes = f"{level['parameters']:,} | {level['flops'] / 1e6:.4g} | {level['images']:,}"
        teacher = level.get("teacher", {}).get("name", "–")
        table += f"| {level['name']} | {unet} | {sizes} | {teacher} | {np.mean(level['held_out']['loss']):.5f} |\n"
    commits = " and ".join(dict.fromkeys(level.get("commit", training["commit"]) for level in levels))
    return f"""---
license: {licence}
tags: [diffusion, multilevel-euler-maruyama]
---
# {facts["title"] or name}

Denoising UNets of increasing size, with EMA weights rounded to bf16: the levels of multilevel Euler-Maruyama sampling
([arXiv:2603.24594](https://arxiv.org/abs/2603.24594)). In a clone, `make sample EXPERIMENT={name}` works without
images or training. All settings are in the JSON files.

| level | UNet | parameters | MFLOP per evaluation | training images seen | teacher | held-out loss |
| --- | --- | --- | --- | --- | --- | --- |
{table}
The networks take `x = alpha * image + sigma * noise`, with {m["size"]}x{m["size"]} RGB images in [-1, 1], and a log-SNR
from {m["logsnr_range"][0]} to {m["logsnr_range"][1]}; they predict {m["target"]}{start}.
Held-out loss: mean squared error of the denoised image, before rounding, over held-out images and noise levels along
the sampler's path. A level with a teacher was trained on its denoised images, and for ML-EM.

{data["split"]["train"]:,} training images of `{data["source"]["name"]}` (SHA-256 {data["source"]["sha256"]}),
{"; ".join(data["treatment"])}; none are in this folder. Packed array: SHA-256 {data["sha256"]}. Trained with
`make train-levels EXPERIMENT={name}`, overrides `{" ".join(training["overrides"]) or "none"}`, commit
{commits}, finished {training["finished"]}, on {training["device"]}.

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
