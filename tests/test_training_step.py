"""One training step: a reference loop, micro-batches, precisions, rates on the device, compilation, CUDA graphs."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_training_loop import (
    CONFIG,
    PROCESS,
    RMS,
    SIZE,
    UNET,
    WIDTH,
    assert_same,
    assert_same_folder,
    stop_at,
    table,
    train,
    train_with_stops,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlem_diffusion.data.pixels import to_float
from mlem_diffusion.data.portraits import render
from mlem_diffusion.diffusion.process import add_noise
from mlem_diffusion.errors import SlowPath, UserError
from mlem_diffusion.models.checkpoint import load_state
from mlem_diffusion.models.family import build_denoiser
from mlem_diffusion.models.unet import Denoiser
from mlem_diffusion.training.graphed_step import GraphedStep
from mlem_diffusion.training.loop import Interrupted, TrainConfig, draw_batch, ema_decay, learning_rate
from mlem_diffusion.training.step import TrainStep, choose_precision, should_capture

CPU = torch.device("cpu")
SHORT = replace(CONFIG, images=16 * 12, snapshots=[1.0], log_every=32)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return render(96, SIZE, seed=1)


class Tiny(nn.Module):
    """The smallest network with an input of each kind: it compiles in seconds."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        x = self.enter(x.to(self.enter.weight.dtype)) * torch.sigmoid(logsnr)[:, None, None, None].to(
            self.enter.weight.dtype
        )
        return self.leave(torch.tanh(x))


def pair(network: Callable[[], nn.Module] | None = None, device: torch.device = CPU) -> tuple[Denoiser, Denoiser]:
    """A new denoiser and its average, as train_level builds them."""
    torch.manual_seed(0)
    denoiser = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", 5) if network is None else Denoiser(network(), RMS)
    denoiser = denoiser.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return denoiser, copy.deepcopy(denoiser).eval().requires_grad_(False)


def batches(images: np.ndarray, count: int, device: torch.device = CPU) -> list[tuple[Tensor, Tensor, Tensor]]:
    data = torch.as_tensor(images).to(device)
    return [draw_batch(data, SHORT, PROCESS, table(PROCESS).to(device), step, 0, 1) for step in range(count)]


def run(step: TrainStep, drawn: Sequence[Sequence[Tensor]]) -> TrainStep:
    for i, batch in enumerate(drawn):
        step(batch, learning_rate(SHORT, WIDTH, 16 * i + 8), ema_decay(SHORT, 16 * i + 16))
    return step


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in module.parameters()])


def distance(a: nn.Module, b: nn.Module) -> float:
    return float((weights(a) - weights(b)).norm() / weights(a).norm())


def slow_paths(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, SlowPath)]


# ------------------------------------------------------------------------------------------- the reference loop


def test_training_equals_the_reference_loop_bit_for_bit(images, tmp_path):
    """The reference loop is written out: float32 on a CPU, Adam, clipping, average, in this order."""
    denoiser, average = pair()
    optimiser = torch.optim.Adam(denoiser.parameters(), betas=(0.9, 0.99), fused=True)
    history, total = [], torch.zeros(())
    for i in range(12):
        x0, noise, logsnr = batches(images, i + 1)[i]
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
    state = load_state(tmp_path / "state.pt")
    assert state is not None
    assert_same(dict(denoiser.state_dict()), dict(state["model"]))
    assert_same(dict(average.state_dict()), dict(ema.state_dict()))
    assert_same(history, state["history"])


def test_the_average_takes_no_part_in_differentiation(images):
    """Otherwise every step would hold references to all earlier steps."""
    denoiser, ema = pair()
    run(TrainStep(denoiser, ema, compile="off"), batches(images, 2))
    assert all(p.grad_fn is None and not p.requires_grad for p in ema.parameters())


def test_the_first_step_is_reported_once(images, tmp_path):
    seconds: list[float] = []
    train(images, tmp_path, SHORT, on_first_step=seconds.append)
    assert len(seconds) == 1 and 0 < seconds[0] < 60
    train(images, tmp_path, SHORT, on_first_step=seconds.append)  # already trained, so there is no step
    assert len(seconds) == 1


# -------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rates_on_the_device_train_the_same(images, precision):
    reference, tensors = (
        run(TrainStep(*pair(), compile="off", precision=precision, rates_on_device=on), batches(images, 8))
        for on in (False, True)
    )
    assert distance(reference.denoiser, tensors.denoiser) < 1e-5 and distance(reference.ema, tensors.ema) < 1e-5
    assert float(tensors.running) == pytest.approx(float(reference.running), rel=1e-5)
    assert tensors.lr == reference.lr


def test_rates_on_the_device_survive_a_resumption(images):
    drawn = batches(images, 8)
    whole = run(TrainStep(*pair(), compile="off", rates_on_device=True), drawn)
    first = run(TrainStep(*pair(), compile="off", rates_on_device=True), drawn[:5])
    second = TrainStep(*pair(), compile="off", rates_on_device=True)
    second.load_state_dict(first.state_dict())
    assert second.lr == first.lr
    for i in range(5, 8):
        second(drawn[i], learning_rate(SHORT, WIDTH, 16 * i + 8), ema_decay(SHORT, 16 * i + 16))
    assert_same(whole.state_dict(), second.state_dict())


# ------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_train_what_the_batch_trains(images, precision, tolerance, accumulate):
    whole, parts = (
        run(TrainStep(*pair(), compile="off", precision=precision, accumulate=n), batches(images, 8))
        for n in (1, accumulate)
    )
    assert distance(whole.denoiser, parts.denoiser) < tolerance
    assert distance(whole.denoiser, pair()[0]) > 0.1
    assert float(parts.running) == pytest.approx(float(whole.running), rel=tolerance)


def test_micro_batches_are_resumed_exactly(images, tmp_path):
    config = replace(SHORT, accumulate=4)
    train(images, tmp_path / "a", config)
    train_with_stops(images, tmp_path / "b", 3, config=config)
    assert_same_folder(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------------------------------------- precisions


def held_out_loss(denoiser: Denoiser, pictures: Tensor) -> float:
    logsnr = torch.as_tensor(PROCESS.logsnr_at((np.arange(len(pictures)) + 0.5) / len(pictures)), dtype=torch.float32)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(denoiser.loss(add_noise(pictures, noise, logsnr), pictures, logsnr).mean())


def test_all_precisions_reach_the_same_loss(tmp_path):
    """They agree to 2% early in training; after 400 steps at 16 pixels, width 8, to 0.6%, and seeds to 2%."""
    pictures, held_out = render(256, SIZE, seed=2), to_float(render(128, SIZE, seed=3))
    config = replace(CONFIG, images=16 * 60, batch=16, warmup_images=240, ema_halflife=500, snapshots=[1.0], seed=0)
    before = held_out_loss(build_denoiser(8, SIZE, RMS, UNET, "v", 0), held_out)
    losses, trained = {}, {}
    for precision in ("float32", "autocast", "bf16"):
        ema = train(pictures, tmp_path / precision, replace(config, precision=precision), width=8)
        state = load_state(tmp_path / precision / "state.pt")
        assert state is not None
        losses[precision] = (held_out_loss(ema, held_out), np.mean([h["loss"] for h in state["history"][-4:]]))
        for stored in (state["model"], state["ema"], *state["optimiser"]["state"].values()):
            assert all(v.dtype == torch.float32 for v in stored.values())
        trained[precision] = weights(ema)
    assert losses["float32"][0] < 0.9 * before
    for precision in ("autocast", "bf16"):
        assert losses[precision] == pytest.approx(losses["float32"], rel=0.02)
        assert not torch.equal(trained[precision], trained["float32"])


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_interrupted_equals_uninterrupted_in_every_precision(images, tmp_path, precision):
    config = replace(SHORT, precision=precision)
    train(images, tmp_path / "a", config)
    train_with_stops(images, tmp_path / "b", 1, 6, config=config)
    assert_same_folder(tmp_path / "a", tmp_path / "b")


def test_a_state_resumes_in_another_precision(images, tmp_path):
    whole = train(images, tmp_path / "float32", SHORT)
    for first, then in (("bf16", "float32"), ("float32", "bf16")):
        folder = tmp_path / f"{first}-{then}"
        with pytest.raises(Interrupted):
            train(images, folder, replace(SHORT, precision=first), should_stop=stop_at(6))
        mixed = train(images, folder, replace(SHORT, precision=then))
        assert 0 < distance(whole, mixed) < 2e-2 < 0.2 * distance(whole, pair()[0])


def test_the_bf16_copy_follows_the_masters(images):
    step = run(TrainStep(*pair(), compile="off", precision="bf16"), batches(images, 3))
    for copied, master in zip(step.working, step.masters, strict=True):
        assert copied.dtype == torch.bfloat16 and torch.equal(copied, master.to(torch.bfloat16))
        assert copied.is_contiguous(memory_format=torch.channels_last) or copied.dim() != 4
    network: Any = step.forward
    assert network.denoiser.unet.frequencies.dtype == torch.float32


def test_what_auto_means(monkeypatch):
    assert choose_precision("auto", CPU) == "float32" and choose_precision("autocast", CPU) == "autocast"
    for major, expected in ((7, "float32"), (8, "bf16"), (9, "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert choose_precision("auto", torch.device("cuda")) == expected
    reference, cuda = nn.Linear(1, 1), torch.device("cuda")
    assert should_capture("auto", reference, cuda, 1) and should_capture("on", reference, cuda, 1)
    assert not should_capture("off", reference, cuda, 1) and not should_capture("auto", reference, cuda, 2)
    assert not should_capture("auto", nn.Dropout(0.1), cuda, 1) and not should_capture("auto", reference, CPU, 1)


# ------------------------------------------------------------------------------------------------ bad values


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"precision": "fp8"}, r"train\.precision = 'fp8' is unknown; expected one of auto, float32, autocast, bf16\."),
        ({"graph": "yes"}, r"train\.graph = 'yes' is unknown; expected one of auto, on, off\."),
        ({"compile": "yes"}, r"compile = 'yes' is unknown"),
        ({"accumulate": 0}, r"train\.accumulate = 0 must be at least 1\."),
    ],
)
def test_bad_settings_give_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        TrainConfig(**change)
    assert "\n" not in str(error.value)


def test_impossible_combinations_give_one_sentence(images, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"train\.batch = 16 does not divide over 1 processes in 3 micro-batches each\.$"
    ):
        train(images, tmp_path, replace(SHORT, accumulate=3))
    with pytest.raises(UserError, match=r"train\.graph = 'on' needs a CUDA device, one process and a network without"):
        train(images, tmp_path, replace(SHORT, graph="on"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"train\.batch = 16 does not divide over 2 processes in 16 micro-batches"):
        train(images, tmp_path, replace(SHORT, accumulate=16))


# ----------------------------------------------------------------------------------------------- compilation


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_training_equals_eager_training(images):
    drawn = batches(images, 6)
    eager = run(TrainStep(*pair(Tiny), compile="off"), drawn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = run(TrainStep(*pair(Tiny), compile="on"), drawn)
    if messages := slow_paths(caught):
        pytest.skip(f"torch.compile does not work here: {messages[0]}")
    assert fast.forward.is_compiled()
    assert distance(eager.denoiser, fast.denoiser) < 1e-4 and distance(eager.ema, fast.ema) < 1e-4
    assert distance(eager.denoiser, pair(Tiny)[0]) > 0.01


@pytest.mark.parametrize("where", ["wrapping", "forward", "backward"])
def test_a_failing_compilation_trains_eagerly_with_one_warning(images, monkeypatch, where):
    class FailingBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError("no compiler\nmore of it")

    def broken_compile(module: Any, **options: Any) -> Any:
        if where == "wrapping":
            raise RuntimeError("no compiler\nmore of it")

        def call(*args: Any) -> Any:
            if where == "forward":
                raise RuntimeError("no compiler\nmore of it")
            return FailingBackward.apply(module(*args))

        return call

    monkeypatch.setattr(torch, "compile", broken_compile)
    drawn = batches(images, 4)
    eager = run(TrainStep(*pair(), compile="off", accumulate=2), drawn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fallen = run(TrainStep(*pair(), compile="on", accumulate=2, name="Training of width 4"), drawn)
    (message,) = slow_paths(caught)
    assert message.startswith("Training of width 4 runs eagerly: compilation") and "no compiler" in message
    assert "\n" not in message
    assert_same(eager.state_dict(), fallen.state_dict())


def test_an_error_of_the_network_does_not_count_as_a_failed_compilation(images, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)

    class Broken(Tiny):
        def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
            raise ValueError("broken network")

    with pytest.raises(ValueError, match="broken network"):
        run(TrainStep(*pair(Broken), compile="on"), batches(images, 1))


# ---------------------------------------------------------------------------------------------- CUDA graphs


class Replayed:
    """Imitates a captured graph: the same work on the same buffers, with their current content."""

    def __init__(self, graphed: GraphedStep):
        self.graphed = graphed

    def replay(self) -> None:
        self.graphed.step(self.graphed.buffers)


@pytest.mark.parametrize("works", [True, False])
def test_every_call_of_a_graphed_step_is_one_step(images, monkeypatch, works):
    """Tests the order of warm-up, capture and replay, without the device's part."""
    sides = []

    def on_side_stream(self: GraphedStep) -> None:
        sides.append(1)
        self.step(self.buffers)

    def capture(self: GraphedStep) -> Replayed:
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return Replayed(self)  # a capture records and runs nothing

    monkeypatch.setattr(GraphedStep, "_on_side_stream", on_side_stream)
    monkeypatch.setattr(GraphedStep, "_capture", capture)
    drawn = batches(images, 8)
    reference = run(TrainStep(*pair(), compile="off", rates_on_device=True), drawn)
    graphed = TrainStep(*pair(), compile="off", rates_on_device=True)
    graphed._static_step = GraphedStep(graphed.static_step, CPU, "Training of width 4")
    untouched = [[tensor.clone() for tensor in batch] for batch in drawn]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(graphed, drawn)
    assert len(sides) == 3
    assert_same(reference.state_dict(), graphed.state_dict())
    assert_same(untouched, [list(batch) for batch in drawn])  # buffers of its own
    expected = "Training of width 4 runs without a CUDA graph: CUDA graph capture failed (operation not permitted"
    assert [message.startswith(expected) and "\n" not in message for message in slow_paths(caught)] == (
        [] if works else [True]
    )


class NoReads(TorchDispatchMode):
    """Raises where a number of a tensor is read on the host: a CUDA graph cannot record that."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bf16"])
def test_no_step_reads_a_tensor_on_the_host(images, precision, accumulate):
    step = TrainStep(*pair(), compile="off", precision=precision, accumulate=accumulate, rates_on_device=True)
    with NoReads():
        for batch in batches(images, 2):
            step(batch, 1e-3, 0.9)
        with pytest.raises(RuntimeError, match="on the host"):
            float(step.loss)
    assert torch.isfinite(step.loss)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("autocast", 2e-2), ("bf16", 2e-2)])
def test_captured_training_equals_training_step_by_step(
    images, tmp_path, monkeypatch, precision, tolerance, accumulate
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    trained, histories = [], []
    for graph in ("off", "on"):
        config = replace(SHORT, precision=precision, graph=graph, accumulate=accumulate)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPath)
            # resumed with the optimiser's state on the device: it is captured a second time
            with pytest.raises(Interrupted):
                train(images, tmp_path / graph, config, device="cuda", should_stop=stop_at(6))
            trained.append(train(images, tmp_path / graph, config, device="cuda"))
        state = load_state(tmp_path / graph / "state.pt")
        assert state is not None
        histories.append([entry["loss"] for entry in state["history"]])
        assert {float(moments["step"]) for moments in state["optimiser"]["state"].values()} == {12}
    assert distance(*trained) < tolerance
    assert histories[1] == pytest.approx(histories[0], rel=tolerance)


@needs_cuda
@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_no_step_waits_for_the_device(images, precision, graph):
    device = torch.device("cuda")
    step = TrainStep(*pair(device=device), compile="off", precision=precision, graph=graph)
    run(step, batches(images, 5, device))  # compilation, tuning and capture are finished
    data, levels = torch.as_tensor(images).to(device), table(PROCESS).to(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(5, 8):
            batch = draw_batch(data, SHORT, PROCESS, levels, i, 0, 1)
            step(batch, learning_rate(SHORT, WIDTH, 16 * i), ema_decay(SHORT, 16 * i))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.isfinite(step.loss)


@needs_cuda
def test_compiled_and_captured_training_on_a_device(images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda")
    drawn = batches(images, 8, device)
    reference = run(TrainStep(*pair(device=device), compile="off", graph="off", precision="float32"), drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        fast = run(TrainStep(*pair(device=device), compile="on", graph="on", precision="float32"), drawn)
    assert distance(reference.denoiser, fast.denoiser) < 1e-3
