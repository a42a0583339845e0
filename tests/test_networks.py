"""Networks: UNet and denoiser follow their configuration; the fast path is the same function in every mode."""

import os
import pwd
import shutil

import pytest
import torch
from torch import Tensor, nn

from mlem_diffusion.diffusion.process import add_noise
from mlem_diffusion.errors import SlowPath
from mlem_diffusion.models.compiled import Compiled, FastDenoiser, cover, set_compile_caches
from mlem_diffusion.models.family import build_denoiser
from mlem_diffusion.models.gaussian import fit_gaussian
from mlem_diffusion.models.unet import Attention, Denoiser, UNet

TARGETS = ("v", "epsilon", "x0")
LOGSNRS = torch.linspace(-9, 9, 7).tolist()
UNET = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}


class Fake(nn.Module):
    """A network that records its input and returns a given output."""

    def __init__(self, answer: Tensor | None = None):
        super().__init__()
        self.answer = answer
        self.seen = torch.empty(0)

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        self.seen = x
        return torch.zeros_like(x[:, :3]) if self.answer is None else self.answer


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


@pytest.mark.parametrize("target", TARGETS)
def test_a_network_preconditioned_by_the_gaussian_starts_from_it_and_can_be_perfect(target):
    """At first it is the Gaussian denoiser, for v the target has unit variance, and any image can be reached."""
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randn(4000, 3, 4, 4, generator=generator).cumsum(-1).cumsum(-2) / 8 + 0.2
    x0 = torch.cat([x0, x0.flip(-1)])  # the fit counts mirror images
    gauss, noise = fit_gaussian(x0[:4000].numpy(), 9), torch.randn(x0.shape, generator=generator)
    rms, unet = 0.5, UNET | {"precondition": "gaussian", "attention": []}
    fresh = build_denoiser(4, 4, rms, unet, target, gauss=gauss)
    for value in LOGSNRS:
        logsnr = torch.full((len(x0),), value)
        x = add_noise(x0, noise, logsnr)
        linear = gauss(x, logsnr)
        assert torch.equal(fresh(x[:3], logsnr[:3]), gauss(x[:3], logsnr[:3]))
        alpha, sigma = torch.sigmoid(logsnr[0]).sqrt(), torch.sigmoid(-logsnr[0]).sqrt()
        unit = {"v": gauss.mean_variance(logsnr[0]).sqrt(), "epsilon": -sigma / alpha, "x0": rms}[target]
        fake = Fake((x0 - linear) / unit)
        denoiser = Denoiser(fake, rms, target, gauss)
        assert torch.allclose(denoiser(x, logsnr), x0, atol=1e-5)
        assert float(denoiser.loss(x, x0, logsnr).max()) < 1e-6
        assert torch.equal(fake.seen[:, 3:], linear / rms)  # next to the scaled x
        assert torch.allclose(denoiser(x, logsnr, linear + 1), x0 + 1, atol=1e-5)  # what is given is used
        if target == "v":
            loss = Denoiser(Fake(), rms, target, gauss).loss(x, x0, logsnr)
            assert float(loss.mean()) == pytest.approx(1, abs=0.03), value


SHARED = torch.tensor(0.3)  # a noise level


def network(width: int = 8) -> nn.Module:
    """A denoiser whose zero-initialised layers are filled with random numbers, as after training."""
    denoiser = build_denoiser(width, 8, 0.5, UNET, "v").eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    return denoiser


def batch(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [None, 96])
def test_buckets_cover_every_batch_with_little_padding(batch_size):
    used = set()
    for count in range(1, 300):
        pieces = list(cover(count, batch_size))
        assert sum(n for n, _ in pieces) == count
        assert all(0 < n <= bucket for n, bucket in pieces)
        assert sum(bucket - n for n, bucket in pieces) <= max(7, 0.25 * count)
        used |= {bucket for _, bucket in pieces}
    assert used <= {8, 16, 32, 64, 128, 256, 512, batch_size}
    if batch_size is not None:
        assert list(cover(batch_size, batch_size)) == [(batch_size, batch_size)]


def test_a_fast_denoiser_is_the_denoiser_as_it_was_for_shared_and_for_single_noise_levels():
    denoiser, x = network(), batch()
    fast, mixed = FastDenoiser(denoiser), torch.linspace(-3, 3, len(x))
    with torch.no_grad():
        expected = denoiser(x, SHARED.expand(len(x))), denoiser(x, mixed)
    for parameter in denoiser.parameters():  # later training has no effect
        parameter.data.zero_()
    for logsnr, exact in zip((SHARED, mixed), expected, strict=True):
        torch.testing.assert_close(fast(x, logsnr), exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("logsnr", [-9.0, 0.0, 9.0])
def test_bf16_is_close_at_every_noise_level(logsnr):
    denoiser, x, noise_level = network(), batch(), torch.tensor(logsnr)
    exact, rounded = FastDenoiser(denoiser)(x, noise_level), FastDenoiser(denoiser, "bf16")(x, noise_level)
    assert rounded.dtype == torch.float32
    # the network's output has unit variance; its share in the image is `out`
    _, _, out = denoiser._parts(x, noise_level.expand(len(x)), None)
    assert 0 < float((rounded - exact).square().mean().sqrt()) < 0.01 * float(out.max())


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bf16", 0.05)])
def test_derivatives_pass_through_every_precision(precision, tolerance):
    x, v, h = batch(), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)), 1e-2
    fast, reference = FastDenoiser(network(), precision, compile="off"), FastDenoiser(network())
    forward = torch.func.jvp(lambda y: fast(y, SHARED), (x,), (v,))[1]
    differences = (reference(x + h * v, SHARED) - reference(x - h * v, SHARED)) / (2 * h)
    assert (forward - differences).norm() < tolerance * differences.norm()
    y = x.clone().requires_grad_(True)
    backward = torch.autograd.grad((fast(y, SHARED) * v).sum(), y)[0]
    assert abs(float((backward * v).sum() - (forward * v).sum())) < tolerance * float(forward.norm() * v.norm())


class Tiny(nn.Module):
    """The smallest network: it compiles in seconds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * torch.sigmoid(logsnr)[:, None, None, None]


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
@torch._dynamo.config.patch(assume_static_by_default=False)  # compiled once, for all sizes
def test_compiled_equals_eager_for_changing_batches():
    x, tiny = batch(12), Tiny()
    fast, eager = FastDenoiser(tiny, compile="on", name="w4"), FastDenoiser(tiny)
    for count in (12, 5):
        torch.testing.assert_close(fast(x[:count], SHARED), eager(x[:count], SHARED), rtol=0, atol=1e-5)
    assert isinstance(fast.run, Compiled) and fast.run.function is not fast.network


@pytest.fixture
def environ(monkeypatch, tmp_path):
    """The environment: empty, of a user without a home folder, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(os, "environ", {})
    return os.environ


@pytest.mark.parametrize("failing", [1, 2])  # of these calls; later ones compile for other shapes
def test_a_failed_compilation_runs_eagerly_with_one_warning(failing, monkeypatch, environ):
    environ["HOME"] = os.getcwd()

    def compiled(*inputs):
        calls.append(inputs)
        if len(calls) == failing:
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")
        return expected

    calls, x = [], batch()
    expected = FastDenoiser(network())(x, SHARED)
    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    fast = FastDenoiser(network(), compile="on", name="w8")
    with pytest.warns(SlowPath, match="w8 runs eagerly") as caught:
        assert all(torch.equal(fast(x, SHARED), expected) for _ in range(3))
    assert len(caught) == 1 and len(calls) == failing


def test_caches_that_can_be_written_are_used(environ, tmp_path, recwarn):
    environ |= {"HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "~/programs", "TRITON_CACHE_DIR": ""}
    set_compile_caches()
    used = environ["TORCHINDUCTOR_CACHE_DIR"], environ["TRITON_CACHE_DIR"]
    assert used == (str(tmp_path / "programs"), str(tmp_path / "programs/triton")) and not recwarn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compile", ["off", "on"])
def test_graphs_equal_the_network(compile):
    denoiser = network(width=32).cuda()
    fast = FastDenoiser(denoiser, "bf16", compile, "w32", batch=24)
    reference = FastDenoiser(denoiser, graphs=False, compile="off")
    x, noise_level = batch(24).cuda(), SHARED.cuda()
    for count in (24, 3, 17, 24):
        y = fast(x[:count], noise_level)
        copy = y.clone()
        fast(-x[:count], noise_level)
        assert torch.equal(y, copy)  # a result is not overwritten by the next call
        assert (y - reference(x[:count], noise_level)).abs().max() < 0.05
    assert fast.graphs
