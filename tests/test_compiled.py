"""The fast path of a network: the same function in every mode and for every batch, and its fallbacks."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from mlem_diffusion.errors import SlowPath, UserError
from mlem_diffusion.models import torch_compile as compilation
from mlem_diffusion.models.compiled import FastDenoiser, cover, inference_copy
from mlem_diffusion.models.family import as_level, build_denoiser, describe, shape_of
from mlem_diffusion.models.torch_compile import compiled, first_line, should_compile, use_compile_cache

UNET = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def network(width: int = 8, size: int = 8, unet: dict = UNET) -> torch.nn.Module:
    """A denoiser whose zero-initialised layers are filled with random numbers, as after training."""
    denoiser = build_denoiser(width, size, 0.5, unet, "v").eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    return denoiser


def batch(count: int = 6, size: int = 8, logsnr: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([logsnr]).expand(count)


# ------------------------------------------------------------------------------------------------ buckets


@pytest.mark.parametrize("batch_size", [None, 96, 256])
def test_buckets_cover_every_batch_with_little_padding(batch_size):
    used = set()
    for count in range(1, 300):
        pieces = list(cover(count, batch_size))
        assert sum(n for n, _ in pieces) == count
        assert all(0 < n <= bucket for n, bucket in pieces)
        padding = sum(bucket - n for n, bucket in pieces)
        assert padding <= max(7, 0.25 * count)
        used |= {bucket for _, bucket in pieces}
    assert used <= {8, 16, 32, 64, 128, 256, 512, batch_size}
    if batch_size is not None:
        assert list(cover(batch_size, batch_size)) == [(batch_size, batch_size)]


# ------------------------------------------------------------------------------------------------ one function


def test_float32_is_the_denoiser_for_shared_and_for_single_noise_levels():
    denoiser, (x, shared) = network(), batch()
    fast = FastDenoiser(denoiser)
    mixed = torch.linspace(-3, 3, len(x))
    with torch.no_grad():
        torch.testing.assert_close(fast(x, shared), denoiser(x, shared.contiguous()), rtol=0, atol=3e-6)
        torch.testing.assert_close(fast(x, mixed), denoiser(x, mixed), rtol=0, atol=3e-6)
    assert fast.mode == "float32 eager"


def test_the_copy_is_frozen_and_leaves_the_original_alone():
    denoiser, (x, noise_level) = network(), batch()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    fast = FastDenoiser(denoiser, "bf16")
    y = fast(x, noise_level)
    for parameter in denoiser.parameters():
        parameter.data.zero_()
    assert torch.equal(fast(x, noise_level), y)  # later training of the original has no effect
    assert all(not p.requires_grad for p in fast.network.parameters())
    assert network().state_dict().keys() == before.keys()  # layers joined for inference are not saved


@pytest.mark.parametrize("logsnr", [-9.0, -3.0, 0.0, 3.0, 9.0])
def test_bf16_is_close_at_every_noise_level(logsnr):
    denoiser, (x, noise_level) = network(), batch(logsnr=logsnr)
    exact, rounded = FastDenoiser(denoiser)(x, noise_level), FastDenoiser(denoiser, "bf16")(x, noise_level)
    assert rounded.dtype == torch.float32
    # the network's output has unit variance; its share in the image is `out`
    _, _, out = denoiser._coefficients(x, noise_level)
    assert 0 < float((rounded - exact).square().mean().sqrt()) < 0.01 * float(out.max())


def test_bf16_keeps_features_and_statistics_in_float32():
    fast = inference_copy(network(), "bf16")
    assert fast.unet.frequencies.dtype == torch.float32
    assert {p.dtype for p in fast.unet.parameters()} == {torch.bfloat16}
    # a large common offset: bf16 statistics would be off by 2^-9 of 64 = 0.1, a tenth of the spread
    x = 64 + torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.GroupNorm(2, 8)
    rounded = x.bfloat16()
    expected = norm(rounded.float())
    found = torch.nn.functional.group_norm(rounded, 2, norm.weight.bfloat16(), norm.bias.bfloat16())
    assert (found.float() - expected).abs().max() < 0.02


def test_derivatives_pass_through_every_precision():
    x, noise_level = batch()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for precision, tolerance in (("float32", 1e-4), ("bf16", 0.05)):
        fast = FastDenoiser(network(), precision, compile="off")
        with torch.no_grad():
            forward = torch.func.jvp(lambda y, f=fast: f(y, noise_level), (x,), (v,))[1]
            h = 1e-2
            reference = FastDenoiser(network())
            differences = (reference(x + h * v, noise_level) - reference(x - h * v, noise_level)) / (2 * h)
        assert (forward - differences).norm() < (tolerance + 1e-3) * differences.norm()
        y = x.clone().requires_grad_(True)
        backward = torch.autograd.grad((fast(y, noise_level) * v).sum(), y)[0]
        assert abs(float((backward * v).sum() - (forward * v).sum())) < (tolerance + 1e-3) * float(
            forward.norm() * v.norm()
        )


@NEEDS_COMPILER
def test_compiled_equals_eager_for_changing_batches():
    denoiser, (x, noise_level) = network(width=4), batch(12)
    fast, eager = FastDenoiser(denoiser, compile="on", name="w4"), FastDenoiser(denoiser)
    for count in (12, 5, 7):
        torch.testing.assert_close(
            fast(x[:count], noise_level[:count]), eager(x[:count], noise_level[:count]), rtol=0, atol=1e-5
        )
    assert fast.mode == "float32 compiled"


def test_a_failed_compilation_runs_eagerly_with_one_warning(monkeypatch):
    def broken(function, **_):
        def run(*_):
            raise RuntimeError("no compiler here\nand a long story")

        return run

    monkeypatch.setattr(compilation.torch, "compile", broken)
    fast, (x, noise_level) = FastDenoiser(network(), compile="on", name="w8"), batch()
    with pytest.warns(SlowPath, match=r"^w8 runs eagerly: compilation failed \(no compiler here\)\.$"):
        y = fast(x, noise_level)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fast(x, noise_level), y)
    assert fast.mode == "float32 eager"
    assert torch.equal(y, FastDenoiser(network())(x, noise_level))


def test_errors_of_the_function_do_not_count_as_failed_compilation(monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **_: function)

    def wrong(x):
        raise ZeroDivisionError("mine")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError):
            compiled(wrong, "it")(1)


def test_settings(monkeypatch, tmp_path):
    assert should_compile("on", "cpu") and should_compile("max", "cpu") and not should_compile("off", "cuda")
    assert not should_compile("auto", "cpu") and should_compile("auto", "cuda")
    with pytest.raises(UserError, match="'maybe' is unknown"):
        should_compile("maybe", "cpu")
    with pytest.raises(UserError, match="'fp8' is unknown"):
        FastDenoiser(network(), "fp8")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert use_compile_cache() == tmp_path
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert use_compile_cache() == tmp_path / "home" / "mlem-diffusion" / "compile"
    assert first_line(RuntimeError("\n  first thing. \nsecond")) == "first thing"


# ------------------------------------------------------------------------------------------------ shapes


def test_narrow_levels_take_the_shape_of_their_width():
    unet = {**UNET, "narrow": [{"upto": 32, "patch": 2, "blocks": 1}, {"upto": 8, "patch": 4, "multipliers": [2]}]}
    assert shape_of(unet, 8) == {"multipliers": [2], "blocks": 1, "attention": [4], "patch": 4}
    assert shape_of(unet, 9)["patch"] == 2 and shape_of(unet, 32)["patch"] == 2
    assert shape_of(unet, 33) == UNET
    levels = [describe(width, 16, 0.5, unet, "v") for width in (8, 32, 64)]
    assert levels[0]["unet"] == shape_of(unet, 8)  # a level is stored with its own shape
    costs = [level["flops"] for level in levels]
    assert costs == sorted(costs) and costs[0] < costs[2] / 100


def test_patches_see_every_pixel():
    unet = {**UNET, "patch": 2, "multipliers": [1]}
    denoiser, (x, noise_level) = network(unet=unet), batch(1)
    level = as_level("w8", denoiser, 1.0)
    out = level.denoise(x, noise_level)
    assert out.shape == x.shape
    moved = x.clone()
    moved[0, 1, 5, 2] += 1.0
    change = (level.denoise(moved, noise_level) - out)[0].abs()
    # beyond the skip connection's own pixel and its 2x2 patch
    assert change[1, 5, 2] > 0 and int((change > 1e-7).sum()) > 12
    with pytest.raises(UserError, match="patches of 3"):
        build_denoiser(8, 8, 0.5, {**UNET, "patch": 3}, "v")


# ------------------------------------------------------------------------------------------------ CUDA


@NEEDS_CUDA
@pytest.mark.parametrize("compile", ["off", "on"])
def test_graphs_equal_the_network(compile):
    denoiser = network(width=32).cuda()
    fast, reference = (
        FastDenoiser(denoiser, "bf16", compile, "w32", batch=24),
        FastDenoiser(denoiser, graphs=False, compile="off"),
    )
    x, noise_level = batch(24)
    x, noise_level = x.cuda(), noise_level[:1].cuda().expand(24)
    for count in (24, 3, 17, 24):
        y = fast(x[:count], noise_level[:count])
        copy = y.clone()
        fast(-x[:count], noise_level[:count])
        assert torch.equal(y, copy)  # a result is not overwritten by the next call
        assert (y - reference(x[:count], noise_level[:count])).abs().max() < 0.05
    assert fast.mode.endswith("+ graphs")
