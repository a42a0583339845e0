"""Three changes to the levels of a telescope, tried on CelebA at 16x16: do coins cost less? Writes JSON beside it.

A family is `gauss`, a narrow and a largest network (`unet.precondition: gaussian`). The narrow one is w4, trained on
data, or t4: w4 trained further on the largest network's denoised image instead of the clean one.

    residual: the largest network starts from the narrow level's output instead of that of `gauss`
    ema: averages of the largest network's weights over shorter and longer parts of its training
    noise: other distributions of the noise levels in the training of the narrow networks

S is what coins cost at a squared error of 1 (multilevel/outlook.py), here always in evaluations of the ordinary largest
network. `measured` holds rms errors against each family's own reference, on seeds that no plan was made with.
From the root, after `make data EXPERIMENT=celeba32 SOURCE=...`:

    python results/telescope/trials.py residual data/celeba32 --seed 0
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import Tensor, nn

from mlem_diffusion.data.pixels import to_float
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level, flops_per_evaluation, shared_costs
from mlem_diffusion.diffusion.process import LinearSchedule, Process, add_noise, alpha2_weights, expand
from mlem_diffusion.diffusion.reference import reference_steps, sample_reference
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import StepRule, step_rule
from mlem_diffusion.gamma.measurement import noise_levels, squared_differences
from mlem_diffusion.models.gaussian import GaussianDenoiser, fit_gaussian
from mlem_diffusion.models.unet import Denoiser, UNet
from mlem_diffusion.multilevel.gains import Effects, measure_effects
from mlem_diffusion.multilevel.outlook import law
from mlem_diffusion.multilevel.planner import Calibration
from mlem_diffusion.statistics import squared_errors
from mlem_diffusion.training.levels import TrainConfig
from mlem_diffusion.training.loop import train_level

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "preconditioning"))
from forms import pictures  # noqa: E402

PROCESS = Process(LinearSchedule(0.1, 20.0), -9.0, 9.0, 2049, "logsnr")
SIZE, NARROW, LARGEST = 16, 4, 16
RULES = {rule: step_rule(rule) for rule in ("sde/ddpm", "ode/dpmpp_2m")}
SEEDS, STEPS = range(32), 16  # paths and evaluations on which S is measured
JUDGED = range(1000, 1032)  # seeds of the measured errors
PLANNED = {"sde": (8, 16, 32), "ode": (6, 8, 12, 16)}  # numbers of steps of the plans; see COSTS for their costs
COSTS = (1.5, 2.5, 4.0, 7.0)
HELD_OUT = 128  # images
FULL = 45056  # images for which the half-lives below are meant; shorter runs have proportionally shorter ones
HALFLIVES = (500, 2000, 8000, 32000)


class Residual(Denoiser):
    """f^k = f^(k-1) + c g(x, f^(k-1)): the lower level is frozen, c the root of its mean squared error by log-SNR."""

    def __init__(
        self, unet: nn.Module, rms: float, gauss: GaussianDenoiser, lower: Denoiser, scale: Tensor, both: bool
    ):
        super().__init__(unet, rms, "v", gauss)
        self.lower, self.scale, self.both = (lower,), scale, both

    def _parts(self, x: Tensor, logsnr: Tensor, common: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        u, rms = expand(logsnr.float(), x), self.data_rms
        given = torch.rsqrt(torch.sigmoid(u) * rms**2 + torch.sigmoid(-u)) * x
        assert self.gauss is not None
        linear = self.gauss(x, logsnr) if common is None else common
        lower = self.lower[0](x, logsnr, linear)
        inputs = [given, linear / rms, lower / rms] if self.both else [given, lower / rms]
        return torch.cat(inputs, dim=1), lower, interpolated(self.scale, u)


class Averaged(Denoiser):
    """A network that keeps further averages of its weights while it is trained, by half-life in images."""

    def __init__(self, unet: nn.Module, rms: float, gauss: GaussianDenoiser, halflives: Sequence[float]):
        super().__init__(unet, rms, "v", gauss)
        self.seen, self.averages = 0, {h: [p.detach().clone() for p in unet.parameters()] for h in halflives}

    @torch.no_grad()
    def average(self, images: int) -> None:
        self.seen += images
        for halflife, average in self.averages.items():
            weight = 1 - 0.5 ** (images / min(halflife, self.seen))  # at most all that was seen so far
            torch._foreach_lerp_(average, list(self.unet.parameters()), weight)

    def loss(self, x: Tensor, x0: Tensor, logsnr: Tensor) -> Tensor:
        self.average(len(x))  # of the weights after the previous step
        return super().loss(x, x0, logsnr)


@dataclass(frozen=True)
class Mixture:
    """Noise levels in training: a part uniform in log-SNR, the others normal, both within the process's range."""

    uniform: float
    mean: float = 0.0
    sd: float = 1.0

    def logsnr_at(self, s: np.ndarray) -> np.ndarray:
        u = np.linspace(PROCESS.logsnr_min, PROCESS.logsnr_max, 20001)
        normal = norm.cdf(u, self.mean, self.sd)
        normal = (normal - normal[0]) / (normal[-1] - normal[0])
        cumulative = self.uniform * np.linspace(0, 1, len(u)) + (1 - self.uniform) * normal
        return np.interp(s, cumulative, u)


NOISE = {
    "uniform": Mixture(1.0), "half normal": Mixture(0.5, 0.0, 2.5), "EDM2": Mixture(0.0, 0.8, 2.0),
    "half EDM2": Mixture(0.5, 0.8, 2.0),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Images, their rms and Gaussian denoiser, and how to train on them; trained networks are kept in `folder`."""

    seen: np.ndarray
    held_out: Tensor
    rms: float
    gauss: GaussianDenoiser
    images: int
    narrow_images: int
    seed: int
    folder: Path

    def unet(self, width: int, inputs: int = 6) -> UNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 * self.seed + width)
            return UNet(width, SIZE, [1, 2, 2], blocks=1, attention=[8], inputs=inputs)

    def trained(self, name: str, network: Denoiser, noise: Any = PROCESS, teacher: Denoiser | None = None) -> Denoiser:
        """The moving average of the network, trained as celeba32 trains; or as it was kept under this name."""
        file = self.folder / f"{name}.safetensors"
        average, start = copy.deepcopy(network).eval().requires_grad_(False), time.process_time()
        if not file.is_file():
            narrow = network.unet.enter.out_channels == NARROW  # pyright: ignore
            images, batch = (self.narrow_images, 16) if narrow else (self.images, 32)
            settings = {"lr": 4e-3, "warmup_images": 1500, "ema_halflife": 3000, "ema_ramp": 0.1, "seed": self.seed}
            config = TrainConfig(images=images, batch=batch, **settings, snapshots=[1.0])
            network.requires_grad_(True)
            with tempfile.TemporaryDirectory() as scratch:
                average = train_level(network, self.seen, noise, config, Path(scratch), teacher=teacher)
            self.keep(name, list(average.unet.parameters()))
            for halflife, weights in getattr(network, "averages", {}).items():
                self.keep(f"{name}-{halflife:g}", weights)
            if isinstance(network, Averaged):
                self.keep(f"{name}-raw", list(network.unet.parameters()))
            print(f"{name}: {time.process_time() - start:.0f} s", flush=True)
        return self.kept(name, average)

    def keep(self, name: str, weights: Sequence[Tensor]) -> None:
        values = {str(i): w.detach().contiguous().clone() for i, w in enumerate(weights)}
        save_file(values, self.folder / f"{name}.safetensors")

    def kept(self, name: str, like: Denoiser) -> Denoiser:
        """A copy of a network with the weights kept under this name."""
        out = copy.deepcopy(like).eval().requires_grad_(False)
        values = load_file(self.folder / f"{name}.safetensors")
        for i, p in enumerate(out.unet.parameters()):
            p.copy_(values[str(i)])
        return out

    def data_trained(self, noise: str = "uniform") -> Denoiser:
        network = Denoiser(self.unet(NARROW), self.rms, "v", self.gauss)
        return self.trained(f"w4 {noise}", network, NOISE[noise])

    def distilled(self, teacher: Denoiser, noise: str = "uniform", of: str = "") -> Denoiser:
        student = Denoiser(copy.deepcopy(self.data_trained().unet), self.rms, "v", self.gauss)
        return self.trained(f"t4 {noise}{of}", student, NOISE[noise], teacher)

    def largest(self) -> Averaged:
        halflives = [h * self.images / FULL for h in HALFLIVES]
        network: Any = self.trained("w16", Averaged(self.unet(LARGEST), self.rms, self.gauss, halflives))
        return network

    def level(self, name: str, denoiser: Denoiser) -> Level:
        """A level; the FLOPs of a residual one are without its lower level, which the telescope evaluates anyway."""
        network: Any = denoiser.unet
        base = self.gauss.as_level()
        return Level(name, denoiser, flops_per_evaluation(network, (network.inputs, SIZE, SIZE)) + base.flops, base)

    def row(self, variant: str) -> dict[str, Any]:
        return {"variant": variant, "seed": self.seed, "images": self.images, "narrow_images": self.narrow_images}


def interpolated(table: Tensor, u: Tensor) -> Tensor:
    """The values at log-SNRs u of a table at equal distances over the process's range."""
    where = (u - PROCESS.logsnr_min) / (PROCESS.logsnr_max - PROCESS.logsnr_min) * (len(table) - 1)
    low = where.floor().long().clamp(0, len(table) - 2)
    return torch.lerp(table[low], table[low + 1], where - low)


@torch.no_grad()
def root_errors(denoiser: Denoiser, seen: np.ndarray, points: int = 19, images: int = 512) -> Tensor:
    """The root of the mean squared error on training images [points], at equal distances in log-SNR."""
    x0, generator = to_float(seen[:images], torch.device("cpu")), torch.Generator().manual_seed(0)
    errors = []
    for u in torch.linspace(PROCESS.logsnr_min, PROCESS.logsnr_max, points):
        x = add_noise(x0, torch.randn(x0.shape, generator=generator), u.expand(len(x0)))
        errors.append((denoiser(x, u) - x0).square().mean().sqrt())
    return torch.stack(errors)


def losses(data: Data, largest: Level, narrow: Sequence[Level]) -> dict[str, Any]:
    """Held-out losses, and squared differences to the largest level, pooled with alpha^2 d(logsnr)."""
    levels, where = [data.gauss.as_level(), *narrow, largest], noise_levels(PROCESS, 12)
    last = len(levels) - 1
    pairs = [*((k, None) for k in range(last + 1)), *((k, last) for k in range(last))]
    found = squared_differences(levels, pairs, data.held_out, where).mean(1) @ alpha2_weights(where)
    names = [level.name for level in levels]
    to_largest = dict(zip(names, found[last + 1 :], strict=False))
    return {"loss": dict(zip(names, found, strict=False)), "to_largest": to_largest}


def effects_of(data: Data, largest: Level, narrow: Sequence[Level], rule: StepRule) -> Effects:
    """The effects of all levels, which are kept beside the networks."""
    levels = [data.gauss.as_level(), *narrow, largest]
    name = f"{rule.dynamics} {' '.join(level.name for level in levels)} {STEPS}".replace("/", "-")
    if (file := data.folder / f"{name}.npz").is_file():
        return Effects.load(file)
    levels = [replace(level, flops=level.flops + i) for i, level in enumerate(levels)]  # distinct, as is required
    found = measure_effects(levels, rule, PROCESS.grid(STEPS), BrownianPath(SEEDS, data.held_out.shape[1:], "cpu"))
    found.save(file)
    return found


def chosen(effects: Effects, names: Sequence[str]) -> Effects:
    """The effects of a part of the levels."""
    at = [effects.names.index(name) for name in names]
    values = np.diff(effects.values.cumsum(2)[:, :, at], axis=2, prepend=0)
    return replace(effects, names=tuple(names), flops=effects.flops[at], values=values, squares=effects.squares[at])


def chain_cost(effects: Effects, chain: Sequence[str], costs: Sequence[float]) -> float:
    """S of a chain of levels whose first runs at every evaluation; costs: of the levels, beyond `gauss`."""
    at, root = [effects.names.index(name) for name in chain], 0.0
    for i in range(1, len(at)):
        spread = np.sqrt((effects.difference(at[i - 1], at[i]) ** 2).mean(axis=0)).sum()
        root += spread * np.sqrt(costs[i] + (costs[i - 1] if i > 1 else 0.0))
    return float(root**2)


def s_of(data: Data, effects: Effects, narrow: Level, largest: Level) -> dict[str, Any]:
    """S of gauss + narrow + largest and of gauss + largest, where a residual level pays for its lower one as well."""
    base = data.gauss.as_level().flops
    unit = data.level("ordinary", Denoiser(data.unet(LARGEST), data.rms, "v", data.gauss)).flops
    own, below = (largest.flops - base) / unit, (narrow.flops - base) / unit
    alone = own + (below if isinstance(largest.denoise, Residual) else 0.0)
    three = chain_cost(effects, ["gauss", narrow.name, largest.name], [0.0, below, own])
    return {"three": three, "two": chain_cost(effects, ["gauss", largest.name], [0.0, alone])}


def measured(data: Data, effects: Effects, rule: StepRule, narrow: Level, largest: Level) -> dict[str, Any]:
    """D and q of the largest level alone, and rms errors on fresh seeds of plans with independent coins.

    As `planner.calibrate`, with plans only for the largest level. Costs in evaluations of the ordinary largest level;
    a residual level that runs without its lower level in the plan pays for that too."""
    family, shape = [data.gauss.as_level(), narrow, largest], data.held_out.shape[1:]
    planned = PLANNED[rule.dynamics]
    steps = reference_steps(PROCESS, planned)
    unit = data.level("ordinary", Denoiser(data.unet(LARGEST), data.rms, "v", data.gauss)).flops
    path, fresh = BrownianPath(SEEDS, shape, "cpu"), BrownianPath(JUDGED, shape, "cpu")
    fine, own = sample_reference(largest, rule.dynamics, PROCESS, steps, path)[0], {}
    for count in planned:
        images = sample(SingleLevel(largest), rule, PROCESS.grid(count), path)[0]
        own[2, count] = float(squared_errors(images, fine).mean())
    grids = {count: PROCESS.grid(count).logsnr for count in planned}
    costs, base = shared_costs(family)
    part = chosen(effects, [level.name for level in family])
    found = Calibration(part, grids, own, costs, base=base)
    d, q = law({count: error for (_, count), error in own.items()})
    fine, rows = sample_reference(largest, rule.dynamics, PROCESS, steps, fresh)[0], []
    for cost in COSTS:
        plan = found.plan("independent", cost=cost * unit)
        error = squared_errors(sample(plan.build(family), rule, PROCESS.grid(plan.steps), fresh)[0], fine)
        spent = plan.cost / unit
        if isinstance(largest.denoise, Residual) and narrow.name not in plan.levels:
            top = plan.build(family).expected_evaluations(plan.steps)[-1]
            spent += float(top) * (narrow.flops - base) / unit
        row = {"cost": spent, "steps": plan.steps, "levels": len(plan.levels), "predicted": plan.predicted}
        rows.append(row | {"rms": float(np.sqrt(error.mean())), "se": float(error.std() / len(error) ** 0.5)})
    return {"D": d, "q": q, "own": {n: e for (_, n), e in own.items()}, "plans": rows}


def speedup(plain: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float | None:
    """Cost of the plans `plain` over that of `other`, geometric mean over the rms errors that both reach."""
    curves = [np.log([(row["rms"], row["cost"]) for row in reversed(rows)]).T for rows in (plain, other)]
    low, high = max(c[0].min() for c in curves), min(c[0].max() for c in curves)
    if low >= high:
        return None
    middle = 0.5 * (low + high)  # a factor of 2 in rms error, or what there is of it
    at = np.linspace(max(low, middle - np.log(2) / 2), min(high, middle + np.log(2) / 2), 33)
    first, second = (np.interp(at, *c[:, np.argsort(c[0])]) for c in curves)
    return float(np.exp((first - second).mean()))


class Rows:
    """The rows of one JSON file, written after every change."""

    def __init__(self, file: Path):
        self.file, self.rows = file, json.loads(file.read_text()) if file.is_file() else []

    def add(self, row: dict[str, Any]) -> None:
        def key(r: dict[str, Any]) -> list[Any]:
            return [r[name] for name in ("variant", "seed", "images", "narrow_images")]

        row = rounded(next((r for r in self.rows if key(r) == key(row)), {}) | row)
        self.rows = [r for r in self.rows if key(r) != key(row)] + [row]
        self.file.write_text("[\n" + ",\n".join(json.dumps(r) for r in self.rows) + "\n]\n")
        print(json.dumps(row), flush=True)

    def find(self, row: dict[str, Any]) -> dict[str, Any]:
        return next((r for r in self.rows if all(r[k] == v for k, v in row.items())), row)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


Family = tuple[Level, Level]  # narrow and largest
Job = tuple["Rows", dict[str, Family], dict[str, dict[str, Effects]]]  # what to judge; the first family is the standard


def compare(data: Data, rows: Rows, families: dict[str, Family], rules: Sequence[str]) -> dict[str, dict[str, Effects]]:
    """Losses and S of each family, in a row each; the first is what the others are compared with."""
    kept: dict[str, dict[str, Effects]] = {}
    groups: dict[int, list[str]] = {}  # families with the same largest network are measured together
    for name, (_, largest) in families.items():
        groups.setdefault(id(largest), []).append(name)
    for names in groups.values():
        largest = families[names[0]][1]
        narrow = list({families[name][0].name: families[name][0] for name in names}.values())
        found = losses(data, largest, narrow)
        effects = {rule: effects_of(data, largest, narrow, RULES[rule]) for rule in rules}
        for name in names:
            kept[name], low = effects, families[name][0]
            row = data.row(name) | {"loss": found["loss"][largest.name], "narrow_loss": found["loss"][low.name]}
            row |= {"gauss_to_largest": found["to_largest"]["gauss"], "to_largest": found["to_largest"][low.name]}
            rows.add(row | {"S": {rule: s_of(data, e, low, largest) for rule, e in effects.items()}})
    return kept


def judge(data: Data, jobs: Sequence[Job], rule: str) -> None:
    """Measured errors of the first family of each job and of the others, and the others' speed-up over the first."""
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for rows, families, effects in jobs:
        plain: list[dict[str, Any]] = []
        for name, (narrow, largest) in families.items():
            key = narrow.name, largest.name
            if key not in done:
                done[key] = measured(data, effects[name][rule], RULES[rule], narrow, largest)
            plain = plain or done[key]["plans"]
            before = rows.find(data.row(name)).get("measured", {})
            found = done[key] | {"speedup": speedup(plain, done[key]["plans"])}
            rows.add(data.row(name) | {"measured": before | {rule: found}})


def residual(data: Data, rows: Rows, rules: Sequence[str], kinds: Sequence[str]) -> list[Job]:
    top = data.largest()
    lower = {"t4": data.distilled(top), "w4": data.data_trained()}
    largest = data.level("w16", top)
    families = {f"ordinary, {name}": (data.level(name, v), largest) for name, v in lower.items()}
    effects = compare(data, rows, families, rules)
    for kind in kinds:
        name, both = kind.split()[-1], "gauss" in kind
        unet = data.unet(LARGEST, 9 if both else 6)
        network = Residual(unet, data.rms, data.gauss, lower[name], root_errors(lower[name], data.seen), both)
        variant, own = f"residual, inputs {kind}", data.trained(f"r16 {kind}", network)
        families[variant] = data.level(name, lower[name]), data.level(f"r16 {kind}", own)
        effects |= compare(data, rows, {variant: families[variant]}, rules)

    def cost(name: str) -> float:
        return min(rows.find(data.row(name))["S"][rules[0]].values())

    best = [min((v for v in families if v.startswith(kind)), key=cost) for kind in ("ordinary", "residual")]
    return [(rows, {name: families[name] for name in best}, effects)]


def ema(data: Data, rows: Rows, rules: Sequence[str], kinds: Sequence[str]) -> list[Job]:
    top = data.largest()
    names = {"usual": "w16", "raw": "w16-raw"} | {f"{h}": f"w16-{h * data.images / FULL:g}" for h in HALFLIVES}
    versions = {name: data.kept(file, top) for name, file in names.items()}
    w4, t4 = data.level("w4", data.data_trained()), data.level("t4", data.distilled(top))
    loss: dict[str, float] = {}
    for name, version in versions.items():
        found = losses(data, data.level("w16", version), [w4, t4])
        loss[name] = found["loss"]["w16"]
        rows.add(data.row(f"average {name}") | {"loss": loss[name], "to_largest": found["to_largest"]})
    best = min((name for name in versions if name not in ("usual", "raw")), key=lambda name: loss[name])
    student = data.level(f"t4 of {best}", data.distilled(versions[best], of=f" of {best}"))
    families = {"usual": (t4, data.level("w16", top))}
    families[f"t4 of {best}"] = student, data.level(f"w16 of {best}", versions[best])
    return [(rows, families, compare(data, rows, families, rules))]


def noise(data: Data, rows: Rows, rules: Sequence[str], kinds: Sequence[str]) -> list[Job]:
    top = data.largest()
    made = {f"t4 {name}": data.distilled(top, name) for name in NOISE}
    made |= {f"w4 {name}": data.data_trained(name) for name in NOISE}
    largest = data.level("w16", top)
    compare(data, rows, {name: (data.level(name, v), largest) for name, v in made.items()}, rules)
    return []


TRIALS: dict[str, Callable[[Data, Rows, Sequence[str], Sequence[str]], list[Job]]] = {
    "residual": residual, "ema": ema, "noise": noise,
}  # fmt: skip
RESIDUALS = ("x t4", "x gauss t4", "x w4")  # what the residual network sees; the last is its lower level


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", help=f"of {', '.join(TRIALS)}, with commas")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=FULL)
    parser.add_argument("--narrow-images", type=int, default=None, help="as many as --images unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", default=",".join(RULES), help="step rules for S")
    parser.add_argument("--judged", default=",".join(RULES), help="step rules whose errors are measured")
    parser.add_argument("--residuals", default=",".join(RESIDUALS), help="inputs of the residual networks")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "telescope", help="trained networks")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    seen, unseen, rms = pictures(given.folder, SIZE)
    narrow_images = given.narrow_images or given.images
    folder = given.keep / f"{given.images}-{narrow_images}-seed{given.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = to_float(unseen[:HELD_OUT], torch.device("cpu"))
    with torch.no_grad():
        gauss = fit_gaussian(seen)
    data = Data(seen, held_out, rms, gauss, given.images, narrow_images, given.seed, folder)
    jobs: list[Job] = []
    for name in given.trials.split(","):
        rows, rules = Rows(given.out / f"{name}.json"), given.rules.split(",")
        jobs += TRIALS[name](data, rows, rules, given.residuals.split(","))
    for rule in given.judged.split(","):
        judge(data, jobs, rule)
