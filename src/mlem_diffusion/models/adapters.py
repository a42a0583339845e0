"""Adapters that turn other denoising networks into levels: declare a network's inputs and prediction, get a `Level`.

A level denoises x = alpha x0 + sigma eps, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr): "vp" coordinates. "ve"
networks see x / alpha, the image plus noise of standard deviation sigma / alpha; those of a flow see (1 - t) x0 + t eps
("flow"), or another `Interpolant`, such as flow(data_at=1). Predictions: "x0" the image, "epsilon" the noise eps,
"v" = alpha eps - sigma x0, "score" the gradient of the log density, "velocity" the interpolant's derivative by t.

| network | prediction | coordinates | time |
| --- | --- | --- | --- |
| DDPM, Stable Diffusion 1, DiT | epsilon | vp | timestep, with alphas_cumprod |
| EDM, EDM2: D(y, sigma) | x0 | ve | sigma |
| SD3, SANA (Flux: time_scale=1) | velocity | flow | t, time_scale=1000 |
| SiT | velocity | flow(data_at=1) | t |
| JiT | x0, clamp=0.05 | flow(data_at=1, noise_scale) | t |

At high noise, errors of "epsilon" and "score" are multiplied by 1 / alpha."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..diffusion.level import Level, flops_per_evaluation, weight_type
from ..diffusion.process import expand
from ..errors import UserError, is_out_of_memory
from .compiled import first_line
from .interpolants import Interpolant, flow
from .latents import Latents
from .timesteps import fractional_timestep, timestep_table

PREDICTIONS, COORDINATES = ("epsilon", "v", "x0", "score", "velocity"), ("vp", "ve", "flow")
TIMES = ("logsnr", "sigma", "timestep", "t")


def adapt(
    name: str, network: Callable[..., Any], *, prediction: str, coordinates: str | Interpolant = "vp",
    time: str | Callable[[Tensor], Tensor] = "logsnr", time_scale: float = 1.0, alphas_cumprod: Any = None,
    round_timesteps: bool = False, clamp: float = 0.0, conditioning: Mapping[str, Any] | None = None,
    conditions: Iterable[str] | Mapping[str, Any] = (), latents: Latents | None = None,
    shape: tuple[int, ...] | None = None, flops: float | None = None,
) -> Level:  # fmt: skip
    """Return a level for a network that is called as network(input [B,C,H,W], time [B], **conditioning).
    The network returns a tensor, a tuple that starts with one, or an object with one in `.sample`; of twice the
    channels of x (learned variances), the first half is used.

    time: "logsnr"; "sigma", the noise's standard deviation in the network's coordinates; "t" of a flow or interpolant;
    "timestep", the index into the falling alphas_cumprod [T], fractional (linear in log-SNR) unless round_timesteps,
    whose range each call checks, waiting for the device; or a function of logsnr [B]. It is multiplied by time_scale.

    conditioning: keyword arguments; tensors [1, ...], also nested, are expanded to the batch. conditions: the names of
    those that each sample has of its own (BrownianPath), perhaps with an example [1, ...] of each, to count FLOPs.
    Floating-point tensors get the type of the weights.

    clamp: of an x0 that its own sampler turns into the velocity (x0 - x) / max(1 - a, clamp), see interpolants.py: the
    image is moved towards x accordingly. latents: those that the network denoises, if not images.
    flops: of one image; counted for a Module and `shape`.

    Raises UserError for what does not fit; the level does so for noise levels outside the trained range, for images on
    another device, and in training mode if the network has dropout or batch norm."""
    if (alphas_cumprod is not None) != (time == "timestep"):
        raise UserError(f"{name}: time='timestep' and the alphas_cumprod of the network's training belong together.")
    table = None if alphas_cumprod is None else timestep_table(alphas_cumprod)
    convention = Convention(name, prediction, coordinates, time, time_scale, table, round_timesteps, clamp)
    if isinstance(conditions, str):
        raise UserError(f"{name}: conditions are a list of names, or a mapping with examples, not {conditions!r}.")
    fixed, own = dict(conditioning or {}), tuple(conditions)
    if any(tensor.shape[:1] != (1,) for tensor in tree_leaves(fixed) if isinstance(tensor, Tensor)):
        text = "has one row, for all samples; what differs between samples is named in `conditions`"
        raise UserError(f"{name}: conditioning {text}, and given to BrownianPath.")
    if both := sorted(set(fixed).intersection(own)):
        raise UserError(f"{name}: {both[0]} is either the same for all samples (conditioning) or not (conditions).")
    call = _checked(name, network) if isinstance(network, nn.Module) else network

    def denoise(x: Tensor, logsnr: Tensor, **given: Any) -> Tensor:
        weights, wide = weight_type(network), x.to(torch.promote_types(x.dtype, torch.float32))
        logsnr = torch.as_tensor(logsnr, dtype=wide.dtype, device=x.device).expand(len(x))
        when = convention.time_of(logsnr)
        if weights is not None and when.is_floating_point():
            when = when.to(torch.promote_types(weights, torch.float32))

        def rows(tensor: Tensor) -> Tensor:
            kind = weights if weights is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.expand(len(x), *tensor.shape[1:]).to(x.device, kind, copy=True)

        # copies: the network may write into its inputs
        stretch = convention.stretch(logsnr, x)
        entering = (wide if stretch is None else wide * stretch).to(weights or x.dtype, copy=True)
        output = _tensor(name, call(entering, when, **tree_map_only(Tensor, rows, fixed | given)), x)
        return convention.image(wide, stretch, logsnr, output.to(wide.dtype)).to(x.dtype)

    examples = dict(conditions) if isinstance(conditions, Mapping) else {}
    counted = _counted(name, network, time, fixed | examples, shape) if flops is None else float(flops)
    space = "x".join(map(str, shape or ())), latents.scaling if latents else ""
    return Level(name, denoise, counted, conditions=own, space=space)


@dataclass(frozen=True)
class Convention:
    """What a network sees and predicts; see `adapt`. table: of timesteps. UserError for what does not exist."""

    name: str
    prediction: str
    coordinates: str | Interpolant
    time: str | Callable[[Tensor], Tensor]
    time_scale: float = 1.0
    table: tuple[Tensor, int] | None = None
    rounded: bool = False
    clamp: float = 0.0

    def __post_init__(self) -> None:
        known = "flow" if isinstance(self.coordinates, Interpolant) else self.coordinates
        given = ((self.prediction, PREDICTIONS), (known, COORDINATES))
        for value, names in (*given, ("logsnr" if callable(self.time) else self.time, TIMES)):
            if value not in names:
                raise UserError(f"{self.name}: {value!r} is unknown; expected one of {', '.join(names)}.")
        if self.path is None and (self.prediction == "velocity" or self.time == "t"):
            what = "a velocity" if self.prediction == "velocity" else "time='t'"
            raise UserError(f"{self.name}: {what} belongs to a flow: coordinates='flow', or an Interpolant.")
        if self.clamp and (self.path is None or self.prediction != "x0"):
            raise UserError(f"{self.name}: clamp is for prediction='x0' of a flow.")

    @property
    def path(self) -> Interpolant | None:
        return _FLOW if self.coordinates == "flow" else None if isinstance(self.coordinates, str) else self.coordinates

    def stretch(self, logsnr: Tensor, like: Tensor) -> Tensor | None:
        """The network's image over x [B,1,...]; None for x itself."""
        if self.path is not None:
            a, b = self.path.at(self.path.time(logsnr))
            return expand((a**2 + b**2).sqrt(), like)
        return None if self.coordinates == "vp" else 1 / expand(torch.sigmoid(logsnr).sqrt(), like)

    def time_of(self, logsnr: Tensor) -> Tensor:
        """The time [B] that the network is given."""
        if self.table is not None:
            when = fractional_timestep(self.name, logsnr, self.table)
            when = when.round().long() if self.rounded else when
        elif callable(self.time):
            when = self.time(logsnr)
        elif self.time == "logsnr":
            when = logsnr
        elif self.path is not None:
            t = self.path.time(logsnr)
            when = t if self.time == "t" else self.path.at(t)[1]
        else:
            when = torch.sigmoid(-logsnr).sqrt() if self.coordinates == "vp" else torch.exp(-0.5 * logsnr)
        return when if self.time_scale == 1 else when * self.time_scale

    def image(self, x: Tensor, stretch: Tensor | None, logsnr: Tensor, output: Tensor) -> Tensor:
        """The denoised image for a network's output at x [B, ...], seen with this stretch, logsnr [B]."""
        if self.prediction == "velocity" or self.clamp:
            return self._of_flow(x * stretch, expand(self.path.time(logsnr), x), output)  # type: ignore
        if self.prediction == "x0":
            return output
        alpha, sigma = (expand(torch.sigmoid(u).sqrt(), x) for u in (logsnr, -logsnr))
        if self.prediction == "v":
            return alpha * x - sigma * output
        if self.prediction == "epsilon":
            return (x - sigma * output) / alpha
        # of the score in the network's coordinates
        return (x + sigma**2 * (1 if stretch is None else stretch) * output) / alpha

    def _of_flow(self, seen: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The denoised image for a velocity, or a clamped x0, at the network's image, for t [B,1,...]."""
        assert self.path is not None
        if self.prediction == "velocity":
            return self.path.image(seen, output, t)
        near = (1 - self.path.at(t)[0]) / self.clamp
        return torch.where(near < 1, seen + near * (output - seen), output)


_FLOW = flow()


def _counted(name: str, network: Any, time: Any, inputs: dict[str, Any], shape: tuple[int, ...] | None) -> float:
    """The FLOPs of one evaluation, as in `adapt`; UserError if they cannot be counted."""
    if not isinstance(network, nn.Module) or shape is None:
        raise UserError(f"{name}: give flops, or shape = (channels, height, width) and an nn.Module to count them.")
    try:
        when: Any = time(torch.zeros(1)) if callable(time) else torch.zeros(1)
        kind = weight_type(network)

        def meta(tensor: Tensor) -> Tensor:
            return tensor.to("meta", kind if tensor.is_floating_point() else None)

        return flops_per_evaluation(network, shape, when, **tree_map_only(Tensor, meta, inputs))
    except Exception as error:  # of the network's own code
        text = f"{name}: FLOPs could not be counted ({first_line(error)})"
        raise UserError(
            f"{text}; give flops, or in `conditioning` or `conditions` an example of what it needs."
        ) from error


def _checked(name: str, network: nn.Module) -> Callable[..., Any]:
    """The network's call, with UserError in a training mode that changes its output, and for x on another device."""
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.MultiheadAttention
    # p, dropout, and dropout_prob of label embeddings (DiT, SiT): probabilities
    varying = [m for m in network.modules() if isinstance(m, kinds) and getattr(m, "p", getattr(m, "dropout", 1)) > 0]
    varying += [m for m in network.modules() if isinstance(p := getattr(m, "dropout_prob", 0), float) and p > 0]

    def call(x: Tensor, time: Tensor, /, **conditioning: Any) -> Any:
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
