"""Adapted networks against the denoiser that they wrap, in every convention; diffusers UNets against schedulers."""

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import expand
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.adapters import adapt
from mlem_diffusion.models.diffusers import from_diffusers, trained_range
from mlem_diffusion.models.guidance import guided

SHAPE = (3, 4, 4)
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
ALPHAS = {"alphas_cumprod": ALPHAS_CUMPROD}
TABLE = torch.logit(ALPHAS_CUMPROD)  # log-SNR of every timestep, falling


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


def network_of(prediction: str, coordinates: str, time: Any) -> Any:
    """The denoiser in a foreign training convention; it computes in float64."""

    def network(inputs: Tensor, given: Tensor) -> Tensor:
        logsnr = logsnr_from(given, coordinates, time).double()
        alpha, sigma = (expand(v, inputs) for v in (logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()))
        x = inputs.double() * (alpha if coordinates == "ve" else 1)
        x0 = exact(x, logsnr)
        eps = (x - alpha * x0) / sigma
        scale = sigma if coordinates == "vp" else sigma / alpha
        return {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0, "score": -eps / scale}[prediction].to(inputs)

    return network


def adapted(prediction: str, coordinates: str = "vp", time: Any = "logsnr", **settings: Any) -> Level:
    if time == "timestep":
        settings.setdefault("alphas_cumprod", ALPHAS_CUMPROD)
    network = network_of(prediction, coordinates, time)
    return adapt("toy", network, prediction=prediction, coordinates=coordinates, time=time, flops=1.0, **settings)


def points(lowest: float, highest: float, dtype: torch.dtype, count: int = 41) -> tuple[Tensor, Tensor]:
    logsnr = torch.linspace(lowest, highest, count, dtype=dtype)
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype), logsnr


@pytest.mark.parametrize("time", ["logsnr", "sigma", "timestep", lambda logsnr: -logsnr / 8])
@pytest.mark.parametrize("coordinates", ["vp", "ve"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "score"])
def test_every_convention_is_the_same_denoiser(prediction: str, coordinates: str, time: Any) -> None:
    """To 1e-8 in float64, and to 1e-5 in float32 (times 1/alpha where the network predicts noise)."""
    level = adapted(prediction, coordinates, time)
    x, logsnr = points(-9, 9, torch.float64)
    torch.testing.assert_close(level.denoise(x, logsnr), exact(x, logsnr), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(level.denoise(x, logsnr[7]), exact(x, logsnr[7]), rtol=1e-8, atol=1e-8)
    reach = 20 if time == "logsnr" else 9
    x, logsnr = points(-reach, reach, torch.float32)
    loss = 1 if prediction in ("x0", "v") else torch.exp(0.5 * torch.nn.functional.softplus(-logsnr))
    denoised = level.denoise(x, logsnr)
    assert denoised.dtype == torch.float32
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


def test_trained_range() -> None:
    lowest, highest = trained_range(ALPHAS_CUMPROD)
    assert (lowest, highest) == pytest.approx((float(TABLE[-1]), float(TABLE[0])))
    level, x = adapted("v", time="timestep"), torch.zeros(1, *SHAPE)
    for inside in (lowest - 5e-4, highest + 5e-4):
        assert level.denoise(x, torch.tensor(inside)).isfinite().all()
    for outside in (lowest - 0.01, highest + 0.01, float("nan")):
        with pytest.raises(UserError, match="is outside"):
            level.denoise(x, torch.tensor([outside]))
    for last in (0.0, 2.0**-24):  # the last timestep is pure noise and has no log-SNR; diffusers clamps it
        ending = torch.cat([ALPHAS_CUMPROD[:-1], torch.tensor([last])])
        assert trained_range(ending)[0] == pytest.approx(float(TABLE[-2]))
        assert ending[-1] == last  # the caller's table is as before


class Conditioned(nn.Module):
    """A convolution shifted by its conditioning [B,C]; learned variances, which are not used, and a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, shift: Tensor, extra: dict[str, Any]) -> tuple[Tensor]:
        assert len(shift) == len(extra["pair"][0]) == len(time) == len(x) and extra["pair"][1] == "as it is"
        out = self.convolution(x) + 0.01 * time[:, None, None, None].to(x)
        return (out + (shift + extra["pair"][0]).repeat(1, 2)[:, :, None, None],)


def test_conditioning_and_guidance() -> None:
    torch.manual_seed(0)
    network, x, logsnr = Conditioned().train(), *points(-3, 3, torch.float32, 4)
    extra = {"pair": (torch.ones(1, 3), "as it is")}

    def level(shift: Tensor) -> Level:
        return adapt("net", network, prediction="x0", conditioning={"shift": shift, "extra": extra}, shape=SHAPE)

    one, other = level(torch.full((1, 3), 0.5)), level(torch.zeros(1, 3))
    assert one.flops == 2 * 3 * 6 * 9 * 16 and network.training
    expected = network.convolution(x)[:, :3] + 1.5 + 0.01 * expand(logsnr, x)
    torch.testing.assert_close(one.denoise(x, logsnr), expected)
    torch.testing.assert_close(one.denoise(x[1:3], logsnr[1:3]), expected[1:3])
    for scale in (0, 1, 3):
        both = guided(one, other, scale)
        torch.testing.assert_close(both.denoise(x, logsnr), expected + 0.5 * (scale - 1))
        assert both.flops == 2 * one.flops and both.name == "net"
    network.bfloat16()
    half = level(torch.zeros(1, 3)).denoise(x, logsnr)
    assert half.dtype == torch.float32 and 0 < (half - (expected - 0.5)).abs().max() < 0.05


class LabelDropout(nn.Module):
    dropout_prob = 0.1


class Habits(nn.Module):
    """It takes times [B,1], keeps a tensor of its first call, writes into its input, and cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept, self.lock = nn.Linear(1, 3), None, threading.Lock()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.kept = torch.ones((), device=x.device) if self.kept is None else self.kept
        return x.mul_(self.kept).add_(self.layer(time)[:, :, None, None])


COLUMN: dict[str, Any] = {"prediction": "x0", "time": lambda logsnr: logsnr.float()[:, None]}


def test_a_network_with_habits_becomes_a_level() -> None:
    x, network = points(-3, 3, torch.float64, 4)[0], Habits()
    before, level = x.clone(), adapt("net", network, shape=SHAPE, **COLUMN)
    shift = network.layer(torch.tensor([0.5])).double()[:, None, None]
    torch.testing.assert_close(level.denoise(x, 0.5), before + shift, rtol=0, atol=1e-6)  # type: ignore[arg-type]
    assert torch.equal(x, before) and level.flops == 6


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"time": "timestep", "alphas_cumprod": [0.1, 0.9]}, "must fall"),
    ({"time": "timestep", "alphas_cumprod": ALPHAS_CUMPROD.half()}, "in float32 at least"),
    ({"network": lambda x, t: x[:, :1]}, "returned shape"),
    ({"network": lambda x, t: ()}, "returned a NoneType"),
    ({"network": nn.Sequential(nn.Dropout(0.1))}, "is in training mode: call the network's .eval"),
    ({"network": nn.Sequential(nn.BatchNorm2d(3))}, "is in training mode"),
    ({"network": nn.Sequential(LabelDropout())}, "is in training mode"),
    ({"network": Habits().to("meta"), **COLUMN}, "the network is on meta, the images are on cpu"),
    ({"network": Habits(), "flops": None, "shape": SHAPE}, "FLOPs could not be counted"),
])  # fmt: skip
def test_bad_settings_and_networks_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings = {"name": "net", "network": exact, "prediction": "v", "flops": 1.0, **settings}
        adapt(**settings).denoise(*points(0, 1, torch.float32, 2))


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])  # of these the clamped end rises, and falls
@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_schedulers_that_clamp_zero_terminal_snr_have_the_range_of_those_that_do_not(name: str, betas: str) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    kinds = (getattr(diffusers, f"{kind}Scheduler") for kind in (name, "DDPM"))
    clamped, exact = (trained_range(kind(rescale_betas_zero_snr=True, beta_schedule=betas)) for kind in kinds)
    assert clamped == exact


@pytest.mark.parametrize(("config", "scheduler", "sentence"), [
    ({"prediction_type": "other"}, {}, "prediction type other of SimpleNamespace is not supported"),
    ({"prediction_type": "epsilon"}, {}, "time='sigma'"),  # EDM's have no alphas_cumprod
    ({"prediction_type": "sample", "sample_size": None}, ALPHAS, "give flops, or shape"),
    ({"prediction_type": "sample", "num_class_embeds": 9}, ALPHAS, "'class_labels'"),
])  # fmt: skip
def test_what_from_diffusers_lacks_is_one_sentence(config: Any, scheduler: Any, sentence: str) -> None:
    both = SimpleNamespace(config=SimpleNamespace(**config), **scheduler)  # a UNet and a scheduler
    with pytest.raises(UserError, match=sentence):
        from_diffusers("tiny", both, both)  # type: ignore[arg-type]


@pytest.mark.parametrize(("prediction", "outputs"), [("epsilon", 6), ("v_prediction", 3), ("sample", 3)])
def test_diffusers_unet_agrees_with_its_scheduler(prediction: str, outputs: int) -> None:
    """At integer timesteps, with learned variances too: pred_original_sample of DDPM to 1e-4 of its largest value."""
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, out_channels=outputs,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    variance = "learned_range" if outputs == 6 else "fixed_small"
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False, variance_type=variance)
    level = from_diffusers("tiny", unet, scheduler)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (0, 37, 999):
        with torch.no_grad():
            theirs = scheduler.step(unet(x, t).sample, t, x).pred_original_sample
            ours = level.denoise(x, torch.logit(scheduler.alphas_cumprod[t].double()).float())
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
