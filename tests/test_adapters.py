"""Adapted networks against the denoiser that they wrap, in every convention; diffusers UNets against schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process, expand
from mlem_diffusion.diffusion.sampler import sample
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.adapters import adapt, clipped, from_diffusers, guided, trained_range
from mlem_diffusion.models.flops import flops_per_evaluation
from mlem_diffusion.models.unet import Denoiser, UNet
from mlem_diffusion.multilevel.estimators import Multilevel

SHAPE = (3, 4, 4)
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
TABLE = torch.logit(ALPHAS_CUMPROD)  # log-SNR of every timestep, falling
PREDICTIONS = ["epsilon", "v", "x0", "score"]


def exact(x: Tensor, logsnr: Tensor, variance: float = 0.3) -> Tensor:
    """E[x0 | x] of data with a mean that differs from pixel to pixel and a variance, in VP coordinates."""
    logsnr = expand(logsnr, x)
    alpha, sigma2 = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr)
    mean = torch.linspace(-1, 1, math.prod(SHAPE), dtype=x.dtype).reshape(SHAPE)
    return mean + alpha * variance / (alpha**2 * variance + sigma2) * (x - alpha * mean)


def logsnr_from(given: Tensor, coordinates: str, time: Any) -> Tensor:
    """The log-SNR that the toy network infers from its time argument."""
    if time == "logsnr":
        return given
    if time == "sigma":
        return -2 * given.log() if coordinates == "ve" else -torch.logit(given**2)
    if time == "timestep":  # linear in between
        before = given.detach().floor().clamp(0, 998)
        first, second = TABLE[before.long()], TABLE[before.long() + 1]
        return first + (given - before) * (second - first)
    return -8 * given  # EDM's ln(sigma) / 4


def network_of(
    prediction: str, coordinates: str, time: Any, denoise: Callable[[Tensor, Tensor], Tensor] = exact
) -> Any:
    """The denoiser in a foreign training convention; it computes in float64."""

    def network(inputs: Tensor, given: Tensor) -> Tensor:
        logsnr = logsnr_from(given, coordinates, time).double()
        alpha, sigma = (expand(v, inputs) for v in (logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()))
        x = inputs.double() * (alpha if coordinates == "ve" else 1)
        x0 = denoise(x, logsnr)
        eps = (x - alpha * x0) / sigma
        scale = sigma if coordinates == "vp" else sigma / alpha
        return {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0, "score": -eps / scale}[prediction].to(inputs)

    return network


def edm_time(logsnr: Tensor) -> Tensor:
    return -logsnr / 8


def adapted(prediction: str, coordinates: str = "vp", time: Any = "logsnr", **settings: Any) -> Level:
    if time == "timestep":
        settings.setdefault("alphas_cumprod", ALPHAS_CUMPROD)
    network = network_of(prediction, coordinates, time)
    return adapt("toy", network, prediction=prediction, coordinates=coordinates, time=time, flops=1.0, **settings)


def points(lowest: float, highest: float, dtype: torch.dtype, count: int = 41) -> tuple[Tensor, Tensor]:
    logsnr = torch.linspace(lowest, highest, count, dtype=dtype)
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype), logsnr


@pytest.mark.parametrize("time", ["logsnr", "sigma", "timestep", edm_time])
@pytest.mark.parametrize("coordinates", ["vp", "ve"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_convention_is_the_same_denoiser(prediction: str, coordinates: str, time: Any) -> None:
    """To 1e-8 in float64, and to 1e-5 in float32 (times 1/alpha where the network predicts noise)."""
    level = adapted(prediction, coordinates, time)
    x, logsnr = points(-9, 9, torch.float64)
    torch.testing.assert_close(level.denoise(x, logsnr), exact(x, logsnr), rtol=1e-8, atol=1e-8)
    x, logsnr = points(-9, 9, torch.float32)
    loss = 1 if prediction in ("x0", "v") else 1 / logsnr.sigmoid().sqrt()
    error = (level.denoise(x, logsnr) - exact(x.double(), logsnr.double())).abs().flatten(1).amax(1)
    assert torch.all(error < 1e-5 * loss)


@pytest.mark.parametrize("coordinates", ["vp", "ve"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_at_extreme_noise_levels(prediction: str, coordinates: str) -> None:
    """Log-SNR from -20 to 20: finite, and as exact as its prediction type can be (float32 noise over alpha)."""
    level = adapted(prediction, coordinates)
    x, logsnr = points(-20, 20, torch.float32)
    denoised = level.denoise(x, logsnr)
    assert denoised.dtype == torch.float32 and denoised.isfinite().all()
    loss = 1 if prediction in ("x0", "v") else torch.exp(0.5 * torch.nn.functional.softplus(-logsnr))
    error = (denoised - exact(x.double(), logsnr.double())).abs().flatten(1).amax(1)
    assert torch.all(error < 1e-5 * loss)


def test_gradient_and_jvp_go_through() -> None:
    level = adapted("epsilon", "ve", "timestep")
    x, logsnr = points(-6, 6, torch.float64, 5)
    expected = exact(torch.ones_like(x), logsnr) - exact(torch.zeros_like(x), logsnr)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(level.denoise(x, logsnr).sum(), x)
    torch.testing.assert_close(gradient, expected)
    tangent = torch.func.jvp(lambda x: level.denoise(x, logsnr), (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, expected)


def test_rounded_timesteps_are_the_nearest_trained_denoiser() -> None:
    """The network gets integers only; the level is its denoiser at that noise level, for every prediction type."""
    x, logsnr = points(-9, 9, torch.float64)
    nearest = np.round(np.interp(logsnr.numpy(), TABLE.numpy()[::-1], np.arange(1000)[::-1])).astype(int)
    expected = exact(x, TABLE[torch.as_tensor(nearest)])
    assert (expected - exact(x, logsnr)).abs().max() > 1e-3
    for prediction in PREDICTIONS:
        seen: list[Tensor] = []
        network = network_of(prediction, "vp", "timestep")

        def recorded(inputs: Tensor, given: Tensor, network: Any = network, seen: list[Tensor] = seen) -> Tensor:
            seen.append(given)
            return network(inputs, given.double())

        level = adapt(
            "toy",
            recorded,
            prediction=prediction,
            time="timestep",
            alphas_cumprod=ALPHAS_CUMPROD,
            round_timesteps=True,
            flops=1,
        )
        torch.testing.assert_close(level.denoise(x, logsnr), expected, rtol=1e-8, atol=1e-8)
        assert seen[0].dtype == torch.long and seen[0].tolist() == nearest.tolist()


def test_trained_range() -> None:
    lowest, highest = trained_range(ALPHAS_CUMPROD)
    assert (lowest, highest) == pytest.approx((float(TABLE[-1]), float(TABLE[0])))
    level = adapted("v", time="timestep")
    x = torch.zeros(1, *SHAPE)
    for inside in (lowest, highest, lowest - 5e-4, highest + 5e-4):
        assert level.denoise(x, torch.tensor([inside])).isfinite().all()
    for outside in (lowest - 0.01, highest + 0.01, float("nan")):
        with pytest.raises(UserError, match=r"toy: a log-SNR of .* is outside -10\.12 \.\. 9\.21"):
            level.denoise(x, torch.tensor([outside]))
    narrow = adapted("x0", "ve", "sigma", logsnr_range=(-2, 2))
    assert narrow.denoise(x, torch.tensor([2.0])).isfinite().all()
    with pytest.raises(UserError, match=r"outside -2 \.\. 2"):
        narrow.denoise(x, torch.tensor([2.1]))
    # zero terminal SNR: the last timestep is pure noise and has no log-SNR
    zero = torch.cat([ALPHAS_CUMPROD[:-1], torch.zeros(1)])
    assert trained_range(zero)[0] == pytest.approx(float(TABLE[-2]))


class Conditioned(nn.Module):
    """A convolution shifted by its conditioning [B,C]; it records its batch sizes."""

    def __init__(self, channels: int = 3, outputs: int = 3):
        super().__init__()
        self.convolution, self.seen = nn.Conv2d(channels, outputs, 3, padding=1), []

    def forward(self, x: Tensor, time: Tensor, shift: Tensor, extra: dict[str, Any] | None = None) -> Tensor:
        if x.device.type != "meta":
            self.seen.append((len(x), len(shift)))
        more = extra["pair"][0] if extra else torch.zeros_like(shift)
        return self.convolution(x) + (shift + more)[:, :, None, None] + 0.01 * time[:, None, None, None].to(x)


def test_conditioning_is_expanded_to_the_batch() -> None:
    torch.manual_seed(0)
    network, shift = Conditioned(), torch.randn(1, 3)
    extra = {"pair": (torch.ones(1, 3), "as it is"), "scalar": torch.tensor(2.0)}
    level = adapt("net", network, prediction="x0", conditioning={"shift": shift, "extra": extra}, shape=SHAPE)
    x, logsnr = points(-3, 3, torch.float32, 4)
    expected = network.convolution(x) + shift[:, :, None, None] + 1 + 0.01 * expand(logsnr, x)
    torch.testing.assert_close(level.denoise(x, logsnr), expected)
    torch.testing.assert_close(level.denoise(x[1:3], logsnr[1:3]), expected[1:3])
    assert network.seen == [(4, 4), (2, 2)]


@pytest.mark.parametrize("inside", ["shift", "extra"])
def test_conditioning_that_differs_between_samples_is_refused(inside: str) -> None:
    rows = torch.zeros(2, 3)
    conditioning = {"shift": rows} if inside == "shift" else {"shift": rows[:1], "extra": {"pair": [rows]}}
    with pytest.raises(UserError, match=f"'{inside}' has 2 rows, but it must have one"):
        adapt("net", Conditioned(), prediction="x0", conditioning=conditioning, shape=SHAPE)


def test_flops_are_counted_and_the_network_left_alone() -> None:
    network = Conditioned().train()
    level = adapt("net", network, prediction="v", conditioning={"shift": torch.zeros(1, 3)}, shape=SHAPE)
    assert level.flops == 2 * 3 * 3 * 9 * 16
    assert network.training and all(p.device.type == "cpu" for p in network.parameters())
    unet = Denoiser(UNet(4, 16))
    assert adapt("own", unet, prediction="x0", shape=(3, 16, 16)).flops == flops_per_evaluation(unet, 16)


def test_half_precision_network_and_learned_variance() -> None:
    """Input in the type of the parameters, output in that of x; twice the channels: the first half counts."""
    torch.manual_seed(0)
    network = nn.Module()
    convolution = nn.Conv2d(3, 6, 3, padding=1).bfloat16()
    network.add_module("convolution", convolution)
    network.forward = lambda x, time: (convolution(x),)
    level = adapt("half", network, prediction="x0", shape=SHAPE)
    x, logsnr = points(-3, 3, torch.float32, 2)
    assert level.denoise(x, logsnr).dtype == torch.float32
    torch.testing.assert_close(level.denoise(x, logsnr), convolution(x.bfloat16())[:, :3].float())


def test_guidance() -> None:
    """Scale 1 is the conditional level, 0 the other, 3 beyond the first; FLOPs of both; clipping after it."""
    torch.manual_seed(0)
    network = Conditioned()
    conditional, unconditional = (
        adapt(name, network, prediction="v", conditioning={"shift": torch.full((1, 3), value)}, shape=SHAPE)
        for name, value in (("face", 1.0), ("nothing", 0.0))
    )
    x, logsnr = points(-3, 3, torch.float32, 4)
    with_it, without = conditional.denoise(x, logsnr), unconditional.denoise(x, logsnr)
    for scale, expected in ((1, with_it), (0, without), (3, 3 * with_it - 2 * without)):
        level = guided(conditional, unconditional, scale)
        torch.testing.assert_close(level.denoise(x, logsnr), expected)
        assert level.flops == 2 * conditional.flops and level.name == "face"
    strong = guided(conditional, unconditional, 3, name="strong")
    assert strong.name == "strong" and strong.denoise(x, logsnr).abs().max() > 1.5
    short = clipped(strong, 1.5)
    torch.testing.assert_close(short.denoise(x, logsnr), strong.denoise(x, logsnr).clamp(-1.5, 1.5))
    assert (short.name, short.flops) == ("strong", strong.flops)


def test_sampling_with_adapted_levels() -> None:
    """Three conventions as one family, with per-sample coins: the images and ledger of the same levels by hand."""

    def rough(error: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, logsnr: exact(x, logsnr) + error * torch.sin(3 * x)

    conventions = [("v", "vp", "logsnr"), ("epsilon", "vp", "timestep"), ("x0", "ve", "sigma")]
    by_hand, family = [], []
    for k, (prediction, coordinates, time) in enumerate(conventions):
        denoise, flops = rough(0.05 * 2.0**-k), 4.0**k
        by_hand.append(Level(f"net{k}", denoise, flops))
        network = network_of(prediction, coordinates, time, denoise)

        def called(inputs: Tensor, given: Tensor, tag: Tensor, network: Any = network) -> Tensor:
            assert tag.shape == (len(inputs), 2)  # the conditioning that a gathered sub-batch must get
            return network(inputs, given)

        family.append(
            adapt(
                f"net{k}",
                called,
                prediction=prediction,
                coordinates=coordinates,
                time=time,
                alphas_cumprod=ALPHAS_CUMPROD if time == "timestep" else None,
                conditioning={"tag": torch.zeros(1, 2)},
                flops=flops,
            )
        )
    p = np.array([1, 0.5, 0.25])
    grid = Process(LinearSchedule(), -8, 8, 100).grid(25)
    images, ledger = sample(Multilevel(tuple(family), p), grid, "sde", "ddpm", range(6), SHAPE)
    expected, counts = sample(Multilevel(tuple(by_hand), p), grid, "sde", "ddpm", range(6), SHAPE)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert ledger.evaluations == counts.evaluations and 0 < ledger.evaluations[2] < 6 * 25
    few, _ = sample(Multilevel(tuple(family), p), grid, "sde", "ddpm", range(2, 4), SHAPE)
    torch.testing.assert_close(few, images[2:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prediction": "noise"}, "prediction = 'noise' is unknown; expected one of epsilon, v, x0, score"),
        ({"prediction": "v", "coordinates": "edm"}, "coordinates = 'edm' is unknown"),
        ({"prediction": "v", "time": "t"}, "time = 't' is unknown; expected one of logsnr, sigma, timestep"),
        ({"prediction": "v", "time": "timestep"}, "needs the alphas_cumprod"),
        ({"prediction": "v", "alphas_cumprod": [0.9, 0.1]}, "belong to time='timestep'"),
        ({"prediction": "v", "time": "timestep", "alphas_cumprod": [0.1, 0.9]}, "must fall from timestep to timestep"),
        ({"prediction": "v", "time": "timestep", "alphas_cumprod": object()}, "object has no alphas_cumprod"),
        ({"prediction": "v", "flops": None}, "give flops, or shape"),
    ],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        adapt("net", exact, **{"flops": 1.0, **settings})


def test_bad_networks() -> None:
    x, logsnr = points(0, 1, torch.float32, 2)
    with pytest.raises(
        UserError, match=r"net: the network returned shape \[2, 1, 4, 4\] for an input of \[2, 3, 4, 4\]"
    ):
        adapt("net", lambda x, t: x[:, :1], prediction="v", flops=1).denoise(x, logsnr)
    with pytest.raises(UserError, match="returned neither a tensor"):
        adapt("net", lambda x, t: {"out": x}, prediction="v", flops=1).denoise(x, logsnr)
    with pytest.raises(UserError, match=r"net: FLOPs could not be counted \(.*shift.*\); give flops"):
        adapt("net", Conditioned(), prediction="v", shape=SHAPE)
    with pytest.raises(UserError, match="guidance scale nan"):
        guided(Level("a", exact, 1), Level("b", exact, 1), float("nan"))
    with pytest.raises(UserError, match="cannot be clipped"):
        clipped(Level("a", exact, 1), 0)


def tiny_unet(**settings: Any) -> Any:
    """A randomly initialised UNet2DModel on 8x8 images."""
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    size = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    return diffusers.UNet2DModel(**blocks, **size, **settings).eval()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("embedding", ["positional", "learned"])
@pytest.mark.parametrize("outputs", [3, 6])
def test_diffusers_unet_agrees_with_its_scheduler(prediction: str, embedding: str, outputs: int) -> None:
    """At integer timesteps, with learned variances too: pred_original_sample of DDPM to 1e-4 of its largest value."""
    learned = {"num_train_timesteps": 1000} if embedding == "learned" else {}
    unet = tiny_unet(time_embedding_type=embedding, out_channels=outputs, **learned)
    diffusers: Any = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction, clip_sample=False, variance_type="learned_range" if outputs == 6 else "fixed_small"
    )
    level = from_diffusers("tiny", unet, scheduler)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (0, 1, 37, 500, 999):
        with torch.no_grad():
            theirs = scheduler.step(unet(x, t).sample, t, x).pred_original_sample
            ours = level.denoise(x, torch.logit(scheduler.alphas_cumprod[t].double()).float().expand(2))
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(level.denoise(x, torch.zeros(2)).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_diffusers_conditional_unet_with_guidance() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    text, empty = torch.randn(1, 5, 12), torch.zeros(1, 5, 12)
    levels = [from_diffusers("text", unet, scheduler, conditioning={"encoder_hidden_states": s}) for s in (text, empty)]
    level = guided(*levels, scale=7.5)
    assert level.flops == 2 * levels[0].flops > 0
    x, t = torch.randn(2, 4, 8, 8), 600
    alpha2 = scheduler.alphas_cumprod[t].double()
    with torch.no_grad():
        eps = [unet(x, t, encoder_hidden_states=s.expand(2, 5, 12)).sample for s in (text, empty)]
        assert (eps[0] - eps[1]).abs().max() > 1e-3
        expected = (x - (1 - alpha2).sqrt() * (eps[1] + 7.5 * (eps[0] - eps[1]))) / alpha2.sqrt()
        ours = level.denoise(x, torch.logit(alpha2).float().expand(2))
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()

    process = Process(LinearSchedule(), *trained_range(scheduler), base_steps=50)
    small = Level("zero", lambda x, logsnr: torch.zeros_like(x), 1.0)
    estimator = Multilevel((small, level), np.array([1, 0.5]))
    images, ledger = sample(estimator, process.grid(6), "ode", "ddim", range(3), (4, 8, 8))
    assert images.isfinite().all() and 0 < ledger.evaluations[1] < 18
    with pytest.raises(UserError, match=r"outside -5\.\d+ \.\. 7\.\d+"):
        sample(estimator, Process(LinearSchedule(), base_steps=50).grid(6), "ode", "ddim", range(3), (4, 8, 8))


def test_diffusers_that_do_not_fit() -> None:
    unet = tiny_unet()
    diffusers: Any = pytest.importorskip("diffusers")
    with pytest.raises(UserError, match="tiny: the scheduler's prediction type None is unknown"):
        from_diffusers("tiny", unet, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="EDMEulerScheduler has no alphas_cumprod"):
        from_diffusers("tiny", unet, diffusers.EDMEulerScheduler())
    with pytest.raises(UserError, match="takes sigma, not timesteps"):
        from_diffusers("tiny", tiny_unet(time_embedding_type="fourier"), diffusers.DDPMScheduler())
