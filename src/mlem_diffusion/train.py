"""The training loop of one level: resumable, one process or torchrun, counted in images.

All randomness of a step is derived from (seed, step), drawn for the whole batch and sliced by rank, so a run that was
stopped and resumed equals an uninterrupted one, and the number of processes does not change what is trained.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import load_state, save_state, save_weights
from .errors import UserError
from .noise import training_generator
from .process import Process, add_noise
from .unet import Denoiser


@dataclass(frozen=True)
class TrainConfig:
    """How one level is trained. Lengths are in images seen, not steps."""

    images: int = 2_000_000
    batch: int = 256
    lr: float = 2e-3  # at reference_width; other widths get lr * sqrt(reference_width / width)
    reference_width: int = 16
    warmup_images: int = 20_000
    decay_fraction: float = 0.4  # linear decay to zero over this last part
    ema_halflife: int = 100_000  # images
    ema_ramp: float = 0.05  # at most this fraction of the images seen so far (Karras et al. 2022)
    clip: float = 1.0
    flips: bool = True
    seed: int = 0
    snapshots: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # fractions whose EMA weights are kept
    log_every: int = 10_000  # images
    save_every: float = 120.0  # seconds between resume states
    compile: str = "auto"  # "auto": on CUDA only; "on"; "off"

    def __post_init__(self) -> None:
        if not self.snapshots or min(self.snapshots) <= 0 or max(self.snapshots) != 1:
            raise UserError(f"train.snapshots = {list(self.snapshots)} must be fractions in (0, 1] that include 1.")
        if self.images < 1 or self.batch < 1:
            raise UserError("train.images and train.batch must be positive.")


class Interrupted(Exception):
    """Training was stopped from outside after saving its state."""


class _LossModule(nn.Module):
    """The forward pass that is compiled and distributed: noised batch -> scalar loss."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x0: Tensor, noise: Tensor, logsnr: Tensor) -> Tensor:
        return self.denoiser.loss(add_noise(x0, noise, logsnr), x0, logsnr).mean()


def _diverged(width: int, loss: float, images: int) -> str:
    return f"The loss of width {width} is {loss} after {images} images: lower train.lr and train again."


def ema_decay(config: TrainConfig, images: int) -> float:
    """Decay of one step after `images` images: the half-life is ramped up with training."""
    halflife = max(min(config.ema_halflife, config.ema_ramp * images), 1e-8)
    return 0.5 ** (config.batch / halflife)


def learning_rate(config: TrainConfig, width: int, images: int) -> float:
    """Warm-up, constant, linear decay to zero; narrower networks take larger steps."""
    peak = config.lr * (config.reference_width / width) ** 0.5
    warm = min(1.0, images / max(config.warmup_images, 1))
    left = (config.images - images) / max(config.decay_fraction * config.images, 1)
    return peak * warm * min(1.0, max(left, 0.0))


def draw_batch(
    data: Tensor, config: TrainConfig, process: Process, level_table: Tensor, step: int, rank: int, world: int
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's slice of the batch of one step: x0 in [-1, 1], noise, log-SNR.

    Noise levels are stratified: batch element i falls in the i-th equal part of the path that the sampler visits.
    """
    device, b = level_table.device, config.batch
    generator = training_generator(device, config.seed, step)
    index = torch.randint(len(data), (b,), generator=generator, device=device)
    position = (torch.arange(b, device=device) + torch.rand(b, generator=generator, device=device)) / b
    flip = torch.rand(b, generator=generator, device=device) < 0.5
    noise = torch.randn(b, *data.shape[1:], generator=generator, device=device)
    part = slice(rank * b // world, (rank + 1) * b // world)
    x0 = data[index[part].to(data.device)].to(device).float() / 127.5 - 1
    if config.flips:
        x0 = torch.where(flip[part, None, None, None], x0.flip(-1), x0)
    where = (position[part] * (len(level_table) - 1)).float()
    low = where.floor().long().clamp(max=len(level_table) - 2)
    logsnr = torch.lerp(level_table[low], level_table[low + 1], where - low)
    return x0, noise[part], logsnr


def train_level(
    denoiser: Denoiser,
    images: np.ndarray | Tensor,
    process: Process,
    config: TrainConfig,
    directory: Path,
    *,
    width: int,
    device: torch.device | str = "cpu",
    report: Callable[[dict[str, Any]], None] | None = None,
    snapshot: Callable[[int, Denoiser], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Denoiser:
    """Train one level and return its EMA denoiser.

    images: uint8 [N,3,H,W], kept on the device as uint8 where they fit in half of its free memory. directory receives
    state.pt, ema-<images>.safetensors at the snapshots and ema.safetensors at the end; a state found there is resumed.
    report gets {"images", "loss", "lr"} every log_every images; snapshot(images seen, EMA denoiser) is called at each
    snapshot on rank 0.
    Raises Interrupted (state saved) when should_stop() turns true, UserError for an impossible configuration and when the
    loss is no longer finite.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if config.batch % world:
        raise UserError(f"train.batch = {config.batch} does not divide over {world} processes.")

    # ---- model, EMA, optimiser -------------------------------------------------------------------------------
    denoiser = denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimiser = torch.optim.Adam(
        denoiser.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=device.type in ("cuda", "cpu")
    )
    parameters: list[Tensor] = list(denoiser.parameters())
    averages: list[Tensor] = list(ema.parameters())
    seen, history = 0, []
    running, counted, last_log = torch.zeros((), device=device), 0, 0
    state = load_state(directory / "state.pt")
    if state is not None:
        try:
            denoiser.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimiser.load_state_dict(state["optimiser"])
            seen, history = state["images"], state["history"]
            running += state["running"]
            counted, last_log = state["counted"], state["last_log"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{directory / 'state.pt'} is not the state of this network; delete it to train this level again."
            ) from error
    loss_module: Any = _LossModule(denoiser)
    if world > 1:
        loss_module = nn.parallel.DistributedDataParallel(loss_module)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        torch._dynamo.reset()  # each width is a program of its own; together they would exceed dynamo's limit
        loss_module = torch.compile(loss_module)

    # ---- data ------------------------------------------------------------------------------------------------
    data = torch.as_tensor(np.asarray(images) if isinstance(images, np.ndarray) else images)
    if device.type != "cuda" or data.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        data = data.to(device)  # uint8: a gather on the device beats any loader; too large a set stays on the host
    level_table = torch.as_tensor(process.logsnr_at(np.linspace(0, 1, 4097)), dtype=torch.float32, device=device)
    # a snapshot is due at the first step at or past its fraction
    due = [s for s in sorted(f * config.images for f in config.snapshots) if s > seen]

    def save() -> None:
        if rank == 0:
            progress = {"images": seen, "history": history, "counted": counted, "last_log": last_log}
            modules = {
                "model": denoiser.state_dict(),
                "ema": ema.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            save_state(directory / "state.pt", {**modules, **progress, "running": float(running)})

    def stop_requested(step: int) -> bool:
        wanted = should_stop is not None and should_stop()
        if world == 1 or should_stop is None:
            return wanted
        if step % 20:  # all ranks must stop at the same step; asking costs a synchronisation
            return False
        flag = torch.tensor(float(wanted), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    # ---- loop ------------------------------------------------------------------------------------------------
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in denoiser.modules())
    last_save = time.monotonic()
    while seen < config.images:
        batch = draw_batch(data, config, process, level_table, seen // config.batch, rank, world)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, width, seen + config.batch // 2)  # neither the first nor the last is 0
        if dropout:  # its masks come from torch's global generator
            torch.manual_seed(
                training_generator(torch.device("cpu"), config.seed, seen // config.batch, rank).initial_seed()
            )
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_module(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimiser.step()
        seen += config.batch
        torch._foreach_lerp_(averages, parameters, 1 - ema_decay(config, seen))
        running += loss.detach()
        counted += 1

        finished = seen >= config.images
        if seen - last_log >= config.log_every or finished:
            if world > 1:
                dist.all_reduce(running, op=dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
                running /= 1 if device.type == "cuda" else world
            mean = float(running) / counted
            if not np.isfinite(mean):
                raise UserError(_diverged(width, mean, seen))
            history.append({"images": seen, "loss": mean})
            if report is not None and rank == 0:
                report({"images": seen, "loss": mean, "lr": optimiser.param_groups[0]["lr"]})
            running.zero_()
            counted, last_log = 0, seen
        if due and seen >= due[0]:
            due = [s for s in due if s > seen]
            if not torch.isfinite(loss):
                raise UserError(_diverged(width, float(loss), seen))
            if rank == 0:
                save_weights(directory / f"ema-{seen:010d}.safetensors", ema)
                if snapshot is not None:
                    snapshot(seen, ema)
        if not finished and stop_requested(seen // config.batch):
            save()
            raise Interrupted(f"width {width} stopped after {seen} of {config.images} images")
        if time.monotonic() - last_save > config.save_every:
            save()
            last_save = time.monotonic()

    save()
    if rank == 0:
        save_weights(directory / "ema.safetensors", ema)
    return ema
