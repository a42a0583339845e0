"""The training loop of one level: resumable, for one process or torchrun, with lengths in images.

The random numbers of a step depend on (seed, step), are drawn for the full batch and are sliced by rank. So a resumed
run equals an uninterrupted one, and the number of processes does not change the result.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..diffusion.brownian import training_generator
from ..diffusion.process import Process
from ..errors import Interrupted, SlowPath, UserError, is_out_of_memory
from ..files import Damaged
from ..models.checkpoint import load_state, save_state, save_weights
from ..models.torch_compile import should_compile
from ..models.unet import Denoiser
from .step import GRAPHS, PRECISIONS, TrainStep, has_dropout


@dataclass(frozen=True)
class TrainConfig:
    """Training settings of one level. Lengths are in images seen, not steps."""

    images: int = 2_000_000
    batch: int = 256
    accumulate: int = 1  # micro-batches per step, if a batch does not fit in memory: same draws, same updates
    lr: float = 2e-3  # at reference_width; other widths get lr * sqrt(reference_width / width)
    reference_width: int = 16
    warmup_images: int = 20_000
    decay_fraction: float = 0.4  # linear decay to zero over this last fraction
    ema_halflife: int = 100_000  # images
    ema_ramp: float = 0.05  # largest half-life as a fraction of the images seen so far (Karras et al. 2022)
    clip: float = 1.0
    flips: bool = True
    seed: int = 0
    snapshots: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # fractions with saved EMA weights
    log_every: int = 10_000  # images
    save_every: float = 120.0  # seconds between resume states
    precision: str = "auto"  # "auto": bf16 on CUDA, else float32; "float32"; "autocast"; "bf16" (see step.py)
    compile: str = "auto"  # "auto": on CUDA only; "on"; "off"; "max": tuned kernels
    graph: str = "auto"  # steps as CUDA graphs; "auto": on CUDA with one process and no dropout; "on"; "off"

    def __post_init__(self) -> None:
        if not self.snapshots or min(self.snapshots) <= 0 or max(self.snapshots) != 1:
            raise UserError(f"train.snapshots = {list(self.snapshots)} must be fractions in (0, 1] that include 1.")
        if self.images < 1 or self.batch < 1:
            raise UserError("train.images and train.batch must be positive.")
        if self.accumulate < 1:
            raise UserError(f"train.accumulate = {self.accumulate} must be at least 1.")
        for name, known in (("precision", PRECISIONS), ("graph", GRAPHS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"train.{name} = {getattr(self, name)!r} is unknown; expected one of {', '.join(known)}."
                )
        should_compile(self.compile, "cpu")


def ema_decay(config: TrainConfig, images: int) -> float:
    """Return the EMA decay of one step after `images` images; the half-life rises during training."""
    halflife = max(min(config.ema_halflife, config.ema_ramp * images), 1e-8)
    return 0.5 ** (config.batch / halflife)


def learning_rate(config: TrainConfig, width: int, images: int) -> float:
    """Return the learning rate: warm-up, constant, linear decay to zero; it is larger for narrower networks."""
    peak = config.lr * (config.reference_width / width) ** 0.5
    warm = min(1.0, images / max(config.warmup_images, 1))
    left = (config.images - images) / max(config.decay_fraction * config.images, 1)
    return peak * warm * min(1.0, max(left, 0.0))


def draw_batch(
    data: Tensor, config: TrainConfig, process: Process, level_table: Tensor, step: int, rank: int, world: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's slice of the batch of one step: x0 in [-1, 1], noise, log-SNR.

    Noise levels are stratified: batch element i falls in the i-th of `batch` equal parts of the sampler's path.
    """
    device, b = level_table.device, config.batch
    generator = training_generator(device, config.seed, step)
    index = torch.randint(len(data), (b,), generator=generator, device=device)
    position = (torch.arange(b, device=device) + torch.rand(b, generator=generator, device=device)) / b
    flip = torch.rand(b, generator=generator, device=device) < 0.5
    noise = torch.randn(b, *data.shape[1:], generator=generator, device=device)
    part = slice(rank * b // world, (rank + 1) * b // world)
    pictures = data[index[part].to(data.device)]
    if pictures.device != device:  # with pinned memory the copy overlaps with work of the device
        pictures = (pictures.pin_memory() if device.type == "cuda" else pictures).to(device, non_blocking=True)
    if config.flips:  # on bytes, with a quarter of the memory traffic
        pictures = torch.where(flip[part, None, None, None], pictures.flip(-1), pictures)
    x0 = pictures.float() / 127.5 - 1
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
    on_first_step: Callable[[float], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    identity: str = "",
) -> Denoiser:
    """Train one level and return its EMA denoiser.

    images: uint8 [N,3,H,W], copied to the device as uint8 if they fit in half of its free memory.
    directory: gets state.pt, ema-<images>.safetensors at the snapshots and ema.safetensors at the end. Training resumes
    from a state.pt in it.
    report: called with {"images", "loss", "lr"} every log_every images.
    snapshot: called as snapshot(images seen, EMA denoiser) at each snapshot, on rank 0.
    on_first_step: called once, after the first step, with the seconds since the start of this call (with compilation).
    on_resume: called once, before the first step, with the images seen.
    identity: identifies the network and its data; a state with another identity is refused.

    If a micro-batch does not fit in memory, it is halved, with one SlowPath warning: same draws, same updates up to
    rounding. Raises Interrupted, with the state saved, when should_stop() returns true. Raises UserError for an
    impossible configuration, for a foreign or damaged state, and if the loss or a weight is no longer finite. The last
    saved state stays and is always finite.
    """
    entered = time.monotonic()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if config.batch % (world * config.accumulate):
        micro = f" in {config.accumulate} micro-batches each" if config.accumulate > 1 else ""
        raise UserError(f"train.batch = {config.batch} does not divide over {world} processes{micro}.")

    # ---- model, EMA, optimiser -------------------------------------------------------------------------------
    denoiser = denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)

    def make_step(accumulate: int) -> TrainStep:
        return TrainStep(
            denoiser, ema, clip=config.clip, precision=config.precision, compile=config.compile, graph=config.graph,
            accumulate=accumulate, world=world, name=f"Training of width {width}",
        )  # fmt: skip

    accumulate = config.accumulate
    train_step = make_step(accumulate)
    seen, history, counted, last_log, saved = 0, [], 0, 0, {}
    state = load_state(directory / "state.pt")
    if state is not None:
        foreign = f"{directory / 'state.pt'} is not the state of this network; delete it to train this level again."
        if state.get("identity", "") != identity:
            raise Damaged(directory / "state.pt", foreign)
        try:
            train_step.load_state_dict(state)
            seen, history, saved = state["images"], state["history"], state["snapshots"]
            counted, last_log = state["counted"], state["last_log"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Damaged(directory / "state.pt", foreign) from error
    if on_resume is not None and rank == 0:
        on_resume(seen)

    # ---- data ------------------------------------------------------------------------------------------------
    data = torch.as_tensor(np.asarray(images) if isinstance(images, np.ndarray) else images)
    if device.type != "cuda" or data.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        data = data.to(device)  # a gather on the device is faster than any loader; a larger data set stays on the host
    level_table = torch.as_tensor(process.logsnr_at(np.linspace(0, 1, 4097)), dtype=torch.float32, device=device)
    # a snapshot is due at the first step at or past its fraction
    due = [s for s in sorted(f * config.images for f in config.snapshots) if s > seen]

    def progress() -> dict[str, Any]:
        return {"images": seen, "history": history, "counted": counted, "last_log": last_log, "snapshots": saved}

    def save() -> None:
        check_finite()
        if rank == 0:
            save_state(directory / "state.pt", {**train_step.state_dict(), **progress(), "identity": identity})

    def check_finite() -> None:
        if not train_step.is_finite():
            raise UserError(_diverged(width, train_step, config, directory / "state.pt"))

    def advance(batch: tuple[Tensor, Tensor, Tensor], lr: float, decay: float) -> None:
        """Take one step, in smaller micro-batches if it does not fit in memory."""
        nonlocal train_step, accumulate
        while True:
            failed: Exception | None = None
            try:
                train_step(batch, lr, decay)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold references to the memory
            micro = config.batch // world // accumulate
            if world > 1 or micro % 2 or train_step.updating:
                more = f"train.accumulate={2 * accumulate}" if micro % 2 == 0 else "a smaller train.batch"
                raise UserError(
                    f"{micro} images at a time do not fit in the memory of {device} at width {width}: set {more}."
                ) from failed
            accumulate *= 2
            warnings.warn(
                f"Training of width {width}: {micro} images at a time do not fit in memory; it continues with "
                f"{micro // 2}, {accumulate} times per step: the same batch of {config.batch}.",
                SlowPath,
                stacklevel=2,
            )
            before = train_step.state_dict()
            del train_step  # frees its memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
            train_step = make_step(accumulate)
            train_step.load_state_dict(before)

    def stop_requested(step: int) -> bool:
        wanted = should_stop is not None and should_stop()
        if world == 1 or should_stop is None:
            return wanted
        if step % 20:  # all ranks must stop at the same step; each check costs a synchronisation
            return False
        flag = torch.tensor(float(wanted), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    # ---- loop ------------------------------------------------------------------------------------------------
    dropout = has_dropout(denoiser)
    last_save = time.monotonic()
    while seen < config.images:  # no host wait for the device between logs, saves and snapshots
        batch = draw_batch(data, config, process, level_table, seen // config.batch, rank, world)
        lr = learning_rate(config, width, seen + config.batch // 2)  # neither the first nor the last is 0
        if dropout:  # its masks come from torch's global generator
            torch.manual_seed(
                training_generator(torch.device("cpu"), config.seed, seen // config.batch, rank).initial_seed()
            )
        seen += config.batch
        advance(batch, lr, ema_decay(config, seen))
        counted += 1
        if on_first_step is not None:
            float(train_step.loss)  # waits for the device
            if rank == 0:
                on_first_step(time.monotonic() - entered)
            on_first_step = None

        finished = seen >= config.images
        if seen - last_log >= config.log_every or finished:
            running = train_step.running
            if world > 1:
                dist.all_reduce(running, op=dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
                running /= 1 if device.type == "cuda" else world
            mean = float(running) / counted
            if not np.isfinite(mean):
                raise UserError(_diverged(width, train_step, config, directory / "state.pt"))
            history.append({"images": seen, "loss": mean})
            if report is not None and rank == 0:
                report({"images": seen, "loss": mean, "lr": lr})
            running.zero_()
            counted, last_log = 0, seen
        if due and seen >= due[0]:
            due = [s for s in due if s > seen]
            check_finite()
            if rank == 0:
                file = f"ema-{seen:010d}.safetensors"
                saved[file] = save_weights(directory / file, ema)
                if snapshot is not None:
                    snapshot(seen, ema)
        if not finished and stop_requested(seen // config.batch):
            save()
            raise Interrupted(f"width {width} stopped after {seen} of {config.images} images; its state is saved")
        if time.monotonic() - last_save > config.save_every:
            save()
            last_save = time.monotonic()

    save()
    if rank == 0:
        save_weights(directory / "ema.safetensors", ema)
    return ema


def _diverged(width: int, train_step: TrainStep, config: TrainConfig, state: Path) -> str:
    """Return the error message for a loss or weight that is not finite."""
    trouble = train_step.trouble()
    if trouble is None:
        step = train_step.state_dict()["steps"]
        what = (
            f"The weights of width {width} are not finite after step {step} ({step * config.batch} images), "
            "at every noise level"
        )
    else:
        step, share, logsnr = trouble
        where = "at every noise level" if share == 1 else f"for {share:.1%} of the batch, first at log-SNR {logsnr:.3g}"
        what = f"The loss of width {width} is not finite at step {step} ({step * config.batch} images), {where}"
    saved = f"; the last finite state is in {state}" if state.is_file() else ""
    return f"{what}{saved}: lower train.lr and train again (ARGS='overwrite=true train.lr=...')."
