"""Ways in which a network can know the Gaussian part of its data, tried on CelebA; writes the JSON files beside it.

The form "skip and input" is mlem_diffusion's `unet.precondition: gaussian`; the others live here only. From the root,
after `make data EXPERIMENT=celeba32 SOURCE=...`, and with ARGS="data.size=64 data.name=celeba64" for `fit`:

    python results/preconditioning/forms.py train data/celeba32 --size 16 --widths 4,16
    python results/preconditioning/forms.py local data/celeba32
    python results/preconditioning/forms.py fit data/celeba64
"""

import argparse
import copy
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlem_diffusion.data import images as datasets
from mlem_diffusion.data.pixels import to_float
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level, flops_per_evaluation, shared_costs
from mlem_diffusion.diffusion.process import LinearSchedule, Process, alpha2_weights, expand
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.gamma.measurement import noise_levels, squared_differences
from mlem_diffusion.models.gaussian import GaussianDenoiser, fit_gaussian
from mlem_diffusion.models.unet import Denoiser, UNet
from mlem_diffusion.multilevel.gains import measure_effects
from mlem_diffusion.multilevel.outlook import variance_cost
from mlem_diffusion.training.levels import TrainConfig
from mlem_diffusion.training.loop import train_level

HERE = Path(__file__).parent
PROCESS = Process(LinearSchedule(0.1, 20.0), -9.0, 9.0, 2049, "logsnr")
SEEDS, STEPS = 32, 32  # paths and evaluations on which S is measured
LOW_RANK = 32  # principal directions whose gains are learned


class Scalar(Denoiser):
    """The standard: skip, input and scale are multiples of x, by EDM's constants."""

    takes_gauss = False

    def __init__(self, unet: nn.Module, rms: float, gauss: GaussianDenoiser):
        super().__init__(unet, rms, "v", gauss)
        self.of_logsnr = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, self.learned()))
        nn.init.zeros_(self.of_logsnr[-1].weight)
        nn.init.zeros_(self.of_logsnr[-1].bias)

    def learned(self) -> int:
        return 1

    def learn(self, logsnr: Tensor, x: Tensor) -> Tensor:
        """Functions of the log-SNR [B, learned], zero at first."""
        u = logsnr.float().expand(len(x))[:, None]
        return self.of_logsnr(torch.cos(u * torch.logspace(-1.5, 0.5, 16, device=x.device)))

    def scalar(self, x: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = expand(logsnr.float(), x)
        alpha, sigma, rms = torch.sigmoid(u).sqrt(), torch.sigmoid(-u).sqrt(), self.data_rms
        scale = torch.rsqrt((alpha * rms) ** 2 + sigma**2)
        return scale * x, alpha * rms**2 * scale**2 * x, sigma * rms * scale

    def gaussian(self, x: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        assert self.gauss is not None
        return self.gauss(x, logsnr), expand(self.gauss.mean_variance(logsnr.float()).sqrt(), x)

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.scalar(x, logsnr)


class Skip(Scalar):
    """gauss(x) as skip; the network sees x alone."""

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.scalar(x, logsnr)[0], *self.gaussian(x, logsnr)


class Input(Scalar):
    """gauss(x) as three more input channels; the skip is standard."""

    takes_gauss = True

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        given, skip, out = self.scalar(x, logsnr)
        return torch.cat([given, self.gaussian(x, logsnr)[0] / self.data_rms], dim=1), skip, out


class SkipAndInput(Input):
    """Both: `unet.precondition: gaussian`."""

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return Denoiser._parts(self, x, logsnr, common)


class Gated(Input):
    """Both, with a learned mix of the two skips per noise level; 95% Gaussian at first."""

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        (given, skip, _), (linear, c) = self.scalar(x, logsnr), self.gaussian(x, logsnr)
        gate = torch.sigmoid(self.learn(logsnr, x) - 3)[:, :, None, None]
        given = torch.cat([given, linear / self.data_rms], dim=1)
        return given, torch.lerp(linear, skip, gate), c  # a learned scale would change the loss's weights


class LowRank(Input):
    """Both, with a learned change of the gains of the first principal directions per noise level."""

    def learned(self) -> int:
        return LOW_RANK

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        (given, _, _), (linear, c) = self.scalar(x, logsnr), self.gaussian(x, logsnr)
        assert self.gauss is not None
        basis = self.gauss.basis[:, :LOW_RANK]
        change = ((linear - self.gauss.mean).flatten(1) @ basis * self.learn(logsnr, x)) @ basis.T
        return torch.cat([given, linear / self.data_rms], dim=1), linear + change.reshape(x.shape), c


FORMS: dict[str, type[Scalar]] = {
    "scalar": Scalar, "skip": Skip, "input": Input, "skip and input": SkipAndInput, "gated": Gated,
    "low-rank": LowRank,
}  # fmt: skip


def pictures(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Training and held-out images, uint8 [N,3,size,size], averaged down if the folder's are larger, and their rms."""
    data = datasets.load(folder)
    side = data.images.shape[-1] // size
    small = np.asarray(data.images).reshape(-1, 3, size, side, size, side).mean((3, 5))
    small = np.round(small).astype(np.uint8)
    train = small[data.train()]
    return train, small[data.held_out()], float(np.sqrt(np.mean((train[:4096] / 127.5 - 1) ** 2)))


def train(folder: Path, size: int, widths: list[int], images: int, forms: list[str], seed: int) -> list[dict[str, Any]]:
    """Train each form at each width; losses, differences and S after a quarter, a half and all of the images."""
    seen, unseen, rms = pictures(folder, size)
    gauss, found = fit_gaussian(seen), []
    held_out = to_float(unseen[:512], torch.device("cpu"))
    for form in forms:
        made: dict[int, dict[int, Denoiser]] = {}  # width -> images seen -> denoiser
        for width in widths:
            made[width] = trained(FORMS[form], width, seen, rms, gauss, images, seed)
        for count in made[widths[0]]:
            levels = [gauss.as_level(), *(as_level(made[w][count], f"w{w}", size, gauss) for w in widths)]
            found.append({"form": form, "size": size, "images": count, "seed": seed, **measured(levels, held_out)})
            print(json.dumps(found[-1]), flush=True)
    return found


def trained(
    form: type[Scalar], width: int, seen: np.ndarray, rms: float, gauss: GaussianDenoiser, images: int, seed: int
) -> dict[int, Denoiser]:
    """A denoiser of this form, trained as celeba32 does; its moving averages by images seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 * seed + width)
        shape = {"multipliers": [1, 2, 2], "blocks": 1, "attention": [8]}
        network = form(UNet(width, seen.shape[-1], **shape, inputs=6 if form.takes_gauss else 3), rms, gauss)
    kept: dict[int, Denoiser] = {}

    def keep(count: int, ema: Denoiser) -> None:
        kept[count] = copy.deepcopy(ema)

    settings = {"batch": 32, "lr": 4e-3, "warmup_images": 1500, "ema_halflife": 3000, "ema_ramp": 0.1}
    config = TrainConfig(images=images, seed=seed, **settings)
    with tempfile.TemporaryDirectory() as scratch:
        train_level(network, seen, PROCESS, config, Path(scratch), snapshot=keep)
    return kept


def as_level(denoiser: Denoiser, name: str, size: int, gauss: GaussianDenoiser) -> Level:
    """The level; every form but the scalar one shares the Gaussian denoiser as its base."""
    base = None if type(denoiser) is Scalar else gauss.as_level()
    network: Any = denoiser.unet
    flops = flops_per_evaluation(network, (network.inputs, size, size)) + (base.flops if base else 0.0)
    return Level(name, denoiser, flops, base)


def measured(levels: list[Level], held_out: Tensor) -> dict[str, Any]:
    """Losses and squared differences pooled with alpha^2 d(logsnr), and S for the SDE, of gauss and the networks."""
    where, last = noise_levels(PROCESS, 12), len(levels) - 1
    pairs = [*((k, None) for k in range(last + 1)), *((k, last) for k in range(last))]
    found = squared_differences(levels, pairs, held_out, where).mean(1) @ alpha2_weights(where)
    names = [level.name for level in levels]
    out: dict[str, Any] = {"loss": dict(zip(names, found, strict=False))}
    out["to_largest"] = dict(zip(names, found[last + 1 :], strict=False))
    path = BrownianPath(range(SEEDS), held_out.shape[1:], "cpu")
    effects = measure_effects(levels, step_rule("sde", "ddpm"), PROCESS.grid(STEPS), path)
    costs, base = shared_costs(levels)
    out["S"], chain = variance_cost(effects, costs, float(costs[-1]) + base)
    return out | {"chain": [names[k] for k in chain]}


def local(folder: Path) -> list[dict[str, Any]]:
    """Errors of linear denoisers that see a window of pixels, by log-SNR, beside that of the global Gaussian one.

    A window's covariance is the same at every place; the mean image is taken off, and zeros stand beyond the border.
    Held-out images judge both."""
    found = []
    for size in (32, 16):
        seen, unseen, _ = pictures(folder, size)
        gauss, test = fit_gaussian(seen), to_float(unseen, torch.device("cpu"))
        centred = [to_float(seen[:1536], torch.device("cpu")) - gauss.mean, test[:512] - gauss.mean]
        for side in (3, 5, 7, 9):
            every = side * side // 3 | 1  # odd, so that all columns of pixels are seen
            rows = [
                F.unfold(v, side, padding=side // 2).transpose(1, 2).flatten(0, 1)[::every].double() for v in centred
            ]
            own, other = (r.T @ r / len(r) for r in rows)
            middle = torch.arange(3) * side * side + side * side // 2
            for u in range(-8, 9, 2):
                found.append({"size": size, "window": side, "logsnr": u, "error": window_error(own, other, middle, u)})
        for u in range(-8, 9, 2):
            generator = torch.Generator().manual_seed(u + 100)
            at = torch.tensor(float(u))
            x = torch.sigmoid(at).sqrt() * test
            x = x + torch.sigmoid(-at).sqrt() * torch.randn(test.shape, generator=generator)
            error = float((gauss(x, at) - test).square().mean())
            found.append({"size": size, "window": None, "logsnr": u, "error": error})
    return found


def window_error(own: Tensor, other: Tensor, middle: Tensor, u: float) -> float:
    """The mean squared error at the middle pixel, on data of covariance `other`, of the denoiser made for `own`."""
    alpha2, sigma2 = (float(torch.sigmoid(torch.tensor(v, dtype=torch.float64))) for v in (float(u), -float(u)))
    eye = torch.eye(len(own), dtype=own.dtype)
    gain = torch.linalg.solve(alpha2 * own + sigma2 * eye, alpha2**0.5 * own[:, middle])  # [D, 3]
    off = eye[:, middle] - alpha2**0.5 * gain
    return float(((off * (other @ off)).sum() + sigma2 * gain.square().sum()) / 3)


def fit(folder: Path) -> list[dict[str, Any]]:
    """Rank, time and memory of the fit, and held-out losses (mean over log-SNRs from -8 to 8) by rank."""
    data = datasets.load(folder)
    seen, test = data.images[data.train()], to_float(data.images[data.held_out()[:512]], torch.device("cpu"))
    before, start = _peak(), time.perf_counter()
    gauss = fit_gaussian(seen)
    seconds, used, rank = time.perf_counter() - start, _peak() - before, gauss.basis.shape[1]
    losses = {}
    for r in sorted({16, 32, 64, 128, rank}):
        extra = gauss.variances[r:].sum() + gauss.residual * (gauss.basis.shape[0] - rank)
        part = GaussianDenoiser(gauss.mean, gauss.basis[:, :r], gauss.variances[:r], extra / (gauss.basis.shape[0] - r))
        losses[r] = float(np.mean([_loss(part, test, u) for u in range(-8, 9, 2)]))
    facts = {"size": seen.shape[-1], "images": len(seen), "rank": rank, "seconds": seconds, "more_memory_gb": used}
    return [facts | {"loss_by_rank": losses, "threads": torch.get_num_threads()}]


def _loss(gauss: GaussianDenoiser, test: Tensor, u: int) -> float:
    at, generator = torch.tensor(float(u)), torch.Generator().manual_seed(u + 100)
    noise = torch.sigmoid(-at).sqrt() * torch.randn(test.shape, generator=generator)
    return float((gauss(torch.sigmoid(at).sqrt() * test + noise, at) - test).square().mean())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "local", "fit"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--widths", default="4,16")
    parser.add_argument("--images", type=int, default=11264)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    widths = [int(w) for w in given.widths.split(",")]
    jobs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "train": lambda: train(given.folder, given.size, widths, given.images, given.forms.split(","), given.seed),
        "local": lambda: local(given.folder),
        "fit": lambda: fit(given.folder),
    }
    name = f"train-{given.size}-{given.images}-seed{given.seed}.json" if given.what == "train" else f"{given.what}.json"
    out = given.out or HERE / name
    out.write_text(json.dumps(jobs[given.what](), indent=1) + "\n")
