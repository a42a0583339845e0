"""What guidance costs the multilevel estimator, with a guide for all levels or one per level: on a toy, and on two
small networks trained here -> guidance.json, .csv, .png and portraits.png in results/guidance/ (docs/guidance.md)."""

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlem_diffusion import BrownianPath, Level, LinearSchedule, Process, SingleLevel, adapt, guided, sample, step_rule
from mlem_diffusion.data.portraits import portrait
from mlem_diffusion.diffusion.conditions import bound
from mlem_diffusion.diffusion.level import runs_base, shared_costs
from mlem_diffusion.diffusion.process import add_noise, expand
from mlem_diffusion.figures import style
from mlem_diffusion.figures.style import COLOURS, MARKERS, comparison_grid, save
from mlem_diffusion.files import atomic_write, write_json
from mlem_diffusion.models.analytic import GaussianMixture, smooth_field
from mlem_diffusion.multilevel.gains import firing_costs, measure_effects
from mlem_diffusion.multilevel.planner import Calibration
from mlem_diffusion.statistics import squared_errors

NULL, LABELS, SIZE = 4, "class_labels", 16  # the label of no class; the classes are 0 to 3
SHARES = {"few": 0.15, "many": 0.5}  # evaluations of the largest network per step that plans add to the small level
Pair = tuple[list[Level], list[Level], tuple[int, ...]]  # D_1, D_2; the same without a class, U_1, U_2; shape


class Setting(NamedTuple):
    weights: Path  # of trained networks
    widths: tuple[int, ...] = (12, 32)
    training: tuple[int, int] = (1200, 8192)  # steps, images
    steps: int = 33  # noise levels of the sampler
    seeds: tuple[int, int, int, int] = (24, 64, 128, 256)  # of gains and of errors, of the trained pair and of a toy
    rules: tuple[str, ...] = ("sde/ddpm", "ode/ddim")
    problems: tuple[str, ...] = ("toy, 0", "toy, 0.5", "toy, 0.9", "portraits")  # with rho of a toy
    scales: tuple[Any, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, [(-3.0, 3.0, 2.0)])


@cache
def data(count: int) -> tuple[Tensor, Tensor]:
    """Portraits [N, 3, 16, 16] in [-1, 1], and classes [N]: bright or dark middle (the face), warm or cool border."""
    images = torch.from_numpy(np.stack([portrait(i, SIZE, 0) for i in range(count)])).float() / 127.5 - 1
    (border := torch.ones(SIZE, SIZE, dtype=torch.bool))[2:, 2:-2] = False  # sides and top: the bottom shows clothes
    middle, around = images[:, :, 5:11, 5:11].mean(dim=(1, 2, 3)), images[:, :, border].mean(dim=2)
    warmth = around[:, 0] - around[:, 2]
    return images, 2 * (middle > middle.median()).long() + (warmth > warmth.median()).long()


def trained(width: int, steps: int, count: int, folder: Path) -> UNet2DModel:
    """The moving average of a network that predicts v = alpha eps - sigma x0; from its file, if it has been trained."""
    path = folder / f"w{width}-{steps}.safetensors"
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    options: Any = {"block_out_channels": (width, 2 * width), "norm_num_groups": 4, "num_class_embeds": 5, **blocks}
    torch.manual_seed(width)
    net, mean = (UNet2DModel(SIZE, 3, 3, **options) for _ in range(2))
    if not path.is_file():
        (x0, labels), optimiser, average = data(count), torch.optim.Adam(net.parameters()), mean.state_dict()
        for step in range(steps):
            warm, falling = min(1, (step + 1) / 100), 0.5 * (1 + np.cos(np.pi * step / steps))
            optimiser.param_groups[0]["lr"] = 1.5e-3 * warm * falling
            clean, noise = x0[chosen := torch.randint(len(x0), (64,))], torch.randn(64, 3, SIZE, SIZE)
            clean = torch.where(torch.rand(64, 1, 1, 1) < 0.5, clean, clean.flip(3))  # both traits are symmetric
            logsnr = 18 * (torch.arange(64) + torch.rand(64)) / 64 - 9
            label = torch.where(torch.rand(64) < 0.1, NULL, labels[chosen])  # 10% without a class, for the guide
            alpha, sigma = (expand(torch.sigmoid(u).sqrt(), noise) for u in (logsnr, -logsnr))
            found = net(add_noise(clean, noise, logsnr), 50 * logsnr, class_labels=label).sample
            optimiser.zero_grad()
            (found - alpha * noise + sigma * clean).square().mean().backward()
            optimiser.step()
            for name, value in net.state_dict().items():
                average[name].lerp_(value, 1 - min(0.998, (1 + step) / (10 + step)))
        atomic_write(path, lambda p: save_file(average, str(p)))
    mean.load_state_dict(load_file(path))
    return mean.eval()


def portraits(given: Setting) -> Pair:
    options: Any = {"prediction": "v", "time_scale": 50.0, "shape": (3, SIZE, SIZE)}
    nets, null = {w: trained(w, *given.training, given.weights) for w in given.widths}, {LABELS: torch.tensor([NULL])}
    conditional = [adapt(f"w{w}", net, conditions=null, **options) for w, net in nets.items()]
    free = [adapt(f"w{w}, null", net, conditioning=null, **options) for w, net in nets.items()]
    return conditional, free, options["shape"]


def toy(rho: float) -> Pair:
    """Exact posterior means of a Gaussian mixture, whose class c has two of its eight components, plus smooth errors:
    0.1 and 0.025 of sigma times the data's rms, for 32 times the cost. rho correlates the errors of D_k and U_k."""
    whole, *classes = (GaussianMixture(16) for _ in range(5))
    rms = float(((whole.means**2).mean() + whole.std**2) ** 0.5)
    for c, one in enumerate(classes):
        one.means = one.means[2 * c : 2 * c + 2]

    def level(k: int, name: str, share: float, names: tuple[str, ...] = ()) -> Level:
        shared, own = smooth_field(16, 2 * k), smooth_field(16, 2 * k + 1)

        def denoise(x: Tensor, logsnr: Tensor, class_labels: Tensor | int = NULL) -> Tensor:
            flat, at = x.flatten(1), logsnr.expand(len(x))
            exact = torch.stack([one.denoise(x, logsnr) for one in (*classes, whole)])[class_labels, range(len(x))]
            error = share * shared(flat, at) + (1 - share**2) ** 0.5 * own(flat, at)
            return exact + 0.1 * 4.0**-k * rms * torch.sigmoid(-logsnr).sqrt() * error.reshape(x.shape)

        return Level(name, denoise, 1e6 * 32.0**k, conditions=names)

    conditional = [level(k, f"f{k}", rho, (LABELS,)) for k in (0, 1)]
    return conditional, [level(k, f"f{k}, null", 1.0) for k in (0, 1)], (1, 4, 4)


def likeness(pair: Pair, top: Level, rule: Any, grid: Any, path: BrownianPath, density: np.ndarray) -> list[float]:
    """The cosine of D_2 - D_1 and U_2 - U_1 along the guided largest level's trajectories, and the size of the second
    over that of the first. density: the gain of a unit squared difference at each evaluation, the products' weight."""
    (d1, d2, u1, u2, top), products = bound([*pair[0], *pair[1], top], path.conditions), []

    def visit(x: Tensor, logsnr: Tensor) -> Tensor:
        d, u = (high.denoise(x, logsnr) - low.denoise(x, logsnr) for low, high in ((d1, d2), (u1, u2)))
        products.append([float((a * b).double().mean()) for a, b in ((d, d), (d, u), (u, u))])
        return top.denoise(x, logsnr)

    sample(SingleLevel(Level("visit", visit, 1.0)), rule, grid, BrownianPath(path.seeds, path.shape))
    dd, du, uu = density @ np.array(products)
    return [du / (dd * uu) ** 0.5, (uu / dd) ** 0.5]


def measure(pair: Pair, key: str, scale: Any, common: bool, steps: int, seeds: tuple[int, int]) -> tuple[dict, Tensor]:
    """One row of the table, and the guided largest level's images on the seeds of the errors. seeds: how many for the
    gains and for the errors. Costs are in evaluations of the largest network, per step of a run."""
    rule, grid = step_rule(key), Process(LinearSchedule(), base_steps=257).grid(steps)
    guides = pair[1][:1] * 2 if common else pair[1]
    family = [guided(d, u, scale, common=common) for d, u in zip(pair[0], guides, strict=True)]
    path, fresh = (BrownianPath(own, pair[2], conditions={LABELS: torch.tensor(own) % 4})
                   for own in (range(10**6, 10**6 + seeds[0]), range(seeds[1])))  # fmt: skip
    (costs, base), one, effects = shared_costs(family), pair[0][-1].flops, measure_effects(family, rule, grid, path)
    per_seed, gain = (effects.values[:, :, 1].astype(np.float64) ** 2).mean(axis=1).sum(axis=1), effects.gain(0, 1)
    cosine, ratio = likeness(pair, family[-1], rule, grid, path.part(0, 16), gain / effects.squares[1])
    w, fire = scale if isinstance(scale, float) else scale[0][2], float(firing_costs(costs)[0, 1]) / one
    s = float(np.sqrt(gain).sum() ** 2) * fire
    growth = w**2 if common else w**2 - 2 * w * (w - 1) * ratio * cosine + ((w - 1) * ratio) ** 2
    runs, own = partial(runs_base, family), {(1, steps): 0.0}  # the largest level is the target, so its own error is 0
    known = Calibration(effects, {steps: effects.logsnr}, own, costs, base=base, base_runs=runs)
    images, ledger = sample(SingleLevel(family[-1]), rule, grid, fresh)
    row = {
        "rule": key, "guide": "common" if common else "per level", "w": w, "everywhere": scale == w,
        "gain": per_seed.mean(), "gain_se": per_seed.std(ddof=1) / seeds[0] ** 0.5, "growth_theory": growth,
        "cosine": cosine, "size_ratio": ratio, "firing_cost": fire, "s": s, "s_relative": s * one / (costs[-1] + base),
        "largest_cost": ledger.flops_per_image / one / steps,
    }  # fmt: skip
    for name, share in SHARES.items():  # the small level with its guide costs the same in both kinds
        plan: Any = known.plan_for_cost("independent", steps * (family[0].flops + share * one))
        found, ledger = sample(plan.build(family), rule, grid, fresh)
        errors, cost = squared_errors(found, images), ledger.flops_per_image / one / steps
        row |= {f"{name}_firings": float(plan.table[:, -1].sum()), f"{name}_cost": cost, f"{name}_error": errors.mean(),
                f"{name}_error_se": errors.std(ddof=1) / seeds[1] ** 0.5, f"{name}_predicted": plan.predicted,
                f"{name}_guide_cost": ledger.base_flops / one / steps if common else 0.5 * cost}  # fmt: skip
    return row, images


def sweep(problem: str, key: str, setting: Setting) -> Any:
    """All rows of a problem and a step rule, and some images of the guided largest levels."""
    rows, images, own = [], [], problem == "portraits"
    pair, seeds = (portraits(setting), setting.seeds[:2]) if own else (toy(float(problem[4:])), setting.seeds[2:])
    for scale in setting.scales:
        (first, ours), (second, theirs) = (measure(pair, key, scale, c, setting.steps, seeds) for c in (True, False))
        rows += [{"problem": problem, "apart": squared_errors(ours, theirs).mean()} | row for row in (first, second)]
        images += [(f"common guide,\nw = {scale}", ours[:8]), (f"guide per level,\nw = {scale}", theirs[:8])]
    return rows, images


@style.styled
def plot_guidance(frame: pd.DataFrame) -> Figure:
    """Gains and errors at equal cost: the toy by the correlation of its errors, the trained pair by step rule."""
    figure = style.new_figure(8.5, 8.5, "Guidance: one guide for all levels (dashed), or a guide per level")
    for (top, *errors), name in zip(figure.subplots(3, 2, sharex=True).T, ("toy", "portraits"), strict=True):
        shown = frame.everywhere & ((frame.rule == "sde/ddpm") | (name != "toy"))
        own = frame[frame.problem.str.startswith(name) & shown]
        groups: Any = own.groupby(["guide", "problem", "rule"])
        for i, ((guide, problem, rule), rows) in enumerate(groups):
            label = f"{guide}, {rule if name == 'portraits' else problem.replace('toy,', 'rho =')}"
            look: Any = {"color": COLOURS[i], "marker": MARKERS[i], "ls": "--" if guide == "common" else "-"}
            top.plot(rows.w, rows.growth, label=label, **look)
            for ax, budget in zip(errors, ("few", "many"), strict=True):
                values = rows[f"{budget}_error"].to_numpy()
                ax.errorbar(rows.w, values, style.error_bars(values, rows[f"{budget}_error_se"].to_numpy()), **look)
                ax.set(yscale="log", ylabel=f"squared error, {budget} firings")
        top.plot(rows.w, rows.w**2, ":", color="black", label="$w^2$")
        top.set(yscale="log", ylabel="gain V over that of w = 1", title=f"{name}: {', '.join(own.rule.unique())}")
        errors[-1].set_xlabel("guidance scale w")
        top.legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/guidance"))
    parser.add_argument("--weights", type=Path, default=Path("checkpoints/guidance"), help="trained networks")
    parser.add_argument("--quick", action="store_true", help="a test of the script in seconds, with tiny training")
    args = parser.parse_args()
    small: Any = ((4, 8), (2, 64), 9, (2, 4, 2, 4), ("sde/ddpm",), ("toy, 0.5", "portraits"), (1.0,))
    setting = Setting(args.weights, *(small if args.quick else ()))
    portraits(setting)  # before the workers need it
    jobs = (delayed(sweep)(problem, key, setting) for problem in setting.problems for key in setting.rules)
    found: Any = Parallel(n_jobs=1 if args.quick else 2)(jobs)
    frame = pd.DataFrame([row for rows, _ in found for row in rows])
    frame.insert(5, "growth", frame.gain / frame.groupby(["problem", "rule", "guide"]).gain.transform("first"))
    frame = frame.map(lambda x: float(f"{x:.5g}") if isinstance(x, float) else x)
    save(plot_guidance(frame), args.out / "guidance.png")
    atomic_write(args.out / "guidance.csv", lambda p: frame.to_csv(p, index=False))
    facts = setting._asdict() | {"weights": args.weights.name, "shares": SHARES, "columns": frame.to_dict("list")}
    write_json(args.out / "guidance.json", facts)
    shown = found[-1][1][::4] + found[-1][1][5::4]  # of the last problem, at w = 1, 2, 4
    grid = comparison_grid([(label, ((x[:8].clip(-1, 1) + 1) * 127.5).round().byte()) for label, x in shown])
    save(grid, args.out / "portraits.png")
    print(frame.filter(regex="problem|rule|guide$|^w$|growth$|cosine|^s$|error$").to_string())


if __name__ == "__main__":
    main()
