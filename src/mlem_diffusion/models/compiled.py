"""Fast evaluation of a trained denoiser for sampling: bf16, channels_last, torch.compile, CUDA graphs."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import SlowPath, UserError
from .torch_compile import Compiled, first_line, options, should_compile
from .unet import Denoiser, UNet

_SMALLEST, _WASTE = 8, 0.25  # smallest bucket; largest padding as a fraction of the samples


def inference_copy(denoiser: nn.Module, precision: str = "float32") -> nn.Module:
    """Return a frozen copy for evaluation only.

    With "bf16" the network's weights and activations are bf16. Group-norm statistics (torch's kernels accumulate them
    in float32), the noise-level features and the preconditioning stay float32.
    """
    if precision not in ("float32", "bf16"):
        raise UserError(f"precision = {precision!r} is unknown; expected 'float32' or 'bf16'.")
    network = copy.deepcopy(denoiser).eval().requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not isinstance(network, Denoiser):
        return network
    if precision == "bf16":
        for parameter in network.unet.parameters():  # not the frequencies of the features, which need float32
            parameter.data = parameter.data.to(torch.bfloat16)
    if isinstance(network.unet, UNet):
        network.unet.join_conditioning()
    return network


def cover(count: int, batch: int | None = None) -> Iterator[tuple[int, int]]:
    """Split a batch of `count` into pieces (samples, bucket); buckets are powers of two from 8, and `batch`.

    The smallest bucket that holds all remaining samples is used if it needs little padding; otherwise the largest
    bucket that the samples fill.
    """
    while count > 0:
        power = max(_SMALLEST, 1 << (count - 1).bit_length())
        fits = batch if batch is not None and count <= batch < power else power
        if fits <= max(_SMALLEST, (1 + _WASTE) * count):
            yield count, fits
            return
        filled = 1 << (count.bit_length() - 1)
        yield filled, filled
        count -= filled


class FastDenoiser:
    """A frozen denoiser (x [B,3,S,S], logsnr 0-dim or [B]) -> float32 [B,3,S,S], as fast as the device allows.

    precision: "float32" or "bf16" (`inference_copy`). compile: "auto" (on CUDA), "on", "off", or "max" (tuned kernels).
    On CUDA each batch-size bucket (`cover`; `batch` is an additional bucket) is captured once as a CUDA graph, compiled
    or not. If derivatives with respect to x are needed, the same network runs eagerly. If compilation or graph capture
    fails, the network runs without it, with one SlowPath warning.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        precision: str = "float32",
        compile: str = "auto",
        name: str = "the network",
        batch: int | None = None,
        graphs: bool = True,
    ):
        self.network, self.precision, self.name = inference_copy(denoiser, precision), precision, name
        self.batch = batch
        device = next(self.network.parameters()).device
        self.run: Callable[[Tensor, Tensor], Tensor] = self.network
        if should_compile(compile, device):
            self.run = Compiled(self.network, name, **options(compile, device))
        self.graphs: dict[tuple, _Graph] | None = {} if graphs and device.type == "cuda" else None

    @property
    def mode(self) -> str:
        """The precision, and the current mode of execution: eager or compiled, with or without CUDA graphs."""
        is_compiled = isinstance(self.run, Compiled) and not self.run.failed
        return f"{self.precision} {'compiled' if is_compiled else 'eager'}{'' if self.graphs is None else ' + graphs'}"

    def __call__(self, x: Tensor, logsnr: Tensor) -> Tensor:
        if logsnr.ndim == 0:  # shared by all samples, so it is embedded once
            logsnr = logsnr.reshape(1)
        if _forward_mode(x):
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward derivative
                return self.network(x, logsnr).float()
        if torch.is_grad_enabled() and x.requires_grad:
            return self.network(x, logsnr).float()
        with torch.no_grad():
            return self.run(x, logsnr).float() if self.graphs is None else self._replayed(x, logsnr)

    def _replayed(self, x: Tensor, logsnr: Tensor) -> Tensor:
        parts, start = [], 0
        for count, bucket in cover(len(x), self.batch):
            piece, at = x[start : start + count], logsnr if len(logsnr) == 1 else logsnr[start : start + count]
            graph = self._graph(bucket, tuple(x.shape[1:]), len(at) == 1, x.device)
            parts.append(graph(piece, at) if graph is not None else self.run(piece, at).float())
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _graph(self, bucket: int, shape: tuple[int, ...], uniform: bool, device: torch.device) -> _Graph | None:
        if self.graphs is None:
            return None
        key = (bucket, *shape, uniform)
        if key not in self.graphs:
            try:
                self.graphs[key] = _Graph(self.run, bucket, shape, 1 if uniform else bucket, device)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.graphs = None
                warnings.warn(f"{self.name} runs without CUDA graphs: {first_line(error)}.", SlowPath, stacklevel=4)
                return None
        return self.graphs[key]


def _forward_mode(x: Tensor) -> bool:
    """Whether forward derivatives or another functorch transform pass through x."""
    return forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore


class _Graph:
    """One captured evaluation with fixed buffers, which it copies its inputs to.

    All existing graphs share one memory pool: they are replayed one after another, and each result is copied at once.
    """

    pool: Any = None
    alive: ClassVar[weakref.WeakSet[_Graph]] = weakref.WeakSet()

    def __init__(self, run: Callable[..., Tensor], bucket: int, shape: tuple[int, ...], rows: int, device: Any):
        if not _Graph.alive:  # the allocator frees a pool with its last graph
            _Graph.pool = torch.cuda.graph_pool_handle()
        # padding is zeros or samples of earlier calls, so it is finite
        self.x = torch.zeros(bucket, *shape, device=device)
        self.logsnr = torch.zeros(rows, device=device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compile, and let libraries choose their algorithms, before the capture
            for _ in range(3):
                run(self.x, self.logsnr).float()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_Graph.pool):
            self.out = run(self.x, self.logsnr).float().contiguous()  # like the sampler's other tensors
        _Graph.alive.add(self)

    def __call__(self, x: Tensor, logsnr: Tensor) -> Tensor:
        self.x[: len(x)].copy_(x)
        self.logsnr[: len(logsnr)].copy_(logsnr)
        self.graph.replay()
        return self.out[: len(x)].clone()
