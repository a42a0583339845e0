"""Levels from the networks of diffusers, by the conventions of their training schedulers, and the process to sample in.

Networks: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel,
SanaTransformer2DModel, and others with the call network(x, timestep=..., ...). diffusers itself is not imported."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.level import Level
from ..diffusion.process import FlowSchedule, LinearSchedule, Process
from ..errors import UserError
from .adapters import adapt
from .interpolants import FLOW_START
from .timesteps import timestep_table

# the keyword arguments that a network cannot do without
_NEEDS = {
    "UNet2DConditionModel": ("encoder_hidden_states",), "DiTTransformer2DModel": ("class_labels",),
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "SanaTransformer2DModel": ("encoder_hidden_states",),
}  # fmt: skip
_FLOWS = ("SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel")
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_FLUX_PATCH = 2


def from_diffusers(name: str, network: nn.Module, scheduler: Any, **options: Any) -> Level:
    """Return a level for a diffusers network and the scheduler of its training, or another of the same noise.
    Sample in `process_of(scheduler)`. The network must take fractional timesteps, as all do that do not look them up in
    a table (else round_timesteps=True). The scheduler's clipping and learned variances are not used. options:
    conditioning, conditions, shape (by default the network's), latents, flops and round_timesteps, as for `adapt`; what
    the network needs beyond image and time is named in one of the first two. Flux takes latents [B,C,H,W]; its
    image and text positions are made here. Raises UserError for other schedulers, and for what is missing."""
    kind, config = type(network).__name__, getattr(network, "config", None)
    prediction = _prediction(name, scheduler)
    if kind in _FLOWS and prediction != "velocity":
        raise UserError(f"{name}: {kind} predicts a flow's velocity, and {type(scheduler).__name__} is of no flow.")
    needs = _NEEDS.get(kind, ())
    if any(getattr(config, key, None) is not None for key in ("class_embed_type", "num_class_embeds")):
        needs = (*needs, "class_labels")
    if getattr(config, "guidance_embeds", False):
        needs = (*needs, "guidance")
    given = {*(options.get("conditioning") or {}), *options.get("conditions", ())}
    if missing := [need for need in needs if need not in given]:
        text = f"name it in conditions, or give conditioning={{'{missing[0]}': a tensor [1, ...]}}"
        raise UserError(f"{name}: {kind} needs {missing[0]}: {text}.")
    if (size := getattr(config, "sample_size", None)) is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        options = {"shape": (config.in_channels, *sides), **options}  # type: ignore[union-attr]
    call = _Call(network, kind)
    if prediction != "velocity":
        return adapt(name, call, prediction=prediction, time="timestep", alphas_cumprod=scheduler, **options)
    scale = 1.0 if kind == "FluxTransformer2DModel" else float(scheduler.config.num_train_timesteps)
    scale *= getattr(config, "timestep_scale", None) or 1.0
    return adapt(name, call, prediction="velocity", coordinates="flow", time="t", time_scale=scale, **options)


def process_of(scheduler: Any, shift: float | None = None, base_steps: int = 2049) -> Process:
    """The process of a diffusers scheduler: its trained noise levels, and for a flow its grid with its `shift`.
    shift: of a flow, where the scheduler's depends on the size of the image (use_dynamic_shifting: exp(mu)). Other
    grids (Karras, exponential, beta, shift_terminal) are not taken over. On a flow's grid, which ends in long steps of
    log-SNR, dpmpp_2m and unipc are worse than ddim in few steps; Process(FlowSchedule(), -12, 9) suits them."""
    if _prediction("process_of", scheduler) != "velocity":
        return Process(LinearSchedule(), *trained_range(scheduler), base_steps)
    config = scheduler.config
    if getattr(config, "use_dynamic_shifting", False) and shift is None:
        raise UserError(
            f"{type(scheduler).__name__} shifts by the size of the image: give shift, exp(mu) of its pipeline."
        )
    own = getattr(config, "flow_shift", None) or getattr(config, "shift", None) or 1.0
    schedule = FlowSchedule(float(own if shift is None else shift))
    return Process(schedule, FLOW_START, float(schedule.logsnr(np.array(_least(scheduler)))), base_steps, "time")


def trained_range(source: Any) -> tuple[float, float]:
    """The lowest and highest log-SNR of a diffusers scheduler or of alphas_cumprod, for Process: those trained, or of a
    flow FLOW_START and that of its smallest t, before a shift."""
    if _is_flow(source):
        return FLOW_START, float(FlowSchedule().logsnr(np.array(_least(source))))
    logsnr = timestep_table(source)[0]
    return float(logsnr[0]), float(logsnr[-1])


def _least(scheduler: Any) -> float:
    """The smallest t of a flow's grid in diffusers, before its shift."""
    kept = type(scheduler).__name__ in _FLOW_SCHEDULERS  # others keep a sigma_min of the variance-preserving kind
    return float(scheduler.sigma_min) if kept else 1 / scheduler.config.num_train_timesteps


def _is_flow(scheduler: Any) -> bool:
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return type(scheduler).__name__ in _FLOW_SCHEDULERS or predicts == "flow_prediction"


def _prediction(name: str, scheduler: Any) -> str:
    """What a network of this scheduler predicts; UserError for schedulers that are not supported."""
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    predicts = str(getattr(config, "prediction_type", None))
    if getattr(config, "timestep_type", None) == "continuous":
        raise UserError(f"{name}: {kind} with timestep_type='continuous' is not supported; use adapt().")
    if _is_flow(scheduler):
        if getattr(config, "invert_sigmas", False) or getattr(config, "use_flow_sigmas", True) is False:
            raise UserError(
                f"{name}: {kind} with these sigmas is of no rectified flow (invert_sigmas, use_flow_sigmas)."
            )
        return "velocity"
    known = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    if predicts not in known:
        text = f"{name}: prediction type {predicts} of {kind} is not supported"
        raise UserError(f"{text}; use adapt(), or a Level with a function of your own.")
    return known[predicts]


class _Call(nn.Module):
    """A diffusers network as network(x [B,C,H,W], time [B], **conditions)."""

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.flux = network, kind == "FluxTransformer2DModel"

    def forward(self, x: Tensor, time: Tensor, **conditions: Any) -> Any:
        if not self.flux:
            return self.network(x, timestep=time, **conditions)
        p = _FLUX_PATCH
        rows, columns = (torch.arange(size // p, device=x.device, dtype=x.dtype) for size in x.shape[2:])
        places = torch.cartesian_prod(rows[:1] * 0, rows, columns)  # [tokens, 3]
        ids = {"img_ids": places, "txt_ids": x.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)}
        tokens = nn.functional.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)
        found = self.network(tokens, timestep=time, **ids, **conditions)
        found = found[0] if isinstance(found, tuple) else found.sample
        out = found.transpose(1, 2).unflatten(2, (len(rows), len(columns)))
        return nn.functional.pixel_shuffle(out, p)
