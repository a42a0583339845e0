"""Flows and other interpolants: each convention against the posterior mean in the network's own coordinates, their
noise schedule, and diffusers' flow networks and schedulers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_adapters import SHAPE, exact
from torch import Tensor
from toys import grid_of

from mlem_diffusion import (
    BrownianPath,
    FlowSchedule,
    Interpolant,
    Process,
    SingleLevel,
    UserError,
    adapt,
    flow,
    from_diffusers,
    process_of,
    sample,
    step_rule,
)
from mlem_diffusion.diffusion.process import expand
from mlem_diffusion.models.interpolants import FLOW_START

HALF = 0.5 * math.pi
# name: (coordinates, a, b, da/dt, db/dt, t of sqrt(SNR)); the formulas are written anew
PATHS: dict[str, Any] = {
    "data at 0": ("flow", lambda t: 1 - t, lambda t: t, -1, 1, lambda r: 1 / (1 + r)),
    "data at 1": (flow(data_at=1), lambda t: t, lambda t: 1 - t, 1, -1, lambda r: r / (1 + r)),
    "noise scaled": (flow(1, 2.0), lambda t: t, lambda t: 2 * (1 - t), 1, -2, lambda r: 2 * r / (1 + 2 * r)),
    "trigonometric": (
        Interpolant(
            lambda t: (torch.sin(HALF * t), torch.cos(HALF * t)),
            lambda t: (HALF * torch.cos(HALF * t), -HALF * torch.sin(HALF * t)),
            lambda u: torch.atan(torch.exp(0.5 * u)) / HALF,
        ),
        lambda t: torch.sin(HALF * t), lambda t: torch.cos(HALF * t),
        lambda t: HALF * torch.cos(HALF * t), lambda t: -HALF * torch.sin(HALF * t), lambda r: torch.atan(r) / HALF,
    ),
}  # fmt: skip
MEAN = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)


def network_of(kind: str, prediction: str, asked: list[Tensor]) -> Any:
    """The exact network of data N(MEAN, 0.3) for x = a x0 + b eps, given t."""
    _, a, b, da, db, _ = PATHS[kind]

    def network(y: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        t = expand(t, y)
        x0 = MEAN + a(t) * 0.3 / (a(t) ** 2 * 0.3 + b(t) ** 2) * (y - a(t) * MEAN)
        eps = (y - a(t) * x0) / b(t)
        rate = [f(t) if callable(f) else f for f in (da, db)]
        return {"velocity": rate[0] * x0 + rate[1] * eps, "x0": x0, "epsilon": eps, "score": -eps / b(t)}[prediction]

    return network


@pytest.mark.parametrize("prediction", ["velocity", "x0", "epsilon", "score"])
@pytest.mark.parametrize("kind", PATHS)
def test_every_interpolant_is_the_same_denoiser(kind: str, prediction: str) -> None:
    """To 1e-6 in float64, from the start of a flow to nearly no noise; "epsilon" and "score" divide by alpha."""
    asked: list[Tensor] = []
    network = network_of(kind, prediction, asked)
    level = adapt("net", network, prediction=prediction, coordinates=PATHS[kind][0], time="t", flops=1.0)
    logsnr = torch.linspace(FLOW_START if prediction in ("velocity", "x0") else -16, 20, 57, dtype=torch.float64)
    x = torch.randn(len(logsnr), *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(level.denoise(x, logsnr), exact(x, logsnr), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(asked[0], PATHS[kind][5](torch.exp(0.5 * logsnr)), rtol=1e-9, atol=1e-12)


def test_clamped_x0_is_the_one_of_its_own_sampler() -> None:
    """JiT steps along (x0 - y) / max(1 - t, 0.05); the level's image gives this velocity, for noise of any scale."""
    asked: list[Tensor] = []
    network = network_of("noise scaled", "x0", asked)
    level = adapt("jit", network, prediction="x0", coordinates=flow(1, 2.0), time="t", clamp=0.05, flops=1.0)
    logsnr = torch.linspace(-9, 20, 40, dtype=torch.float64)
    x = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image, t = level.denoise(x, logsnr), expand(asked[0], x)
    y = x * (t**2 + 4 * (1 - t) ** 2).sqrt()
    velocity = (network(y, asked[0]) - y) / (1 - t).clamp_min(0.05)
    torch.testing.assert_close((image - y) / (1 - t), velocity, rtol=1e-6, atol=1e-6)
    assert (t > 0.95).any() and (t < 0.95).any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule(shift: float) -> None:
    schedule, t = FlowSchedule(shift), np.linspace(0.01, 0.99, 50)
    noise = shift * t / (1 + (shift - 1) * t)
    np.testing.assert_allclose(schedule.logsnr(t), 2 * np.log((1 - noise) / noise), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(schedule.time(schedule.logsnr(t)), t, rtol=1e-12)
    rate = (np.logaddexp(0, -schedule.logsnr(t + 1e-6)) - np.logaddexp(0, -schedule.logsnr(t - 1e-6))) / 2e-6
    np.testing.assert_allclose(schedule.beta(t), rate, rtol=1e-6)
    grid = Process(schedule, FLOW_START, 9, 65, "time").grid(17)
    np.testing.assert_allclose(np.diff(grid.time), np.diff(grid.time).mean(), rtol=1e-6)
    assert grid.logsnr[0] == pytest.approx(FLOW_START) and grid.time[0] > 1 - 1e-8


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"coordinates": "vp"}, "a velocity belongs to a flow"),
    ({"coordinates": "vp", "prediction": "x0", "time": "t"}, "time='t' belongs to a flow"),
    ({"coordinates": "vp", "prediction": "x0", "time": "sigma", "clamp": 0.1}, "clamp is for"),
    ({"conditioning": {"y": torch.ones(2)}}, "named in `conditions`"),
    ({"conditioning": {"y": torch.ones(1)}, "conditions": ["y"]}, "either the same for all samples"),
])  # fmt: skip
def test_bad_conventions_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        adapt("net", exact, **{"prediction": "velocity", "coordinates": "flow", "time": "t", "flops": 1.0} | settings)


def test_interpolants_whose_parts_do_not_fit_are_refused() -> None:
    line, other = (lambda t: (1 - t, t)), (lambda u: torch.sigmoid(0.5 * u))
    with pytest.raises(UserError, match="is not the t at which"):
        Interpolant(line, lambda t: (-1, 1), other)
    with pytest.raises(UserError, match="does its time run the other way"):
        Interpolant(line, lambda t: (1, -1), lambda u: torch.sigmoid(-0.5 * u))
    with pytest.raises(UserError, match="data_at is 0 or 1"):
        flow(2)


# ---------------------------------------------------------------------------------------- the classes of diffusers
def _small(name: str) -> Any:
    """A diffusers network with random weights for latents [4, 8, 8], and the conditions of three samples."""
    diffusers: Any = pytest.importorskip("diffusers")
    g = torch.Generator().manual_seed(1)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    text = torch.randn(3, 5, 12, generator=g)
    unet = {
        "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "in_channels": 4, "out_channels": 4,
    }  # fmt: skip
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
        "UNet2DModel": ("UNet2DModel", {
            **unet, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": 10,
        }, {"class_labels": torch.tensor([1, 9, 3])}),
        "UNet2DConditionModel": ("UNet2DConditionModel", {
            **unet, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 8,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12,
        }, {"encoder_hidden_states": text}),
        "DiT": ("DiTTransformer2DModel", {
            **heads, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10,
        }, {"class_labels": torch.tensor([1, 9, 3])}),
        "SD3": ("SD3Transformer2DModel", {
            **heads, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12,
            "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
        }, {"encoder_hidden_states": text, "pooled_projections": torch.randn(3, 10, generator=g)}),
        "Sana": ("SanaTransformer2DModel", {
            **heads, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8,
            "timestep_scale": 0.5,
        }, {"encoder_hidden_states": text, "encoder_attention_mask": (torch.rand(3, 5, generator=g) > 0.3).float()}),
        "Flux": ("FluxTransformer2DModel", {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
            "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
        }, {"encoder_hidden_states": text, "pooled_projections": torch.randn(3, 10, generator=g),
            "guidance": torch.tensor([3.5, 1.0, 2.0])}),
    }  # fmt: skip
    kind, config, conditions = kinds[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(diffusers, kind)(**config).eval()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return network, conditions


def _called(name: str, network: Any, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The network's output as its pipeline takes it, for a scheduler's timestep."""
    t = t.expand(len(x))
    if name == "Flux":
        packed = x.reshape(3, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 16)
        places = torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)])
        out = network(packed, timestep=t / 1000, img_ids=places, txt_ids=torch.zeros(5, 3), **conditions).sample
        return out.reshape(3, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 4, 8, 8)
    out = network(x, timestep=t * 0.5 if name == "Sana" else t, **conditions).sample
    return out[:, :4]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SECOND = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
CASES = [
    *((name, "FlowMatchEulerDiscrete", "ode/ddim", {"shift": 3.0}) for name in ("SD3", "Sana", "Flux", "UNet2DModel")),
    *((name, "DDIM", "ode/ddim", {"clip_sample": False}) for name in ("UNet2DModel", "UNet2DConditionModel", "DiT")),
    ("Sana", "DPMSolverMultistep", "ode/dpmpp_2m", {**FLOW, **SECOND}),
    ("SD3", "UniPCMultistep", "ode/unipc", {**FLOW, **SECOND, "solver_type": "bh2"}),
    ("DiT", "DPMSolverMultistep", "ode/dpmpp_2m", {**SECOND, "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("name", "kind", "rule", "settings"), CASES)
def test_samples_of_real_networks_equal_the_schedulers(name: str, kind: str, rule: str, settings: Any) -> None:
    """To 1e-5 of the largest value, for the same start and noise levels, with a condition for each sample. Euler's flow
    begins at t = 1; its grid is the process's own."""
    diffusers: Any = pytest.importorskip("diffusers")
    (network, conditions), count = _small(name), 10
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**settings)
    examples = {key: value[:1] for key, value in conditions.items()}
    level = from_diffusers(name, network, scheduler, conditions=examples, shape=(4, 8, 8))
    assert level.flops > 1e5 and level.conditions == tuple(conditions)
    scheduler.set_timesteps(count)
    path = BrownianPath(range(3), (4, 8, 8), conditions=conditions)
    if kind == "FlowMatchEulerDiscrete":
        grid = process_of(scheduler, base_steps=8 * (count - 1) + 1).grid(count)
    elif kind == "DDIM":
        grid = grid_of(torch.logit(scheduler.alphas_cumprod[scheduler.timesteps].double()).numpy())
    else:
        sigmas = scheduler.sigmas[:-1].double().numpy()
        grid = grid_of(2 * np.log((1 - sigmas) / sigmas) if "flow_shift" in settings else -2 * np.log(sigmas))
    x = path.initial()
    if "flow_shift" in settings:  # our start has variance 1 at finite noise
        x = x * math.hypot(sigmas[0], 1 - sigmas[0])
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):  # multistep schedulers cut a flow's to whole numbers
            when = 1000 * scheduler.sigmas[i] if "flow_shift" in settings else t
            x = scheduler.step(_called(name, network, x, when, conditions), t, x).prev_sample
    ours, ledger = sample(SingleLevel(level), step_rule(rule), grid, path)
    assert (ours - x).abs().max() < 1e-5 * x.abs().max() and ledger.evaluations == [3 * count]


def test_a_flow_that_begins_later_differs_in_its_first_step() -> None:
    """By less than 1% at t = 0.99 in 10 steps, and by less than 1e-5 at FLOW_START, from one that begins at t = 1."""
    level = adapt("net", network_of("data at 0", "velocity", []), prediction="velocity", coordinates="flow", time="t",
                  flops=1.0)  # fmt: skip
    x = eps = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    times = torch.linspace(1, 0.01, 10, dtype=torch.float64)
    network = network_of("data at 0", "velocity", [])
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        x = x + (after - t) * network(x.double(), t.expand(3))
    last = 2 * math.log(99)

    def difference(first: float) -> float:
        path = BrownianPath(range(3), SHAPE)
        path.initial = lambda: eps  # type: ignore[method-assign]
        process = Process(FlowSchedule(), first, last, 73, "time")
        return float((sample(SingleLevel(level), step_rule("ode/ddim"), process.grid(10), path)[0] - x).abs().max())

    assert difference(FLOW_START) < 1e-5 and 1e-5 < difference(-2 * math.log(99)) < 1e-2


@pytest.mark.parametrize(("name", "kind", "settings", "options", "sentence"), [
    ("SD3", "DDIM", {}, {}, "predicts a flow's velocity, and DDIMScheduler is of no flow"),
    ("SD3", "FlowMatchEulerDiscrete", {}, {}, "needs encoder_hidden_states: name it in conditions"),
    ("DiT", "DDIM", {}, {}, "needs class_labels"),
    ("Flux", "FlowMatchEulerDiscrete", {}, {"conditions": ["encoder_hidden_states", "pooled_projections"]},
     "needs guidance"),
    ("Sana", "FlowMatchEulerDiscrete", {"invert_sigmas": True}, {}, "is of no rectified flow"),
    ("Sana", "DPMSolverMultistep", {"prediction_type": "flow_prediction"}, {}, "is of no rectified flow"),
])  # fmt: skip
def test_what_does_not_fit_diffusers_is_one_sentence(
    name: str, kind: str, settings: Any, options: Any, sentence: str
) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=sentence):
        from_diffusers(name, _small(name)[0], getattr(diffusers, f"{kind}Scheduler")(**settings), **options)


def test_processes_of_schedulers() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    moving = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="shifts by the size of the image: give shift"):
        process_of(moving)
    assert process_of(moving, shift=2.0).schedule == FlowSchedule(2.0)
    assert process_of(diffusers.DDIMScheduler()).logsnr_min == pytest.approx(-10.1, abs=0.1)
    assert process_of(diffusers.UniPCMultistepScheduler(**FLOW)).schedule == FlowSchedule(3.0)
