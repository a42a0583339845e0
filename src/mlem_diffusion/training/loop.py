"""The training loop of one level: resumable, for one process or torchrun, with lengths in images.
The random numbers of a step depend on (seed, step), are drawn for the full batch and are sliced by rank. So a resumed
run equals an uninterrupted one, and the number of processes does not change the result."""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import norm
from torch import Tensor

from .. import parallel
from ..diffusion.brownian import training_generator
from ..diffusion.process import Process
from ..errors import Interrupted, UserError
from ..files import Damaged, atomic_write
from ..models.family import load_state, save_weights
from ..models.unet import Denoiser
from .levels import STATE, TrainConfig
from .step import TrainStep, has_dropout


def ema_decay(config: TrainConfig, images: int) -> float:
    """Return the EMA decay of one step after `images` images; the half-life rises during training."""
    halflife = max(min(config.ema_halflife, config.ema_ramp * images), 1e-8)
    return 0.5 ** (config.batch / halflife)


def learning_rate(config: TrainConfig, channels: int, images: int) -> float:
    """Return the learning rate: warm-up, constant, linear decay to zero; it is larger for narrower networks.
    channels: those of the network's first layer."""
    peak = config.lr * (config.reference_channels / channels) ** 0.5
    warm = min(1.0, images / max(config.warmup_images, 1))
    left = (config.images - images) / max(config.decay_fraction * config.images, 1)
    return peak * warm * min(1.0, max(left, 0.0))


def noise_quantiles(process: Process, focus: Sequence[float] | None) -> np.ndarray:
    """The log-SNRs [4097] at equal probabilities from 0 to 1 of the noise levels in training.
    They are spread along the sampler's path, or half of them so and half with the normal density in log-SNR of mean and
    standard deviation `focus`, cut off at the path's ends."""
    share = np.linspace(0, 1, 4097)
    path = process.logsnr_at(share)
    if focus is None:
        return path
    inside = norm(*focus).cdf(path)
    inside = (inside - inside[0]) / (inside[-1] - inside[0])
    return np.interp(share, 0.5 * share + 0.5 * inside, path)


def draw_batch(
    data: Tensor, config: TrainConfig, level_table: Tensor, step: int, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's slice of the batch of one step: x0 in [-1, 1], noise, log-SNR.
    level_table: `noise_quantiles`. Noise levels are stratified: batch element i falls
    in the i-th of `batch` equally probable parts."""
    device, b = level_table.device, config.batch
    generator = training_generator(device, config.seed, step)
    index = torch.randint(len(data), (b,), generator=generator, device=device)
    position = (torch.arange(b, device=device) + torch.rand(b, generator=generator, device=device)) / b
    flip = torch.rand(b, generator=generator, device=device) < 0.5
    noise = torch.randn(b, *data.shape[1:], generator=generator, device=device)
    part = slice(rank * b // world, (rank + 1) * b // world)
    pictures = data[index[part]]
    if config.flips:  # on bytes, with a quarter of the memory traffic
        pictures = torch.where(flip[part, None, None, None], pictures.flip(-1), pictures)
    x0 = pictures.float() / 127.5 - 1
    where = (position[part] * (len(level_table) - 1)).float()
    low = where.floor().long().clamp(max=len(level_table) - 2)
    logsnr = torch.lerp(level_table[low], level_table[low + 1], where - low)
    return x0, noise[part], logsnr


def train_level(
    denoiser: Denoiser, images: np.ndarray, process: Process, config: TrainConfig, directory: Path, *,
    device: torch.device | str = "cpu", report: Callable[[dict[str, Any]], None] = lambda record: None,
    snapshot: Callable[[int, Denoiser], None] = lambda images, ema: None,
    should_stop: Callable[[], bool] = parallel.never, identity: str = "", teacher: Denoiser | None = None,
) -> Denoiser:  # fmt: skip
    """Train one level, or resume it from the state in its directory, and return its EMA denoiser.
    images: uint8 [N,3,H,W], copied to the device. directory: gets state.pt, ema-<images>.safetensors at the snapshots
    and ema.safetensors at the end. teacher: a denoiser whose outputs are the targets. identity: of the network and its
    data; a state with another identity is refused.
    report({"images", "loss", "lr"}): called every log_every images. snapshot(images seen, EMA denoiser): called at each
    snapshot. Both on rank 0 only.
    Raises Interrupted, with the state saved, when should_stop() returns true. Raises UserError for an impossible
    configuration, a foreign or damaged state, and a loss or weight that is not finite; the saved state always is."""
    device = torch.device(device)
    run = _Run(denoiser, config, directory, device, identity, teacher)
    run.resume()
    data = torch.as_tensor(images, device=device)  # a gather on the device is faster than any loader
    level_table = torch.as_tensor(noise_quantiles(process, config.focus), dtype=torch.float32, device=device)
    channels: Any = denoiser.unet.enter.out_channels  # pyright: ignore
    dropout, last_save = has_dropout(denoiser), time.monotonic()
    while run.seen < config.images:  # no host wait for the device between logs, saves and snapshots
        number = run.seen // config.batch
        if dropout:  # its masks come from torch's global generator
            generator = training_generator(torch.device("cpu"), config.seed, number, run.rank)
            torch.manual_seed(generator.initial_seed())
        batch = draw_batch(data, config, level_table, number, run.rank, run.world)
        lr = learning_rate(config, channels, run.seen + config.batch // 2)  # neither the first nor the last is 0
        run.seen += config.batch
        run.step(batch, lr, ema_decay(config, run.seen))
        finished = run.seen >= config.images
        if run.seen - run.last_log >= config.log_every or finished:
            run.log(report, lr)
        if any(run.seen - config.batch < fraction * config.images <= run.seen for fraction in config.snapshots):
            run.take_snapshot(snapshot)
        # all ranks stop at the same step, and asking them costs a synchronisation
        asks = run.world == 1 or run.seen // config.batch % 20 == 0
        if not finished and asks and parallel.agree(should_stop()):
            run.save()
            raise Interrupted(f"{directory.name} stopped after {run.seen} of {config.images} images; its state is kept")
        if time.monotonic() - last_save > config.save_every:
            run.save()
            last_save = time.monotonic()
    run.save()
    if run.rank == 0:
        save_weights(directory / "ema.safetensors", run.ema)
    return run.ema


class _Run:
    """One level in training: its networks and step, its progress, and its state on disk."""

    def __init__(
        self, denoiser: Denoiser, config: TrainConfig, directory: Path, device: torch.device, identity: str,
        teacher: Denoiser | None,
    ):  # fmt: skip
        self.rank, self.world = parallel.rank(), parallel.world()
        if config.batch % (self.world * config.accumulate):
            parts = f"{self.world} processes and train.accumulate = {config.accumulate}"
            raise UserError(f"train.batch = {config.batch} does not divide over {parts}.")
        self.state, self.batch, self.identity = directory / STATE, config.batch, identity
        self.seen, self.history, self.snapshots = 0, [], {}  # images; {"images", "loss"} of every log; file -> SHA-256
        self.denoiser = denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        if teacher is not None:
            teacher.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore
        self.step = TrainStep(self.denoiser, self.ema, config, teacher=teacher)

    @property
    def last_log(self) -> int:
        return self.history[-1]["images"] if self.history else 0

    def resume(self) -> None:
        if (state := load_state(self.state)) is None:
            return
        try:
            if state["identity"] != self.identity:
                raise ValueError
            self.step.load_state_dict(state)
            self.seen, self.history, self.snapshots = state["images"], state["history"], state["snapshots"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            text = f"{self.state} is not the state of this network; delete it to train this level again."
            raise Damaged(self.state, text) from error

    def save(self) -> None:
        self.check()
        if self.rank == 0:
            progress = {"images": self.seen, "history": self.history, "snapshots": self.snapshots}
            state = {**self.step.state_dict(), **progress, "identity": self.identity}
            atomic_write(self.state, lambda path: torch.save(state, path))

    def take_snapshot(self, snapshot: Callable[[int, Denoiser], None]) -> None:
        self.check()
        if self.rank == 0:
            file = f"ema-{self.seen:010d}.safetensors"
            self.snapshots[file] = save_weights(self.state.with_name(file), self.ema)
            snapshot(self.seen, self.ema)

    def check(self) -> None:
        """Raise UserError, with step and noise level, if a loss or weight is not finite."""
        if not self.step.is_finite():
            what = self.step.trouble(self.state.parent.name)
            saved = f"; the last finite state is in {self.state}" if self.state.is_file() else ""
            raise UserError(f"{what}{saved}: lower train.lr and train again (ARGS='overwrite=true train.lr=...').")

    def log(self, report: Callable[[dict[str, Any]], None], lr: float) -> None:
        """Record the mean loss since the last log."""
        running = self.step.running
        if self.world > 1:
            dist.all_reduce(running)
            running /= self.world
        self.check()
        mean = float(running) / ((self.seen - self.last_log) // self.batch)
        self.history.append({"images": self.seen, "loss": mean})
        running.zero_()
        if self.rank == 0:
            report({"images": self.seen, "loss": mean, "lr": lr})
