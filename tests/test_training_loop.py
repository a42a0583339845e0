"""Training: interruptions and processes do not change the result, and every noise level is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlem_diffusion.data.pixels import to_float
from mlem_diffusion.data.portraits import render
from mlem_diffusion.diffusion.process import CosineSchedule, LinearSchedule, Process
from mlem_diffusion.errors import UserError
from mlem_diffusion.gamma.denoising_errors import denoising_errors, noise_levels
from mlem_diffusion.models.checkpoint import load_state, save_state
from mlem_diffusion.models.family import as_level, build_denoiser
from mlem_diffusion.training.loop import Interrupted, TrainConfig, draw_batch, ema_decay, learning_rate, train_level

SRC = Path(__file__).resolve().parents[1] / "src"
PROCESS = Process(LinearSchedule(), base_steps=50, spacing="time")
UNET = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}
RMS, WIDTH, SIZE = 0.5, 4, 8
CONFIG = TrainConfig(
    images=16 * 30, batch=16, lr=4e-3, warmup_images=64, ema_halflife=200, ema_ramp=0.2, log_every=80,
    snapshots=[0.25, 0.5, 1.0], save_every=1e9, compile="off", seed=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return render(96, SIZE, seed=1)


def train(
    images: np.ndarray, folder: Path, config: TrainConfig = CONFIG, width: int = WIDTH, unet: Any = UNET, **more: Any
) -> Any:
    denoiser = build_denoiser(width, SIZE, RMS, unet, "v", config.seed)
    return train_level(denoiser, images, PROCESS, config, folder, width=width, **more)


def stop_at(*steps: int) -> Callable[[], bool]:
    """A should_stop that returns true after these steps (calls, counted over all resumptions)."""
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return calls in steps

    return should_stop


def train_with_stops(images: np.ndarray, folder: Path, *steps: int, config: TrainConfig = CONFIG, **more: Any) -> int:
    """Train through interruptions, each time like a new process; return the number of interruptions."""
    should_stop = stop_at(*steps)
    for stops in range(len(steps) + 1):
        torch.manual_seed(1000 + stops)  # the global generator must not matter
        try:
            train(images, folder, config, should_stop=should_stop, **more)
            return stops
        except Interrupted:
            pass
    raise AssertionError("more stops than steps named")


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Check that two values are bit-identical, through nested dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_folder(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    assert_same(load_state(a / "state.pt"), load_state(b / "state.pt"))
    for path in a.glob("*.safetensors"):
        assert_same(load_file(path), load_file(b / path.name), path.name)


@pytest.fixture(scope="module")
def whole(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(images, folder)
    return folder


# ------------------------------------------------------------------------------------------------ resuming


def test_training_moves_all_weights(whole: Path):
    start = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", CONFIG.seed).state_dict()
    state = load_state(whole / "state.pt")
    assert state is not None and state["images"] == CONFIG.images
    assert all(not torch.equal(start[name], state["model"][name]) for name in start)
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in start)
    assert [entry["images"] for entry in state["history"]] == [80, 160, 240, 320, 400, 480]


@pytest.mark.parametrize("steps", [(1,), (7,), (29,), (2, 8, 15), tuple(range(1, 30, 4))])
def test_interrupted_training_equals_uninterrupted(images, whole, tmp_path, steps):
    assert train_with_stops(images, tmp_path, *steps) == len(steps)
    assert_same_folder(whole, tmp_path)


@pytest.mark.parametrize("change", [{"flips": False}, {"log_every": 1}, {"seed": 6, "batch": 24, "images": 400}])
def test_interrupted_equals_uninterrupted_for_other_settings(images, tmp_path, change):
    config = replace(CONFIG, **change)
    train(images, tmp_path / "a", config)
    train_with_stops(images, tmp_path / "b", 4, 13, config=config)
    assert_same_folder(tmp_path / "a", tmp_path / "b")


def test_interrupted_equals_uninterrupted_with_dropout(images, tmp_path):
    unet, config = {**UNET, "dropout": 0.3}, replace(CONFIG, images=160)
    torch.manual_seed(0)
    train(images, tmp_path / "a", config, unet=unet)
    train_with_stops(images, tmp_path / "b", 3, config=config, unet=unet)
    assert_same_folder(tmp_path / "a", tmp_path / "b")


def test_a_killed_run_resumes_from_its_last_saved_state(images, whole, tmp_path):
    config = replace(CONFIG, save_every=0.0)  # a state after every step

    class Killed(Exception):
        pass

    def die_at(when: int) -> Callable[[dict[str, Any]], None]:
        def report(record: dict[str, Any]) -> None:
            if record["images"] == when:
                raise Killed

        return report

    for when in (80, 240):  # in the middle of a step: logged, but not saved
        with pytest.raises(Killed):
            train(images, tmp_path, config, report=die_at(when))
        state = load_state(tmp_path / "state.pt")
        assert state is not None and state["images"] == when - config.batch
    train(images, tmp_path, config)
    assert_same_folder(whole, tmp_path)


def test_no_state_is_saved_before_its_time(images, tmp_path):
    def die(record: dict[str, Any]) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        train(images, tmp_path, report=die)
    assert not (tmp_path / "state.pt").exists()


def test_a_finished_run_is_not_trained_further(images, whole, tmp_path):
    train(images, tmp_path)
    reports: list[Any] = []
    ema = train(images, tmp_path, report=reports.append)
    assert reports == []
    assert_same(load_file(whole / "ema.safetensors"), {k: v.contiguous() for k, v in ema.state_dict().items()})
    assert_same_folder(whole, tmp_path)


def test_the_seed_matters(images, whole, tmp_path):
    # the same initial weights, other batches
    denoiser = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", CONFIG.seed)
    train_level(denoiser, images, PROCESS, replace(CONFIG, seed=6), tmp_path, width=WIDTH)
    a, b = load_file(whole / "ema.safetensors"), load_file(tmp_path / "ema.safetensors")
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("foreign", [{"something": 1}, {"model": {}, "ema": {}, "optimiser": {}, "images": 0}])
def test_a_foreign_state_gives_one_sentence(images, tmp_path, foreign):
    save_state(tmp_path / "state.pt", foreign)
    with pytest.raises(UserError, match=r"state\.pt is not the state of this network; delete it") as error:
        train(images, tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- snapshots


def test_snapshots_come_at_their_fractions_once_each(images, tmp_path):
    config = replace(CONFIG, images=160, snapshots=[1.0, 0.25, 0.3])
    taken: list[int] = []
    train_with_stops(images, tmp_path, 2, 3, 5, config=config, snapshot=lambda seen, ema: taken.append(seen))
    # at the first step (of 16 images) at or past 40, 48 and 160 images; 40 and 48 fall into the same step
    assert taken == [48, 160]
    assert sorted(p.name for p in tmp_path.glob("ema-*")) == [
        "ema-0000000048.safetensors",
        "ema-0000000160.safetensors",
    ]
    assert_same(load_file(tmp_path / "ema-0000000160.safetensors"), load_file(tmp_path / "ema.safetensors"))


def test_a_snapshot_holds_the_average_of_its_moment(images, whole, tmp_path):
    half = replace(CONFIG, snapshots=[0.5, 1.0])
    with pytest.raises(Interrupted):
        train(images, tmp_path, half, should_stop=stop_at(15))
    state = load_state(tmp_path / "state.pt")
    assert state is not None and state["images"] == 240
    assert_same({k: v.contiguous() for k, v in state["ema"].items()}, load_file(whole / "ema-0000000240.safetensors"))


# ---------------------------------------------------------------------------------------- rates and decays


def test_ema_half_life_is_ramped_up_with_training():
    config = replace(CONFIG, batch=32, ema_halflife=1000, ema_ramp=0.05)
    assert ema_decay(config, 32) < 1e-5  # the first step replaces the initial weights
    assert ema_decay(config, 2000) == pytest.approx(0.5 ** (32 / 100))
    assert ema_decay(config, 20_000) == pytest.approx(0.5 ** (32 / 1000))
    assert ema_decay(config, 10**9) == pytest.approx(0.5 ** (32 / 1000))


def test_the_average_follows_the_half_life(images, tmp_path):
    """The average equals one recomputed from the weights after every step."""
    config = replace(CONFIG, images=128, save_every=0.0)
    weights: list[dict[str, torch.Tensor]] = []
    start = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", config.seed).state_dict()
    with pytest.raises(Interrupted):
        train(images, tmp_path, config, should_stop=stop_at(1))
    for step in range(2, 9):
        state = load_state(tmp_path / "state.pt")
        assert state is not None
        weights.append({k: v.clone() for k, v in state["model"].items()})
        try:
            train(images, tmp_path, config, should_stop=stop_at(1))
        except Interrupted:
            assert step < 9
    state = load_state(tmp_path / "state.pt")
    assert state is not None and len(weights) == 7
    weights.append(state["model"])
    for name in ("unet.enter.weight", "unet.leave.2.weight"):
        average = start[name].double()
        for i, now in enumerate(weights):
            decay = 0.5 ** (16 / min(200, 0.2 * 16 * (i + 1)))
            average = decay * average + (1 - decay) * now[name].double()
        assert torch.allclose(average.float(), state["ema"][name], rtol=1e-4, atol=1e-6), name


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    config = replace(CONFIG, images=10_000, lr=1e-2, reference_width=16, warmup_images=1000, decay_fraction=0.4)
    assert learning_rate(config, 16, 100) == pytest.approx(1e-3)
    assert learning_rate(config, 16, 1000) == pytest.approx(1e-2)
    assert learning_rate(config, 16, 6000) == pytest.approx(1e-2)
    assert learning_rate(config, 16, 8000) == pytest.approx(0.5e-2)
    assert learning_rate(config, 16, 10_000) == 0
    assert learning_rate(config, 16, 10_100) == 0
    assert learning_rate(config, 4, 5000) == pytest.approx(2e-2)  # narrower networks take larger steps
    assert learning_rate(config, 64, 5000) == pytest.approx(0.5e-2)
    assert learning_rate(replace(config, warmup_images=0, decay_fraction=0.0), 16, 1) == pytest.approx(1e-2)


@pytest.mark.parametrize("snapshots", [[], [0.5], [0.0, 1.0], [1.0, 1.5]])
def test_snapshots_must_end_with_the_training(snapshots):
    with pytest.raises(UserError, match=r"train\.snapshots"):
        replace(CONFIG, snapshots=snapshots)


def test_the_learning_rate_reported_is_the_schedule(images, tmp_path):
    records: list[dict[str, Any]] = []
    config = replace(CONFIG, images=160, log_every=16)
    train(images, tmp_path, config, report=records.append)
    assert [r["lr"] for r in records] == [learning_rate(config, WIDTH, 16 * i + 8) for i in range(10)]
    assert min(r["lr"] for r in records) > 0  # neither the first nor the last step is lost


# ------------------------------------------------------------------------------------------------- learning


def test_training_lowers_the_held_out_error(images, tmp_path):
    pictures = render(256, SIZE, seed=2)
    held_out, logsnr = to_float(render(48, SIZE, seed=3)), noise_levels(PROCESS, 7)
    fresh = build_denoiser(8, SIZE, RMS, UNET, "v", 0)
    config = replace(CONFIG, images=3200, batch=32, warmup_images=160, ema_halflife=500, seed=0)
    trained = train(pictures, tmp_path, config, width=8)
    before, after = (
        denoising_errors([as_level("net", net, 1.0)], held_out, logsnr)[0][0].mean(axis=0) for net in (fresh, trained)
    )
    # near the clean end the input is already a good estimate, so 100 steps improve nothing
    assert np.all(after[logsnr < 5] < 0.92 * before[logsnr < 5]), (before, after)
    assert np.all(after < 1.2 * before), (before, after)
    state = load_state(tmp_path / "state.pt")
    assert state is not None and state["history"][-1]["loss"] < 0.8 * state["history"][0]["loss"]


def test_a_loss_that_is_not_finite_gives_one_sentence(images, tmp_path):
    config = replace(CONFIG, lr=1e30, warmup_images=0, log_every=64)
    with pytest.raises(UserError, match=r"The loss of width 4 is not finite at step \d+ .*lower train\.lr") as error:
        train(images, tmp_path, config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ema.safetensors").exists()


# --------------------------------------------------------------------------------------------- noise levels


def table(process: Process) -> torch.Tensor:
    return torch.as_tensor(process.logsnr_at(np.linspace(0, 1, 4097)), dtype=torch.float32)


def positions(process: Process, logsnr: torch.Tensor) -> np.ndarray:
    """The position of a log-SNR on the sampler's path (0 to 1)."""
    s = np.linspace(0, 1, 200_001)
    return np.interp(logsnr.double().numpy(), process.logsnr_at(s), s)


@pytest.mark.parametrize(
    "process",
    [
        PROCESS,
        Process(CosineSchedule(), base_steps=50, spacing="time"),
        Process(LinearSchedule(), base_steps=50, spacing="logsnr"),
    ],
    ids=["linear", "cosine", "even in log-SNR"],
)
def test_every_noise_level_that_the_sampler_visits_is_trained(images, process):
    config, data = replace(CONFIG, batch=32), torch.as_tensor(images)
    drawn = torch.stack([draw_batch(data, config, process, table(process), step, 0, 1)[2] for step in range(150)])
    assert drawn.min() >= process.logsnr_min and drawn.max() <= process.logsnr_max
    where = positions(process, drawn)
    # stratified: image i of a batch lies in the i-th of 32 equal parts of the path (1e-3 for the table's interpolation)
    part = np.arange(32)
    assert np.all(where >= part / 32 - 1e-3) and np.all(where <= (part + 1) / 32 + 1e-3)
    inside = where * 32 - part
    assert abs(inside.mean() - 0.5) < 0.02  # uniform in its part: 4 standard errors are 0.017
    # the ends are reached: within a fifth of the first and last step of the finest grid
    assert where.min() < 0.2 / 49 and where.max() > 1 - 0.2 / 49
    # each point of the grid has trained neighbours on both sides
    grid = process.logsnr_at(np.linspace(0, 1, 50))
    assert np.all(np.histogram(drawn.numpy(), grid)[0] > 20)


def test_a_batch_is_images_or_their_mirror_images(images):
    data = torch.as_tensor(images)
    x0, noise, _ = draw_batch(data, CONFIG, PROCESS, table(PROCESS), 3, 0, 1)
    straight = data.float() / 127.5 - 1
    kinds = []
    for picture in x0:
        kinds.append([bool((picture == all_of).flatten(1).all(1).any()) for all_of in (straight, straight.flip(-1))])
    assert all(any(kind) for kind in kinds)
    assert 2 <= sum(kind[0] for kind in kinds) <= 14
    assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06  # 3072 values: 4 standard errors
    unflipped, _, _ = draw_batch(data, replace(CONFIG, flips=False), PROCESS, table(PROCESS), 3, 0, 1)
    assert all(bool((picture == straight).flatten(1).all(1).any()) for picture in unflipped)


def test_a_batch_depends_on_seed_and_step_alone(images):
    data = torch.as_tensor(images)

    def draw(seed: int, step: int) -> tuple[torch.Tensor, ...]:
        return draw_batch(data, replace(CONFIG, seed=seed), PROCESS, table(PROCESS), step, 0, 1)

    assert_same(list(draw(1, 2)), list(draw(1, 2)))
    for other in (draw(1, 3), draw(2, 2)):
        assert all(not torch.equal(a, b) for a, b in zip(draw(1, 2), other, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_the_slices_of_all_processes_are_the_batch_of_one(images, world):
    data = torch.as_tensor(images)
    whole = draw_batch(data, CONFIG, PROCESS, table(PROCESS), 9, 0, 1)
    parts = [draw_batch(data, CONFIG, PROCESS, table(PROCESS), 9, rank, world) for rank in range(world)]
    for i in range(3):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


# ------------------------------------------------------------------------------------------------ processes


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"train\.batch = 16 does not divide over 3 processes"):
        train(images, tmp_path)


WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import test_training_loop as t
dist.init_process_group("gloo")
try:
    config = replace(t.CONFIG, images=320, snapshots=[1.0], seed=5)
    folder, images = Path({folder!r}), t.render(96, t.SIZE, seed=1)
    stop = (lambda: dist.get_rank() == 1)  # only one process gets the stop; all must stop
    try:
        t.train(images, folder, replace(config, images=640, decay_fraction=0.0), should_stop=stop)
    except t.Interrupted:
        pass
    else:
        raise SystemExit("it did not stop")
    for precision in ("float32", "bf16"):
        config = replace(config, images=160, accumulate=2, precision=precision)
        t.train(images, folder / precision, config)
finally:
    dist.destroy_process_group()
"""


def test_two_processes_train_the_network_of_one(images, tmp_path):
    """Also with micro-batches and bf16. If one process must stop, all stop after the same step."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "two")))
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"torchrun does not run here: {error}")
    if done.returncode and any(
        word in done.stderr for word in ("RendezvousError", "gloo", "Address family", "connect")
    ):
        pytest.skip("torchrun cannot open its sockets here")
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_state(tmp_path / "two" / "state.pt")
    assert two is not None and two["images"] == 320  # should_stop is checked at every 20th step

    config = replace(CONFIG, images=640, decay_fraction=0.0, snapshots=[1.0])
    with pytest.raises(Interrupted):
        train(images, tmp_path / "one", config, should_stop=stop_at(20))
    one = load_state(tmp_path / "one" / "state.pt")
    assert one is not None
    assert_close(one, two, 1e-4)

    for precision, tolerance in (("float32", 1e-4), ("bf16", 2e-2)):
        config = replace(CONFIG, images=160, snapshots=[1.0], precision=precision)
        train(images, tmp_path / "one" / precision, config)
        assert_close(
            load_state(tmp_path / "one" / precision / "state.pt"),
            load_state(tmp_path / "two" / precision / "state.pt"),
            tolerance,
        )


def assert_close(one: Any, two: Any, tolerance: float) -> None:
    start = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", CONFIG.seed).state_dict()
    for kind in ("model", "ema"):
        a, b, s = (torch.cat([v.flatten() for v in x.values()]) for x in (one[kind], two[kind], start))
        assert float((a - b).norm() / a.norm()) < tolerance
        assert float((a - s).norm() / a.norm()) > 0.05  # far from where both began
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["images"] == b["images"] and b["loss"] == pytest.approx(a["loss"], rel=tolerance)
