"""Adapters that turn other denoising networks into levels: declare a network's inputs and prediction, get a `Level`.

A level denoises x = alpha x0 + sigma eps, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr): "vp" coordinates. "ve"
networks see x / alpha, the image plus noise of standard deviation sigma / alpha. Predictions: "x0" the image, "epsilon"
the noise eps, "v" = alpha eps - sigma x0, "score" the gradient of the log density.

An EDM denoiser D(y, sigma) is prediction="x0", coordinates="ve", time="sigma"; a DDPM network is prediction="epsilon",
time="timestep" with its alphas_cumprod. At high noise, errors of "epsilon" and "score" are multiplied by 1 / alpha."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..diffusion.level import Level, flops_per_evaluation, weight_type
from ..diffusion.process import expand
from ..errors import UserError, is_out_of_memory
from .compiled import first_line

PREDICTIONS, COORDINATES, TIMES = ("epsilon", "v", "x0", "score"), ("vp", "ve"), ("logsnr", "sigma", "timestep")
TOLERANCE = 1e-3  # in log-SNR, at the ends of the trained range: float32 tables are rounded
CLAMPED = 2.0**-24  # diffusers' stand-in for the zero at the end of alphas_cumprod (zero terminal SNR)


def adapt(
    name: str, network: Callable[..., Any], *, prediction: str, coordinates: str = "vp",
    time: str | Callable[[Tensor], Tensor] = "logsnr", alphas_cumprod: Any = None,
    conditioning: Mapping[str, Any] | None = None, shape: tuple[int, ...] | None = None, flops: float | None = None,
) -> Level:  # fmt: skip
    """Return a level for a network that is called as network(input [B,C,H,W], time [B], **conditioning).
    The network returns a tensor, a tuple that starts with one, or an object with one in `.sample`; of twice the
    channels of x (learned variances), the first half is used. time: "logsnr"; "sigma", the noise's standard deviation
    in the network's coordinates; "timestep", the index into the falling alphas_cumprod [T], fractional (linear in
    log-SNR), whose range each call checks, waiting for the device; or a function of logsnr [B]. conditioning: keyword
    arguments; tensors [1, ...], also nested, are expanded to the batch. flops: of one image; counted for a Module and
    `shape`. Raises UserError for what does not fit; the level does so for noise levels outside the trained range, for
    images on another device, and in training mode if the network has dropout or batch norm."""
    given = ((prediction, PREDICTIONS), (coordinates, COORDINATES), ("logsnr" if callable(time) else time, TIMES))
    for value, known in given:
        if value not in known:
            raise UserError(f"{name}: {value!r} is unknown; expected one of {', '.join(known)}.")
    if (alphas_cumprod is not None) != (time == "timestep"):
        raise UserError(f"{name}: time='timestep' and the alphas_cumprod of the network's training belong together.")
    table = None if alphas_cumprod is None else _timestep_table(alphas_cumprod)
    inputs = dict(conditioning or {})
    if any(tensor.shape[:1] != (1,) for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)):
        # a level runs only on the samples whose coin fired, and does not know which
        raise UserError(f"{name}: conditioning must have one row, for all samples: sample one condition after another.")
    call = _checked(name, network) if isinstance(network, nn.Module) else network

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        wide_type, own = torch.promote_types(x.dtype, torch.float32), weight_type(network)
        logsnr = torch.as_tensor(logsnr, dtype=wide_type, device=x.device).expand(len(x))
        when, std = logsnr, torch.sigmoid(-logsnr).sqrt()
        if table is not None:
            when = _timestep(name, logsnr, table)
        elif callable(time):
            when = time(logsnr)
        elif time == "sigma":
            when = std if coordinates == "vp" else torch.exp(-0.5 * logsnr)
        if own is not None and when.is_floating_point():
            when = when.to(torch.promote_types(own, torch.float32))
        wide, alpha, sigma = x.to(wide_type), expand(torch.sigmoid(logsnr).sqrt(), x), expand(std, x)
        # a copy: the network may write into its input
        entering = (wide if coordinates == "vp" else wide / alpha).to(own or x.dtype, copy=True)
        rows = tree_map_only(Tensor, lambda tensor: tensor.to(x.device).expand(len(x), *tensor.shape[1:]), inputs)
        output = _tensor(name, call(entering, when, **rows), x).to(wide_type)
        if prediction == "score" and coordinates == "ve":
            output = output / alpha  # d/dx = d/dy / alpha
        if prediction == "v":
            output = alpha * wide - sigma * output
        elif prediction != "x0":
            output = (wide - sigma * output if prediction == "epsilon" else wide + sigma**2 * output) / alpha
        return output.to(x.dtype)

    return Level(name, denoise, _counted(name, network, time, inputs, shape) if flops is None else float(flops))


def _counted(name: str, network: Any, time: Any, inputs: dict[str, Any], shape: tuple[int, ...] | None) -> float:
    """The FLOPs of one evaluation, as in `adapt`; UserError if they cannot be counted."""
    if not isinstance(network, nn.Module) or shape is None:
        raise UserError(f"{name}: give flops, or shape = (channels, height, width) and an nn.Module to count them.")
    try:
        when: Any = time(torch.zeros(1)) if callable(time) else torch.zeros(1)
        return flops_per_evaluation(network, shape, when, **tree_map_only(Tensor, lambda t: t.to("meta"), inputs))
    except Exception as error:  # of the network's own code
        text = f"{name}: FLOPs could not be counted ({first_line(error)})"
        raise UserError(f"{text}; give flops, or in `conditioning` what the network needs.") from error


def from_diffusers(name: str, unet: nn.Module, scheduler: Any, **options: Any) -> Level:
    """Return a level for a diffusers UNet (UNet2DModel, UNet2DConditionModel, ...) and its training scheduler.
    The UNet must take fractional timesteps, as all do that do not look them up in a table. The scheduler's clipping is
    not applied. options: conditioning, shape (by default the UNet's) and flops, as for `adapt`. Sample in
    Process(LinearSchedule(), *trained_range(scheduler)). Raises UserError for other schedulers."""
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    prediction = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}.get(str(predicts))
    if prediction is None:
        kind = f"prediction type {predicts!r} of {type(scheduler).__name__}"
        raise UserError(f"{name}: {kind} is not supported yet; use adapt(), or a Level with a function of your own.")
    config: Any = getattr(unet, "config", None)
    size = getattr(config, "sample_size", None)
    if size is not None:
        options = {"shape": (config.in_channels, *((size, size) if isinstance(size, int) else size)), **options}
    by_class = (getattr(config, key, None) for key in ("class_embed_type", "num_class_embeds"))
    if any(value is not None for value in by_class) and "class_labels" not in (options.get("conditioning") or {}):
        raise UserError(f"{name}: the UNet is class-conditional: give conditioning={{'class_labels': a tensor [1]}}.")
    return adapt(name, unet, prediction=prediction, time="timestep", alphas_cumprod=scheduler, **options)


def guided(conditional: Level, unconditional: Level, scale: float) -> Level:
    """Return classifier-free guidance as one level: D_u + scale (D_c - D_u), at the sum of their FLOPs.
    See Ho and Salimans 2022, with scale = 1 + w. The second level may also be a weaker network (autoguidance)."""

    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        base = unconditional.denoise(x, logsnr)
        return base + scale * (conditional.denoise(x, logsnr) - base)

    return Level(conditional.name, denoise, conditional.flops + unconditional.flops)


def trained_range(source: Any) -> tuple[float, float]:
    """The lowest and highest trained log-SNR of a diffusers scheduler or of alphas_cumprod, for Process."""
    logsnr = _timestep_table(source)[0]
    return float(logsnr[0]), float(logsnr[-1])


def _timestep_table(source: Any) -> tuple[Tensor, int]:
    """Ascending log-SNRs of consecutive timesteps, without infinite ones (zero terminal SNR), and the last timestep."""
    values = getattr(source, "alphas_cumprod", source)
    try:
        values = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
        alpha2 = np.array(values, dtype=np.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        other = "adapt() takes EDM denoisers D(y, sigma): prediction='x0', coordinates='ve', time='sigma'"
        raise UserError(f"{type(source).__name__} has no alphas_cumprod; {other}.") from error
    if alpha2.ndim == 1 and len(alpha2) and alpha2[-1] == CLAMPED:
        alpha2[-1] = 0
    if alpha2.ndim != 1 or len(alpha2) < 2 or not np.all(np.diff(alpha2) < 0) or alpha2[0] > 1 or alpha2[-1] < 0:
        text = "alphas_cumprod must fall from timestep to timestep within [0, 1], with two values or more"
        raise UserError(f"{text}, in float32 at least.")
    timestep = np.flatnonzero((alpha2 > 0) & (alpha2 < 1))[::-1]
    return torch.from_numpy(np.log(alpha2[timestep]) - np.log1p(-alpha2[timestep])), int(timestep[0])


def _timestep(name: str, logsnr: Tensor, table: tuple[Tensor, int]) -> Tensor:
    """Fractional timesteps [B]; UserError outside the trained range."""
    lowest, highest = float(table[0][0]), float(table[0][-1])
    outside = logsnr[~((logsnr >= lowest - TOLERANCE) & (logsnr <= highest + TOLERANCE))]  # NaN too
    if len(outside):
        text = f"{name}: a log-SNR of {float(outside[0]):.4g} is outside {lowest:.4g} .. {highest:.4g}"
        raise UserError(f"{text}, the range of its training; set logsnr_min and logsnr_max of the Process within it.")
    known = table[0].to(logsnr)
    above = torch.searchsorted(known, logsnr.detach().contiguous()).clamp(1, len(known) - 1)
    return table[1] - (above - 1 + ((logsnr - known[above - 1]) / (known[above] - known[above - 1])).clamp(0, 1))


def _checked(name: str, network: nn.Module) -> Callable[..., Any]:
    """The network's call, with UserError in a training mode that changes its output, and for x on another device."""
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.MultiheadAttention
    # p and dropout: probabilities
    varying = [m for m in network.modules() if isinstance(m, kinds) and getattr(m, "p", getattr(m, "dropout", 1)) > 0]

    def call(x: Tensor, time: Tensor, **conditioning: Any) -> Any:
        if any(module.training for module in varying):
            raise UserError(f"{name}: dropout or batch norm is in training mode: call the network's .eval() first.")
        try:
            return network(x, time, **conditioning)
        except RuntimeError as error:
            home = next((p.device for p in network.parameters()), x.device)
            if home == x.device or is_out_of_memory(error):
                raise
            raise UserError(f"{name}: the network is on {home}, the images are on {x.device}: move it.") from error

    return call


def _tensor(name: str, output: Any, x: Tensor) -> Tensor:
    """The tensor in a network's output; its first half if it has twice the channels of x."""
    if not isinstance(output, Tensor):
        output = next(iter(output), None) if isinstance(output, tuple | list) else getattr(output, "sample", output)
    if isinstance(output, Tensor) and output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if not isinstance(output, Tensor) or output.shape != x.shape:
        found = f"shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(f"{name}: the network returned {found} for an input of {list(x.shape)}.")
    return output
