"""The fast path of a network: the same function in every mode and for every batch, and its fallbacks."""

import os
import pwd
import shutil

import pytest
import torch
from torch import Tensor, nn

from mlem_diffusion.errors import SlowPath
from mlem_diffusion.models.compiled import Compiled, FastDenoiser, cover, set_compile_caches
from mlem_diffusion.models.family import build_denoiser

SHARED = torch.tensor(0.3)  # a noise level


def network(width: int = 8) -> nn.Module:
    """A denoiser whose zero-initialised layers are filled with random numbers, as after training."""
    denoiser = build_denoiser(width, 8, 0.5, {"multipliers": [1, 2], "blocks": 1, "attention": [4]}, "v").eval()
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


def test_float32_is_the_denoiser_for_shared_and_for_single_noise_levels():
    denoiser, x = network(), batch()
    fast, mixed = FastDenoiser(denoiser), torch.linspace(-3, 3, len(x))
    with torch.no_grad():
        torch.testing.assert_close(fast(x, SHARED), denoiser(x, SHARED.expand(len(x))), rtol=0, atol=3e-6)
        torch.testing.assert_close(fast(x, mixed), denoiser(x, mixed), rtol=0, atol=3e-6)


def test_the_copy_is_frozen_and_leaves_the_original_alone():
    denoiser, x = network(), batch()
    fast = FastDenoiser(denoiser, "bf16")
    y = fast(x, SHARED)
    for parameter in denoiser.parameters():
        parameter.data.zero_()
    assert torch.equal(fast(x, SHARED), y)  # later training of the original has no effect
    assert not any(p.requires_grad for p in fast.network.parameters())
    assert set(fast.network.state_dict()) == set(denoiser.state_dict())  # layers joined for inference are not saved
    unet = fast.network.unet
    assert unet.frequencies.dtype == torch.float32 and {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("logsnr", [-9.0, 0.0, 9.0])
def test_bf16_is_close_at_every_noise_level(logsnr):
    denoiser, x, noise_level = network(), batch(), torch.tensor(logsnr)
    exact, rounded = FastDenoiser(denoiser)(x, noise_level), FastDenoiser(denoiser, "bf16")(x, noise_level)
    assert rounded.dtype == torch.float32
    # the network's output has unit variance; its share in the image is `out`
    _, _, out = denoiser._coefficients(x, noise_level.expand(len(x)))
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


@pytest.mark.parametrize("blocked", ["HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", None])
def test_a_cache_that_cannot_be_written_is_replaced_with_one_warning(blocked, environ):
    environ |= {blocked: __file__} if blocked else {}
    with pytest.warns(SlowPath, match="cannot be written") as caught:
        set_compile_caches()
        set_compile_caches()
    assert len(caught) == 1 and os.listdir() == []  # no folder named ~
    assert all(os.access(environ[name], os.W_OK) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))


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
