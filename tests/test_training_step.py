"""One training step: a reference loop, micro-batches, precisions, rates on the device, compilation, CUDA graphs."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_networks import Tiny
from test_training_loop import CONFIG, PROCESS, RMS, SIZE, UNET, WIDTH, assert_same, state_of, stop_at, table, train
from test_training_loop import images as images  # a fixture
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import portraits

from mlem_diffusion.data.pixels import to_float
from mlem_diffusion.diffusion.process import add_noise
from mlem_diffusion.errors import Interrupted, SlowPath
from mlem_diffusion.models.family import build_denoiser
from mlem_diffusion.models.unet import Denoiser
from mlem_diffusion.training.loop import draw_batch, ema_decay, learning_rate
from mlem_diffusion.training.step import GraphedStep, TrainStep, should_capture

CPU = torch.device("cpu")
SHORT = replace(CONFIG, images=16 * 8, snapshots=[1.0], log_every=32)


def pair(device: torch.device = CPU, unet: nn.Module | None = None) -> tuple[Denoiser, Denoiser]:
    """A new denoiser and its average, as train_level builds them."""
    denoiser = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", 5) if unet is None else Denoiser(unet, RMS)
    denoiser = denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return denoiser, copy.deepcopy(denoiser).eval().requires_grad_(False)


def batches(images: np.ndarray, count: int, device: torch.device = CPU) -> list[tuple[Tensor, Tensor, Tensor]]:
    data = torch.as_tensor(images).to(device)
    return [draw_batch(data, SHORT, table(PROCESS).to(device), step) for step in range(count)]


def run(step: TrainStep, drawn: Sequence[Sequence[Tensor]], first: int = 0) -> TrainStep:
    for i, batch in enumerate(drawn, start=first):
        step(batch, learning_rate(SHORT, WIDTH, 16 * i + 8), ema_decay(SHORT, 16 * i + 16))
    return step


def new(networks: tuple[Denoiser, Denoiser], rates_on_device: bool | None = None, **options: Any) -> TrainStep:
    return TrainStep(*networks, replace(SHORT, **options), rates_on_device=rates_on_device)


def stepped(drawn: Sequence[Sequence[Tensor]], **options: Any) -> TrainStep:
    return run(new(pair(drawn[0][0].device), **options), drawn)


def distance(a: nn.Module, b: nn.Module) -> float:
    x, y = (torch.cat([p.detach().flatten().cpu() for p in module.parameters()]) for module in (a, b))
    return float((x - y).norm() / x.norm())


def test_training_equals_the_reference_loop_bit_for_bit(images, tmp_path):
    """The reference loop is written out: float32 on a CPU, Adam, clipping, average, in this order."""
    denoiser, average = pair()
    optimiser = torch.optim.Adam(denoiser.parameters(), betas=(0.9, 0.99), fused=True)
    history, total = [], torch.zeros(())
    for i, (x0, noise, logsnr) in enumerate(batches(images, 8)):
        optimiser.param_groups[0]["lr"] = learning_rate(SHORT, WIDTH, 16 * i + 8)
        optimiser.zero_grad()
        loss = denoiser.loss(add_noise(x0, noise, logsnr), x0, logsnr).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), SHORT.clip)
        optimiser.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                mean.lerp_(now, 1 - ema_decay(SHORT, 16 * (i + 1)))
            total += loss
        if i % 2:
            history.append({"images": 16 * (i + 1), "loss": float(total) / 2})
            total.zero_()
    ema = train(images, tmp_path, SHORT)
    assert_same(dict(denoiser.state_dict()), dict(state_of(tmp_path)["model"]))
    assert_same(dict(average.state_dict()), dict(ema.state_dict()))
    assert_same(history, state_of(tmp_path)["history"])


def test_rates_on_the_device_train_the_same_and_resume(images):
    drawn = batches(images, 4)
    reference, tensors = (stepped(drawn, rates_on_device=on) for on in (False, True))
    assert distance(reference.denoiser, tensors.denoiser) < 1e-5 and distance(reference.ema, tensors.ema) < 1e-5
    assert float(tensors.running) == pytest.approx(float(reference.running), rel=1e-5)
    resumed = new(pair(), rates_on_device=True)
    resumed.load_state_dict(stepped(drawn[:2], rates_on_device=True).state_dict())
    assert_same(tensors.state_dict(), run(resumed, drawn[2:], first=2).state_dict())


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 2e-2)])
def test_micro_batches_train_what_the_batch_trains(images, precision, tolerance):
    drawn = batches(images, 4)
    whole, parts = (stepped(drawn, precision=precision, accumulate=n) for n in (1, 4))
    assert distance(whole.denoiser, parts.denoiser) < tolerance
    assert distance(whole.denoiser, pair()[0]) > 0.03
    assert float(parts.running) == pytest.approx(float(whole.running), rel=tolerance)


def test_all_precisions_reach_the_same_loss(images):
    """They agree to 2% early in training; after 400 steps at 16 pixels, width 8, to 0.6%, and seeds to 2%."""
    drawn, held_out = batches(images, 12), to_float(portraits(32, SIZE, seed=3))
    logsnr = torch.as_tensor(PROCESS.logsnr_at((np.arange(32) + 0.5) / 32), dtype=torch.float32)
    x = add_noise(held_out, torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0)), logsnr)
    losses = {}
    for precision in ("float32", "autocast", "bf16"):
        step = new(pair(), precision=precision)
        for batch in drawn:
            step(batch, 8e-3, 0.8)
        with torch.no_grad():
            losses[precision] = float(step.ema.loss(x, held_out, logsnr).mean())  # type: ignore[operator]
        for copied, master in zip(step.working, step.masters, strict=True):
            assert torch.equal(copied, master.to(copied.dtype))  # the bf16 copy follows the masters
    assert len(set(losses.values())) == 3
    assert losses["float32"] < 0.95 * float(pair()[1].loss(x, held_out, logsnr).mean())
    for precision in ("autocast", "bf16"):
        assert losses[precision] == pytest.approx(losses["float32"], rel=0.02)


def test_what_auto_captures():
    plain, cuda = nn.Linear(1, 1), torch.device("cuda")
    assert should_capture("auto", plain, cuda, 1)
    for module, device, world in ((plain, cuda, 2), (nn.Dropout(0.1), cuda, 1), (plain, CPU, 1)):
        assert not should_capture("auto", module, device, world)


def test_compiled_training_equals_eager_training(images, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ compiler
    unet = Tiny()
    fast, eager = (new(pair(unet=copy.deepcopy(unet)), compile=on) for on in ("on", "off"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        run(fast, batches(images, 4))
    run(eager, batches(images, 4))
    assert distance(eager.denoiser, fast.denoiser) < 1e-4 and distance(eager.ema, fast.ema) < 1e-4
    assert distance(eager.denoiser.unet, unet) > 1e-3
    assert fast.compiled is not None and fast.compiled.function is not fast.forward


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("no compiler")


def test_a_failing_compilation_of_the_backward_pass_trains_eagerly(images, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda *args: FailingBackward.apply(module(*args)))
    drawn = batches(images, 2)
    with pytest.warns(SlowPath):
        fallen = stepped(drawn, compile="on", accumulate=2)
    assert_same(stepped(drawn, accumulate=2).state_dict(), fallen.state_dict())


# ---------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("works", [True, False])
def test_every_call_of_a_graphed_step_is_one_step(images, monkeypatch, works):
    """Tests the order of warm-up, capture and replay, without the device's part."""

    def capture(self: Any) -> Any:
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.replay = lambda: self.step(self.buffers)  # as a graph: the same work on the buffers' current content
        return self  # a capture records and runs nothing

    monkeypatch.setattr(GraphedStep, "_on_side_stream", lambda self: self.step(self.buffers))
    monkeypatch.setattr(GraphedStep, "_capture", capture)
    drawn = batches(images, 6)
    untouched = copy.deepcopy(drawn)
    graphed = new(pair(), rates_on_device=True)
    graphed._take = GraphedStep(graphed.take, CPU)
    with contextlib.nullcontext() if works else pytest.warns(SlowPath):
        run(graphed, drawn)
    assert_same(stepped(drawn, rates_on_device=True).state_dict(), graphed.state_dict())
    assert_same(untouched, drawn)  # it has buffers of its own


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("precision", "compile", "tolerance"),
    [("float32", "off", 1e-3), ("float32", "on", 1e-3), ("autocast", "off", 2e-2), ("bf16", "off", 2e-2)],
)
def test_captured_training_equals_training_step_by_step(
    images, tmp_path, monkeypatch, precision, compile, tolerance, accumulate
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    trained, losses = [], []
    for graph in ("off", "on"):
        config, folder = replace(SHORT, precision=precision, graph=graph, accumulate=accumulate), tmp_path / graph
        config = replace(config, compile=compile if graph == "on" else "off")
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPath)
            # resumed with the optimiser's state on the device: it is captured a second time
            with pytest.raises(Interrupted):
                train(images, folder, config, device="cuda", should_stop=stop_at(5))
            trained.append(train(images, folder, config, device="cuda"))
        losses.append([entry["loss"] for entry in state_of(folder)["history"]])
        assert {float(moments["step"]) for moments in state_of(folder)["optimiser"]["state"].values()} == {8}
    assert distance(*trained) < tolerance
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


class NoReads(TorchDispatchMode):
    """Raises where a number of a tensor is read on the host: a CUDA graph cannot record that."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "autocast", "bf16"])
def test_no_step_reads_a_tensor_on_the_host(images, precision):
    step = new(pair(), precision=precision, accumulate=2, rates_on_device=True)
    with NoReads():
        run(step, batches(images, 2))
        with pytest.raises(RuntimeError, match="on the host"):
            float(step.running)
    assert torch.isfinite(step.running)
