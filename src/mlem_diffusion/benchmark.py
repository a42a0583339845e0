"""Speed of this repository on a device: networks, training, noise and the sampling loop, as rows of one table.
torch.utils.benchmark repeats the calls and waits for the device. cfg: `benchmark.full` or `benchmark.small`."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer

from .diffusion.brownian import BrownianPath
from .diffusion.level import Level, flops_per_evaluation
from .diffusion.process import Process
from .diffusion.sampler import SingleLevel, sample
from .diffusion.step_rules import step_rule
from .errors import SlowPath
from .models.compiled import FastDenoiser, first_line, set_compile_caches
from .models.family import build_denoiser
from .models.unet import Denoiser
from .multilevel.estimators import Multilevel, constant_probabilities
from .training.levels import TrainConfig
from .training.step import TrainStep

Row = dict[str, Any]
Part = Callable[[], Iterable[Row]]
Progress = Callable[[int, int], object]
HEADINGS = {
    "what": "what", "width": "width", "batch": "batch", "mode": "mode", "ms": "ms", "spread": "IQR",
    "tflops": "TFLOP/s", "fraction_of_matmul": "of matmul", "images_per_s": "images/s",
    "ratio_to_diffusers": "diffusers / ours",
}  # fmt: skip
_ROUNDS, _WARM_UP = 3, 5  # a training step is captured as a CUDA graph in its fourth call


def parts_of(cfg: Any, process: Process, device: torch.device) -> dict[str, Part]:
    """All parts of a size, by name."""
    parts: dict[str, Part] = {"matmul": partial(matmul, cfg, device)}
    parts |= {f"forward w{w} {mode}": partial(forward, cfg, device, w, mode) for mode in cfg.modes for w in cfg.widths}
    parts |= {f"train {precision}": partial(train, cfg, device, precision) for precision in cfg.train.precisions}
    return parts | {"sampler": partial(sampler, cfg, device, process)}


def measure(parts: Mapping[str, Part], progress: Progress, save: Callable[[list[Row]], object]) -> list[Row]:
    """The rows of the parts; one that fails, or falls back to a slow path, leaves a row with the reason.
    save(rows) is called after each part, progress(done, total) before it."""
    rows: list[Row] = []
    set_compile_caches()  # its warning concerns no row
    for done, (name, part) in enumerate(parts.items()):
        progress(done, len(parts))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowPath)
                rows.extend(part())
        except Exception as error:
            rows.append(row(name.split()[0], f"{name}: {first_line(error)}"))
        save(compared(rows))
        torch._dynamo.reset()  # each part starts as in a new process
        gc.collect()
        torch.cuda.empty_cache()
    return compared(rows)


def timed(cfg: Any, what: str, mode: str, calls: Mapping[str, Callable], **shape: Any) -> Iterable[Row]:
    """A row for each function, what + its name: timed in turns, so that a warm or busy machine favours none."""
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": call}, label=name, num_threads=threads) for name, call in calls.items()]
    found = [t.blocked_autorange(min_run_time=cfg.seconds / _ROUNDS) for _ in range(_ROUNDS) for t in timers]
    for name, measured in zip(calls, Measurement.merge(found), strict=True):
        yield row(f"{what}{name}", mode, measured, **shape)


def matmul(cfg: Any, device: torch.device) -> Iterable[Row]:
    """The product of two random square matrices: the best speed for networks on this device."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    a, b = torch.randn(2, cfg.matmul, cfg.matmul, device=device).to(dtype)
    mode = f"{cfg.precision} {cfg.matmul}-cube"
    yield from timed(cfg, "matmul", mode, {"": lambda: a @ b}, flops=2.0 * cfg.matmul**3)


def forward(cfg: Any, device: torch.device, width: int, mode: str) -> Iterable[Row]:
    """Forward passes of ours and diffusers' network, in the form that a sampler runs; mode: "eager" or "compiled"."""
    fast, networks = mode == "compiled", denoisers(width, cfg.resolution, cfg.unet, device)
    flops = flops_per_evaluation(networks[""], (3, cfg.resolution, cfg.resolution))  # theirs have the same
    options = {"compile": "on" if fast else "off", "graphs": fast, "batch": max(cfg.batches), "name": f"w{width}"}
    forms = {kind: FastDenoiser(network, cfg.precision, **options) for kind, network in networks.items()}
    for batch in cfg.batches:
        x = torch.randn(batch, 3, cfg.resolution, cfg.resolution, device=device)
        calls = {kind: partial(form, x, torch.zeros((), device=device)) for kind, form in forms.items()}
        yield from timed(cfg, "forward", f"{cfg.precision} {mode}", calls, width=width, batch=batch, flops=flops)


def train(cfg: Any, device: torch.device, precision: str) -> Iterable[Row]:
    """One training step: forward, backward, clipping, Adam and the moving average. FLOPs: three forward passes."""
    width, batch = cfg.train.width, cfg.train.batch
    x0, noise = torch.randn(2, batch, 3, cfg.resolution, cfg.resolution, device=device)
    images, steps = (x0, noise, torch.linspace(-8, 8, batch, device=device)), {}
    networks = denoisers(width, cfg.resolution, cfg.unet, device)
    for kind, network in networks.items():
        ema = copy.deepcopy(network).eval().requires_grad_(False)
        steps[kind] = partial(TrainStep(network, ema, TrainConfig(precision=precision)), images, 1e-5, 0.999)
    flops = 3 * flops_per_evaluation(networks[""], (3, cfg.resolution, cfg.resolution))
    yield from timed(cfg, "train", precision, steps, width=width, batch=batch, flops=flops)


def sampler(cfg: Any, device: torch.device, process: Process) -> Iterable[Row]:
    """One step of the sampling loop with networks that cost nothing. DDPM draws noise in each step, DDIM does not."""
    batch, flops = max(cfg.batches), (1.0, 6.0, 36.0)  # the FLOPs only decide the probabilities of the coins
    levels = tuple(Level(f"free{k}", lambda x, logsnr: x, cost) for k, cost in enumerate(flops))
    ml_em = Multilevel(levels, constant_probabilities(flops, gamma=2.5, c=4.0), "independent")

    def run(estimator: Any, key: str) -> None:
        path = BrownianPath(range(batch), (3, cfg.resolution, cfg.resolution), device)
        sample(estimator, step_rule(key), process.grid(cfg.steps), path)

    for key in ("ode/ddim", "sde/ddpm"):
        for name, estimator in (("one level", SingleLevel(levels[-1])), ("ML-EM", ml_em)):
            mode, call = f"{key}, {name}, a step of {cfg.steps}", {"": partial(run, estimator, key)}
            yield from timed(cfg, "sampler", mode, call, batch=batch, repeats=cfg.steps)


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel, built like `unet.UNet`, for a `Denoiser`: [B,3,S,S], logsnr [B] or 0-dim -> [B,3,S,S]."""

    def __init__(self, width: int, size: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int]):
        super().__init__()
        from diffusers import UNet2DModel

        channels = tuple(width * m for m in multipliers)
        attends = [size // 2**i in attention for i in range(len(channels))]
        heads = max(1, channels[-1] // 64)
        # one number of groups for all norms: that of unet.UNet at its base width, which divides all other widths
        groups = max(g for g in range(1, 33) if width % g == 0 and (width // g >= 4 or g == 1))
        self.unet = UNet2DModel(
            sample_size=size, layers_per_block=blocks, block_out_channels=channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
            add_attention=size // 2 ** (len(channels) - 1) <= max(attention, default=0),
            attention_head_dim=channels[-1] // heads if channels[-1] % heads == 0 else channels[-1],
            norm_num_groups=groups, attn_norm_num_groups=groups,
            resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        )  # fmt: skip

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        timestep = 1000 * torch.sigmoid(-logsnr.float())
        return self.unet(x.to(self.unet.conv_in.weight.dtype), timestep, return_dict=False)[0]


def denoisers(width: int, size: int, unet: Mapping[str, Any], device: torch.device) -> dict[str, Denoiser]:
    """Denoisers on the device with random weights: "" is ours, "_diffusers" theirs, if it is installed (test extra)."""
    found = {"": build_denoiser(width, size, 0.5, unet, "v")}
    if find_spec("diffusers"):
        found["_diffusers"] = Denoiser(DiffusersUNet(width, size, **unet), 0.5, "v")
    for denoiser in found.values():
        for parameter in denoiser.parameters():
            # layers initialised to zero would output zeros; products with zeros draw less power and so run faster
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return found


def row(
    what: str, mode: str, found: Measurement | None = None, width: int | None = None, batch: int | None = None,
    flops: float | None = None, repeats: int = 1,
) -> Row:  # fmt: skip
    """One row. mode begins with the precision, if any. found: the time of `repeats` repetitions.
    flops: per image, or in total without a batch."""
    out: Row = {"what": what, "width": width, "batch": batch, "mode": mode, "ms": None}
    if found is not None:
        out.update(ms=1e3 * found.median / repeats, spread=found.iqr / found.median)
        if flops is not None:
            out["tflops"] = flops * (batch or 1) / out["ms"] * 1e-9
            out["images_per_s"] = batch and 1e3 * batch / out["ms"]
    return out


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with fraction_of_matmul, in the same precision (autocast multiplies in bf16), and ratio_to_diffusers."""

    def precision(r: Row) -> str:
        return r["mode"].split(" ")[0].replace("autocast", "bf16")

    peaks = {precision(r): r.get("tflops") for r in rows if r["what"] == "matmul"}
    times = {(r["what"], r["width"], r["batch"], r["mode"]): r["ms"] for r in rows}
    out = []
    for r in rows:
        peak, ours = peaks.get(precision(r)), r.get("tflops")
        theirs = times.get((f"{r['what']}_diffusers", r["width"], r["batch"], r["mode"]))
        fraction = ours / peak if ours and peak else None
        ratio = theirs / r["ms"] if theirs and r["ms"] else None
        out.append({**r, "fraction_of_matmul": fraction, "ratio_to_diffusers": ratio})
    return out


def cell(column: str, value: Any) -> str:
    if column in ("fraction_of_matmul", "spread") and value is not None:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def report(document: Mapping[str, Any]) -> str:
    """A line about the device, and the rows of the largest batch as a table, without diffusers' and empty columns."""
    rows = [r for r in document["rows"] if not r["what"].endswith("_diffusers")]
    rows = [r for r in rows if r["batch"] in (None, max(o["batch"] or 0 for o in rows if o["what"] == r["what"]))]
    columns = [c for c in HEADINGS if any(r.get(c) is not None for r in rows)]
    lines = [[HEADINGS[c] for c in columns], ["---"] * len(columns)]
    lines += [[cell(c, r.get(c)) for c in columns] for r in rows]
    head = "{device}, torch {torch}{cuda}, {date:.10}, size {size} ({resolution}x{resolution} images); {timing}."
    cuda = f", CUDA {document['cuda']}" if document["cuda"] else ""
    return "\n".join([head.format_map({**document, "cuda": cuda}), "", *(f"| {' | '.join(line)} |" for line in lines)])
