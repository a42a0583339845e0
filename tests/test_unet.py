"""UNet: shapes, cost and attention follow the configuration; the denoiser's inputs and targets have unit variance."""

import pytest
import torch
from torch import Tensor, nn

from mlem_diffusion.diffusion.process import add_noise
from mlem_diffusion.models.unet import Attention, Denoiser, UNet

TARGETS = ("v", "epsilon", "x0")
LOGSNRS = torch.linspace(-9, 9, 7).tolist()


class Fake(nn.Module):
    """A network that records its input and returns a given output."""

    def __init__(self, answer: Tensor | None = None):
        super().__init__()
        self.answer = answer
        self.seen = torch.empty(0)

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        self.seen = x
        return torch.zeros_like(x) if self.answer is None else self.answer


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random parameters, so that none is zero from its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    return net


@pytest.mark.parametrize(
    ("attention", "expected"),
    # blocks on the way down, blocks + 1 on the way up, and the middle (at 4x4) once any attention lies above it
    [((), []), ((8,), [4, 8, 8, 8]), ((16, 8), [4, 8, 8, 8, 16, 16, 16]), ((4,), [4, 4, 4, 4])],
)
def test_attention_runs_at_the_resolutions_configured_and_shapes_stay(attention, expected):
    net = UNet(4, 16, (1, 2, 2), 1, attention)
    seen: list[int] = []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape[-1]))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = net(x, torch.tensor([-9.0, 9.0]))
    assert sorted(seen) == expected and y.shape == x.shape and torch.count_nonzero(y) == 0  # at initialisation


def test_the_output_depends_on_the_noise_level_and_on_far_pixels():
    net = randomised(UNet(4, 16, (1, 2, 2), 1, (8,)))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    y = net(x, torch.tensor([0.0]))
    for other in (-9.0, -0.5, 0.5, 9.0):
        assert (net(x, torch.tensor([other])) - y).abs().max() > 1e-3 * y.abs().max()
    moved = x.clone()
    moved[..., 0, 0] += 5
    assert (net(moved, torch.tensor([0.0])) - y)[..., -1, -1].abs().max() > 0


def test_samples_are_independent_and_a_shared_noise_level_is_one_number():
    denoiser = Denoiser(randomised(UNet(4, 8, (1, 2), 1, (4,), patch=2)), 0.4)
    x, x0 = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    mixed = torch.linspace(-4, 4, 5)
    alone = torch.cat([denoiser(x[i : i + 1], mixed[i]) for i in range(5)])
    assert torch.allclose(denoiser(x, mixed), alone, atol=1e-5)
    assert torch.allclose(denoiser(x, torch.tensor(0.7)), denoiser(x, torch.full((5,), 0.7)), atol=1e-6)
    assert torch.allclose(denoiser.loss(x, x0, torch.tensor(0.7)), denoiser.loss(x, x0, torch.full((5,), 0.7)))


@pytest.mark.parametrize("rms", [0.3, 1.0])
@pytest.mark.parametrize("target", TARGETS)
def test_input_and_target_have_unit_variance_at_every_noise_level(target, rms):
    generator = torch.Generator().manual_seed(4)
    # not Gaussian and not centred: only the root mean square counts
    x0 = torch.rand(200, 3, 16, 16, generator=generator) + 0.3
    x0 *= rms / x0.square().mean().sqrt()
    net = Fake()
    denoiser = Denoiser(net, rms, target)
    for value in LOGSNRS:
        logsnr = torch.full((len(x0),), value)
        noise = torch.randn(x0.shape, generator=generator)
        x = add_noise(x0, noise, logsnr)
        # The network returns zero, so the loss is the target's mean square. 4 standard errors of 150,000 values: 1.5%.
        assert float(denoiser.loss(x, x0, logsnr).mean()) == pytest.approx(1, abs=0.02), value
        assert float(net.seen.square().mean()) == pytest.approx(1, abs=0.02), value


@pytest.mark.parametrize("value", LOGSNRS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_network_denoises_perfectly(target, value):
    generator, rms = torch.Generator().manual_seed(6), 0.4
    x0 = rms * torch.randn(4, 3, 8, 8, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    logsnr = torch.full((4,), value)
    x = add_noise(x0, noise, logsnr)
    alpha, sigma = torch.sigmoid(logsnr[0]).sqrt(), torch.sigmoid(-logsnr[0]).sqrt()
    s = sigma / alpha  # EDM's sigma, for x / alpha (Karras et al. 2022, table 1)
    answer = {
        "epsilon": noise,
        "x0": x0 / rms,
        "v": (x0 - rms**2 / (s**2 + rms**2) * x / alpha) / (s * rms / (s**2 + rms**2).sqrt()),
    }[target]
    denoiser = Denoiser(Fake(answer), rms, target)
    assert torch.allclose(denoiser(x, logsnr), x0, atol=2e-4)  # epsilon is divided by alpha = 0.011 at the noisy end
    assert float(denoiser.loss(x, x0, logsnr).max()) < 1e-8
