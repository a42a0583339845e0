"""What the recipes share: options, files of weights, small random networks, and a run: calibrate, plan, sample."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

import mlem_diffusion as mlem
from mlem_diffusion import UserError

PROMPTS = ("a lighthouse in a storm", "a bowl of oranges", "a red bicycle by a wall", "a fox in the snow")


def main(recipe: Callable[[argparse.Namespace], None], doc: str | None) -> None:
    """Run a recipe with the options of the command line; bad input is one sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", metavar="WHERE", help="where the networks are, as above")
    parser.add_argument("--random", action="store_true", help="small random networks: a check, offline")
    parser.add_argument("--steps", type=int, help="budget: the cost of so many steps of the largest level (16; 5)")
    parser.add_argument("--samples", type=int, default=8, help="images to sample")
    parser.add_argument("--calibration", type=int, help="images to calibrate with (32; 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the PNG to write")
    args = parser.parse_args()
    torch.manual_seed(0)  # random networks are the same in every run
    args.steps = args.steps or (5 if args.random else 16)
    args.calibration = args.calibration or (4 if args.random else 32)
    try:
        _check(args)
        torch.manual_seed(0)  # of random networks
        recipe(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _check(args: argparse.Namespace) -> None:
    if bool(args.weights) == args.random:
        raise UserError("Give either --weights, or --random for small random networks; --help says where weights are.")
    if not 5 <= args.steps <= 64 or args.samples < 1 or args.calibration < 2:
        raise UserError("--steps is between 5 and 64, --samples at least 1, --calibration at least 2.")
    if args.out.suffix.lower() != ".png" or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: name a PNG in a folder that exists.")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device} is not available here.")


def package(name: str, source: str) -> Any:
    """A module that only this recipe needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}): it needs {source}.") from error


def present(args: argparse.Namespace, files: Mapping[str, str]) -> dict[str, Path]:
    """The files {level: path} that are in the one folder of --weights, at least two."""
    folder = Path(args.weights[0])
    found = {name: folder / file for name, file in files.items() if (folder / file).is_file()}
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} of {', '.join(files.values())}: at least two are needed.")
    return found


def load(network: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of a safetensors file, which runs no code."""
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} is no file of weights for {type(network).__name__}.") from error
    return network


def pretrained(kind: str, repo: str, **options: Any) -> Any:
    """A part of a diffusers repository, of the hub or in a folder; networks from safetensors only."""
    try:
        return getattr(package("diffusers", "pip install diffusers"), kind).from_pretrained(repo, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{repo} has no {kind} that can be loaded: {str(error).splitlines()[0]}") from error


def ready(network: nn.Module, args: argparse.Namespace) -> Any:
    return network.to(args.device).eval().requires_grad_(False)


def relatives(kind: Callable[..., nn.Module], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Random networks that differ little, as trained ones do: larger ones add small weights to those of the first."""
    networks = {name: kind(**options) for name, options in sizes.items()}
    first, *others = networks.values()
    shared = first.state_dict()
    for network in others:
        network.load_state_dict({name: shared.get(name, 0.02 * own) for name, own in network.state_dict().items()})
    return networks


class StandIn(nn.Module):
    """A small network of an image [B,4,h,w], a time [B] and a label [B]."""

    def __init__(self, depth: int, width: int = 16, labels: int = 1001):
        super().__init__()
        self.time, self.label = nn.Linear(1, width), nn.Embedding(labels, width)
        self.first, self.last = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x) + (self.time(t[:, None]) + self.label(y))[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden))
        return self.last(hidden)


def decoder(args: argparse.Namespace, repo: str) -> Callable[[Tensor], Tensor]:
    """From raw latents to images by an autoencoder of Stable Diffusion, or by a tiny random one."""
    if args.random:
        return ready(nn.Sequential(nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=8), nn.Tanh()), args)
    vae = ready(pretrained("AutoencoderKL", repo, use_safetensors=True), args)
    return lambda raw: vae.decode(raw).sample  # in float32


def text_family(args: Any, networks: Any, vae: Any, scheduler: Any, texts: Any, empty: Any, scale: float) -> tuple:
    """What `draw` takes of diffusers networks {name: network}: the levels, with classifier-free guidance by the network
    itself, at double cost; the scheduler's process; shape, latents, and conditions by seed: the prompts in turn.
    texts, empty: {condition: rows}, of the prompts and of the empty one."""
    latents, family, config = mlem.latents_of(ready(vae, args)), [], next(iter(networks.values())).config
    options, example = {"scheduler": scheduler, "latents": latents}, {key: rows[:1] for key, rows in texts.items()}
    for name, network in networks.items():
        # the example of one sample serves to count FLOPs
        with_text = mlem.from_diffusers(name, ready(network, args), conditions=example, **options)
        without = mlem.from_diffusers(name, network, conditioning=empty, **options)
        family.append(mlem.guided(with_text, without, scale))

    def conditions(seeds: Sequence[int]) -> dict[str, Tensor]:
        return {key: rows[[seed % len(rows) for seed in seeds]] for key, rows in texts.items()}

    shape = config.in_channels, config.sample_size, config.sample_size
    return family, mlem.process_of(scheduler), shape, latents, conditions


def draw(
    args: Any, rule_key: str, method: str, family: Any, process: Any, shape: Any, latents: Any, conditions: Any
) -> None:
    """Measure the family, plan for the budget, sample, decode, write the grid of images and say what it cost."""
    rule = mlem.step_rule(rule_key)
    # the budget's steps, and grids of twice and four times as many intervals, for plans that save at each evaluation
    counts = [(args.steps - 1) * finer + 1 for finer in ((1, 2) if args.random else (1, 2, 4))]
    given: dict[str, Any] = {"steps": counts, "calibrate_steps": counts[1:], "device": args.device, "batch": 8}
    given |= {"conditions": conditions, "seeds": range(10**6, 10**6 + args.calibration)}  # not those of the images
    with tqdm(desc="calibrate", unit="GFLOP", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        measured = mlem.calibrate(family, process, rule, shape, **given, progress=progress)

    def alone(steps: int) -> float:  # the cost of the largest level; a guide may rest at some noise levels
        return float(steps * measured.costs[-1] + measured.base_cost(measured.grids[steps]))

    plan = measured.plan(method, cost=alone(args.steps))
    path = mlem.BrownianPath(range(args.samples), shape, args.device, conditions)
    images, ledger = mlem.sample(plan.build(family), rule, process.grid(plan.steps), path, latents.decode)
    save_image(images.clamp(-1, 1) / 2 + 0.5, args.out, nrow=4)
    print(f"Plan: {method}, {plan.steps} steps of {rule.label}, predicted squared error {plan.predicted:.3g}")
    error = measured.own_errors[len(family) - 1, args.steps]
    print(f"{family[-1].name} alone at the budget's cost, in {args.steps} steps: {error:.3g}")
    for name, flops, own in zip(plan.levels, ledger.flops, ledger.per_sample.mean(axis=0), strict=True):
        print(f"  {name:<20}{flops / 1e9:10.4g} GFLOPs, {own:6.2f} evaluations per image")
    if measured.base:
        print(f"  {'guide':<20}{measured.base / 1e9:10.4g} GFLOPs, {ledger.base_flops / measured.base:6.2f} of them")
    share = ledger.flops_per_image / alone(plan.steps)
    print(f"Cost: {share:.3f} of {family[-1].name} alone in these {plan.steps} steps. Images: {args.out}")
