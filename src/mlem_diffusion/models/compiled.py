"""Fast evaluation of a trained denoiser for sampling: bf16, channels_last, torch.compile, CUDA graphs."""

import copy
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import SlowPath, UserError, is_out_of_memory
from .unet import Denoiser, UNet

T = TypeVar("T")

SETTINGS = ("auto", "on", "off", "max")
_PROGRAMS = 256  # programs that dynamo may cache per function: each level of a family needs its own
_SMALLEST, _WASTE = 8, 0.25  # smallest bucket; largest padding as a fraction of the samples


def first_line(error: BaseException) -> str:
    """The first line of an error that is not blank, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".:")[:160]


def set_compile_caches() -> None:
    """Let torch.compile and Triton keep programs in the folders that their variables name, else in the user's cache.
    Where these cannot be written, compilation fails, and `Compiled` goes on without it."""
    usual = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/mlem-diffusion/compile"
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = os.path.abspath(os.path.expanduser(os.environ.get(variable) or usual))
        os.environ[variable], usual = folder, f"{folder}/triton"


class Compiled:
    """A function or module that torch.compile compiles when it is first used; compiled programs are kept on disk.
    setting: "off", "on", "auto" (on CUDA), or "max", which tunes kernels and takes minutes. CUDA graphs are left to the
    callers. If only the compiled function fails at its first use, or compilation for other shapes later, it is eager
    from then on, with one SlowPath warning that begins with `what`. Out-of-memory and later errors are raised."""

    def __init__(self, function: Callable[..., Any], what: str, setting: str, device: torch.device, **options: Any):
        if setting not in SETTINGS:
            raise UserError(f"compile = {setting!r} is unknown; expected one of {', '.join(SETTINGS)}.")
        self.function, self.eager, self.what, self.options = function, function, what, options
        self.decided = setting == "off" or (setting == "auto" and device.type != "cuda")
        if device.type == "cuda":
            tuned = {"coordinate_descent_tuning": True, "max_autotune": True} if setting == "max" else {}
            self.options["options"] = {"conv_1x1_as_mm": True, "triton.cudagraphs": False, **tuned}

    def __call__(self, *args: Any) -> Any:
        return self.use(lambda function: function(*args))

    def use(self, work: Callable[[Callable[..., Any]], T]) -> T:
        """Return work(function); its first call also decides whether the function is compiled."""
        if self.decided and self.function is self.eager:
            return work(self.eager)
        try:
            if not self.decided:
                set_compile_caches()
                # it warns without a CUDA toolkit
                logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
                torch._dynamo.config.cache_size_limit = max(_PROGRAMS, torch._dynamo.config.cache_size_limit)
                self.function = torch.compile(self.eager, **self.options)
            result = work(self.function)
        except Exception as error:
            compiler: Any = torch._dynamo
            if is_out_of_memory(error) or (self.decided and not isinstance(error, compiler.exc.TorchDynamoException)):
                raise
            self.function = self.eager
            result = work(self.eager)  # raises the function's own errors
            reason = first_line(error)
            warnings.warn(f"{self.what} runs eagerly: compilation failed ({reason}).", SlowPath, stacklevel=3)
        self.decided = True
        return result


def to_bf16(module: nn.Module) -> None:
    """Round a module's parameters to bf16 in place; its buffers (noise-level frequencies) stay float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def cover(count: int, batch: int | None = None) -> Iterator[tuple[int, int]]:
    """Split a batch of `count` into pieces (samples, bucket); buckets are powers of two from 8, and `batch`. The
    smallest bucket that holds the rest is used if it needs little padding, else the largest that the rest fills."""
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
    """A frozen copy of a denoiser (x [B,3,S,S], logsnr 0-dim or [B]) -> float32 [B,3,S,S], as fast as the device can.
    A third argument, the output of the Gaussian denoiser that preconditions the network, saves evaluating it again.
    precision: "float32", or "bf16" for the network's weights and activations; group-norm statistics, the noise-level
    features and the preconditioning stay float32. compile: the setting of `Compiled`. On CUDA each batch-size bucket
    (`cover`; `batch` is one more) is captured once as a CUDA graph, compiled or not. If compilation or capture fails,
    it runs without, with one SlowPath warning; if derivatives by x are needed, eagerly."""

    def __init__(
        self, denoiser: nn.Module, precision: str = "float32", compile: str = "auto", name: str = "the network",
        batch: int | None = None, graphs: bool = True,
    ):  # fmt: skip
        if precision not in ("float32", "bf16"):
            raise UserError(f"precision = {precision!r} is unknown; expected 'float32' or 'bf16'.")
        network: Any = copy.deepcopy(denoiser).eval().requires_grad_(False)
        network.to(memory_format=torch.channels_last)
        if precision == "bf16" and isinstance(network, Denoiser):
            to_bf16(network.unet)
        if isinstance(network, Denoiser) and isinstance(network.unet, UNet):
            network.unet.join_conditioning()
        self.network, self.name, self.batch = network, name, batch
        device = next(self.network.parameters()).device
        self.run = Compiled(self.network, name, compile, device)
        self.graphs: dict[tuple, _Graph] | None = {} if graphs and device.type == "cuda" else None

    def __call__(self, x: Tensor, logsnr: Tensor, *common: Tensor) -> Tensor:
        logsnr = logsnr.reshape(-1)  # one level that all samples share is embedded once
        # forward derivatives or another functorch transform
        if forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward derivative
                return self.network(x, logsnr, *common).float()
        if torch.is_grad_enabled() and x.requires_grad:
            return self.network(x, logsnr, *common).float()
        with torch.no_grad():
            given = (x, logsnr, *common)
            return self.run(*given).float() if self.graphs is None else self._replayed(*given)

    def _replayed(self, x: Tensor, logsnr: Tensor, *common: Tensor) -> Tensor:
        parts, start = [], 0
        for count, bucket in cover(len(x), self.batch):
            piece, at = x[start : start + count], logsnr if len(logsnr) == 1 else logsnr[start : start + count]
            known = [tensor[start : start + count] for tensor in common]
            key = (bucket, *x.shape[1:], len(at) == 1, len(known))
            if self.graphs is not None and key not in self.graphs:  # captured when it is first used
                try:
                    # padding is zeros or earlier samples, so it is finite
                    given = [x.new_zeros(bucket, *x.shape[1:]) for _ in (x, *known)]
                    given.insert(1, x.new_zeros(1 if len(at) == 1 else bucket))
                    self.graphs[key] = _Graph(self.run, given)
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    self.graphs = None
                    warnings.warn(f"{self.name} runs without CUDA graphs: {first_line(error)}.", SlowPath, stacklevel=3)
            evaluate = (lambda *given: self.run(*given).float()) if self.graphs is None else self.graphs[key]
            parts.append(evaluate(piece, at, *known))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Graph:
    """One captured evaluation with fixed buffers, which it copies its inputs to. All existing graphs share one memory
    pool: they are replayed one after another, and each result is copied at once."""

    pool: Any = None
    alive: ClassVar["weakref.WeakSet[_Graph]"] = weakref.WeakSet()

    def __init__(self, run: Callable[..., Tensor], given: list[Tensor]):
        if not _Graph.alive:  # the allocator frees a pool with its last graph
            _Graph.pool = torch.cuda.graph_pool_handle()
        self.given, device = given, given[0].device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compile, and let libraries choose their algorithms, before the capture
            for _ in range(3):
                run(*self.given).float()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_Graph.pool):
            self.out = run(*self.given).float().contiguous()  # like the sampler's other tensors
        _Graph.alive.add(self)

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        for buffer, tensor in zip(self.given, (x, *others), strict=True):
            buffer[: len(tensor)].copy_(tensor)
        self.graph.replay()
        return self.out[: len(x)].clone()
