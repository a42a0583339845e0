"""One training step without host synchronisation: gradients, clipping, Adam, moving average and running loss.

On CUDA the step is captured once as a CUDA graph and replayed, because a narrow network is limited by kernel launches.
Weights, gradients and Adam moments are stored in float32 in each precision: "float32"; "autocast" (torch casts single
operations to bf16, group norm stays float32); "bf16" (the forward and backward passes run on a bf16 copy of the
network). The preconditioning and the loss are float32 in each. "auto" is bf16 where the device has its arithmetic,
since the losses of the three precisions agree to about a percent (tests/test_training_step.py)."""

import copy
import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..diffusion.process import add_noise
from ..errors import SlowPath, UserError
from ..models.compiled import Compiled, first_line, to_bf16
from ..models.unet import Denoiser
from .levels import TrainConfig

_WARMUP = 3  # steps before a capture, for compilation, tuning and allocation, which a capture does not allow


def has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())


def should_capture(setting: str, denoiser: nn.Module, device: torch.device, world: int) -> bool:
    """Whether to capture steps; never with several processes (DDP's reductions) or dropout (mask seeds)."""
    possible = device.type == "cuda" and world == 1 and not has_dropout(denoiser)
    if setting == "on" and not possible:
        raise UserError("train.graph = 'on' needs a CUDA device, one process and a network without dropout.")
    return possible and setting != "off"


class LossModule(nn.Module):
    """The compiled and distributed forward pass: clean batch, noise, log-SNR -> losses [B].
    With a teacher the target is its denoised image instead of x0: the same conditional mean, without x0's noise."""

    def __init__(self, denoiser: Denoiser, teacher: Denoiser | None = None):
        super().__init__()
        self.denoiser, self.teacher = denoiser, teacher

    def forward(self, x0: Tensor, noise: Tensor, logsnr: Tensor) -> Tensor:
        x = add_noise(x0, noise, logsnr)
        if self.teacher is None:
            return self.denoiser.loss(x, x0, logsnr)
        with torch.no_grad():
            target = self.teacher(x, logsnr)
        return self.denoiser.loss(x, target, logsnr)


class TrainStep:
    """A function step(batch, lr, decay) that updates the denoiser and its moving average `ema` in place, in float32.
    batch: this process's x0 [B,3,S,S] in [-1, 1], noise [B,3,S,S], log-SNR [B] on the device. B is the same in each
    call and a multiple of config.accumulate, the number of micro-batches whose gradients are added. lr: learning rate.
    decay: of the moving average. `running` is the sum of the steps' mean losses, on the device. With several processes,
    gradients are averaged (DistributedDataParallel). rates_on_device: learning rate and decay are tensors, as a CUDA
    graph needs (the default if one is used).
    teacher: a frozen denoiser on the same device whose outputs are the targets.
    Raises UserError if graph = "on" is impossible. If compilation or capture fails, it warns SlowPath once."""

    def __init__(
        self, denoiser: Denoiser, ema: nn.Module, config: TrainConfig, rates_on_device: bool | None = None,
        teacher: Denoiser | None = None,
    ):  # fmt: skip
        self.denoiser, self.ema, self.config, self.teacher = denoiser, ema, config, teacher
        self.masters: list[Tensor] = list(denoiser.parameters())
        self.averages: list[Tensor] = list(ema.parameters())
        self.device = self.masters[0].device
        self.running = torch.zeros((), device=self.device)
        # step and log-SNR of the first image whose loss is not finite; on the device, so that the host does not wait
        self._steps = torch.zeros((), device=self.device, dtype=torch.int64)
        self._trouble = torch.full((2,), -1.0, device=self.device, dtype=torch.float64)
        graphed = should_capture(config.graph, denoiser, self.device, parallel.world())
        self.rates_on_device = graphed if rates_on_device is None else rates_on_device
        self._rates = torch.zeros(2, device=self.device)  # learning rate, 1 - decay
        self._new_weight: Any = self._rates[1] if self.rates_on_device else 1.0
        rate = self._rates[0] if self.rates_on_device else 0.0
        fused = self.device.type in ("cuda", "cpu")
        self.optimiser = torch.optim.Adam(self.masters, lr=rate, betas=(0.9, 0.99), fused=fused, capturable=graphed)
        self._make_forward()
        self._take: Any = GraphedStep(self.take, self.device) if graphed else self.take

    def _make_forward(self) -> None:
        bf16 = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] >= 8
        fastest = "bf16" if bf16 else "float32"
        self.precision = fastest if self.config.precision == "auto" else self.config.precision
        self.has_copy, working = self.precision == "bf16", self.denoiser
        self.gradients: list[Tensor] = []  # of the masters, unless autograd stores them
        if self.has_copy:
            working = copy.deepcopy(self.denoiser)
            to_bf16(working.unet)
            if self.teacher is not None:
                self.teacher = copy.deepcopy(self.teacher)
                to_bf16(self.teacher.unet)
            self.gradients = [torch.zeros_like(p, requires_grad=False) for p in self.masters]
            for parameter, gradient in zip(self.masters, self.gradients, strict=True):
                parameter.grad = gradient
        self.working: list[Tensor] = list(working.parameters())
        self.forward: Any = LossModule(working, self.teacher)
        self.parallel: Any = None
        if parallel.world() > 1:  # DDP wraps the module before compilation
            self.forward = self.parallel = nn.parallel.DistributedDataParallel(self.forward)
            self.parallel.broadcast_buffers = False  # they never change
        self.compiled = Compiled(self.forward, "Training", self.config.compile, self.device, dynamic=False)

    def __call__(self, batch: Sequence[Tensor], lr: float, decay: float) -> None:
        if self.rates_on_device:  # fill_ passes the number as a kernel argument, without a copy from the host
            self._rates[0].fill_(lr)
            self._rates[1].fill_(1 - decay)
        else:
            self.optimiser.param_groups[0]["lr"] = lr
            self._new_weight = 1 - decay
        self._take(batch)

    def take(self, batch: Sequence[Tensor]) -> None:
        """Take a step with the current rates; this is the function that a CUDA graph captures."""
        loss = self._gradients_of(batch)
        nn.utils.clip_grad_norm_(self.masters, self.config.clip)
        self.optimiser.step()
        with torch.no_grad():
            if self.rates_on_device:  # _foreach_lerp_ does not accept a weight on the device
                difference = torch._foreach_sub(self.masters, self.averages)
                torch._foreach_mul_(difference, self._new_weight)
                torch._foreach_add_(self.averages, difference)
            else:
                torch._foreach_lerp_(self.averages, self.masters, self._new_weight)
            self._refresh_copy()
            self.running += loss
            self._steps += 1

    def _gradients_of(self, batch: Sequence[Tensor]) -> Tensor:
        """Accumulate the gradients of the full batch in the masters' .grad and return the mean loss."""
        # autograd accumulates float32 gradients in .grad; bf16 gradients are added in float32, except under DDP, which
        # averages .grad over the processes after the last micro-batch
        one_by_one, count = self.has_copy and self.parallel is None, self.config.accumulate
        losses = []
        for i, part in enumerate(zip(*(tensor.chunk(count) for tensor in batch), strict=True)):
            last = i == count - 1
            with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                losses.append(self._forward_backward(part, fresh=i == 0 or one_by_one))
            if self.has_copy and (last or one_by_one):
                gradients: list[Any] = [parameter.grad for parameter in self.working]
                if i == 0 or not one_by_one:
                    torch._foreach_copy_(self.gradients, gradients)
                else:
                    torch._foreach_add_(self.gradients, gradients)
        return losses[0] if count == 1 else torch.stack(losses).sum()

    def _forward_backward(self, part: Sequence[Tensor], fresh: bool) -> Tensor:
        """Add a micro-batch's gradients to the working network's, or replace these; return its share of the loss."""

        def work(forward: Callable[..., Tensor]) -> Tensor:
            if fresh:
                for parameter in self.working:
                    parameter.grad = None
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "autocast"):
                losses = forward(*part)
            loss = losses.mean()
            self._record_trouble(losses.detach(), part[2])
            if self.config.accumulate > 1:
                loss = loss / self.config.accumulate
            loss.backward()  # compiled when it first runs
            return loss.detach()

        return self.compiled.use(work)

    def _record_trouble(self, losses: Tensor, logsnr: Tensor) -> None:
        bad = ~torch.isfinite(losses)
        at = logsnr.take(bad.int().argmax())  # indexing by a scalar tensor would read it on the host
        found = torch.stack([self._steps.double() + 1, at.double()])
        self._trouble.copy_(torch.where(bad.any() & (self._trouble[0] < 0), found, self._trouble))

    def trouble(self, what: str) -> str:
        """The sentence on where the loss (or else a weight) was first not finite."""
        step, logsnr = self._trouble.tolist()
        if step < 0:
            return f"The weights of {what} are not finite at step {int(self._steps)}"
        return f"The loss of {what} is not finite at step {int(step)}, first at log-SNR {logsnr:.3g}"

    def is_finite(self) -> bool:
        """Whether losses since the last log, weights and moments are all finite."""
        moments = [t for state in self.optimiser.state.values() for t in state.values() if isinstance(t, Tensor)]
        tensors = [self.running, *self.masters, *self.averages, *moments]
        return bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())

    @torch.no_grad()
    def _refresh_copy(self) -> None:
        if self.has_copy:
            torch._foreach_copy_(self.working, self.masters)

    def state_dict(self) -> dict[str, Any]:
        """The float32 state that resumes training in a TrainStep of the same network, in any precision."""
        return {
            "model": self.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": {"state": self.optimiser.state_dict()["state"]},  # its settings depend on the device
            "running": float(self.running),
            "steps": int(self._steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict` before the first step; torch's errors for a foreign state are raised."""
        self.denoiser.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state["optimiser"]["state"]})
        if self.rates_on_device:
            self.optimiser.param_groups[0]["lr"] = self._rates[0]  # load_state_dict copies the tensor
        self.running.fill_(float(state["running"]))
        self._steps.fill_(int(state["steps"]))
        self._refresh_copy()


class GraphedStep:
    """A function step(batch) that runs on fixed buffers: a few calls on a side stream, then as a CUDA graph.
    Each call is one training step. A capture only records the step, so the graph is replayed once after it. If the
    capture fails, all steps run without a graph, with one SlowPath warning."""

    def __init__(self, step: Callable[[Sequence[Tensor]], None], device: torch.device):
        self.step, self.device = step, device
        self.buffers: list[Tensor] = []
        self.graph: Any = None
        self.calls, self.failed = 0, False
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Sequence[Tensor]) -> None:
        if self.failed:
            self.step(batch)
            return
        self.buffers = self.buffers or [torch.empty_like(tensor) for tensor in batch]
        for buffer, tensor in zip(self.buffers, batch, strict=True):
            buffer.copy_(tensor)
        self.calls += 1
        if self.calls <= _WARMUP:
            self._on_side_stream()
            return
        if self.graph is None:
            try:
                self.graph = self._capture()
            except Exception as error:
                self.failed, self.buffers = True, []
                reason = f"CUDA graph capture failed ({first_line(error)})"
                warnings.warn(f"Training runs without a CUDA graph: {reason}.", SlowPath, stacklevel=2)
                self.step(batch)
                return
        self.graph.replay()

    def _on_side_stream(self) -> None:
        """Run a step on the stream of the later capture, since libraries have handles and workspaces per stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step(self.buffers)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self) -> Any:
        gc.collect()  # so that no object with CUDA memory or graphs is freed during the capture
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads' use of the device, such as monitoring, does not break the capture
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step(self.buffers)
        return graph
