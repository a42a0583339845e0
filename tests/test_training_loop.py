"""Training: interruptions and processes do not change the result, and every noise level is trained."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from toys import portraits

from mlem_diffusion import parallel
from mlem_diffusion.diffusion.process import CosineSchedule, LinearSchedule, Process
from mlem_diffusion.errors import Interrupted, UserError
from mlem_diffusion.models.family import build_denoiser, load_state
from mlem_diffusion.training.levels import TrainConfig
from mlem_diffusion.training.loop import draw_batch, ema_decay, learning_rate, noise_quantiles, train_level

PROCESS = Process(LinearSchedule(), base_steps=50, spacing="time")
UNET = {"multipliers": [1], "blocks": 1, "attention": [8]}
RMS, WIDTH, SIZE = 0.5, 4, 8
CONFIG = TrainConfig(
    images=16 * 12, batch=16, lr=4e-3, warmup_images=64, ema_halflife=200, ema_ramp=0.2, log_every=40,
    snapshots=[0.25, 0.5, 1.0], save_every=1e9, compile="off", seed=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return portraits(96, SIZE, seed=1)


def train(images: Any, folder: Path, config: TrainConfig = CONFIG, unet: Any = UNET, **more: Any) -> Any:
    denoiser = build_denoiser(WIDTH, SIZE, RMS, unet, "v", 5)
    return train_level(denoiser, images, PROCESS, config, folder, **more)


def stop_at(*calls: int) -> Callable[[], bool]:
    """A should_stop that returns true at these calls, which are counted over all resumptions: one after each step."""
    counter = itertools.count(1)
    return lambda: next(counter) in calls


def state_of(folder: Path) -> dict[str, Any]:
    state = load_state(folder / "state.pt")
    assert state is not None
    return state


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Check that two values are bit-identical, through nested dictionaries and lists."""
    if isinstance(a, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, where


def assert_same_folder(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    assert_same(state_of(a), state_of(b))
    for path in a.glob("*.safetensors"):
        assert_same(load_file(path), load_file(b / path.name), path.name)


@pytest.fixture(scope="module")
def whole(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(images, folder)
    return folder


@pytest.mark.parametrize(("change", "dropout", "taught", "calls"), [
    ({}, 0.3, False, (1, 3)), ({"precision": "bf16", "accumulate": 2}, 0.0, False, (2,)), ({}, 0.0, True, (2,)),
])  # fmt: skip
def test_interrupted_training_equals_uninterrupted(images, tmp_path, change, dropout, taught, calls):
    config, unet = replace(CONFIG, images=16 * 4, snapshots=[0.5, 1.0], **change), {**UNET, "dropout": dropout}
    teacher = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", 1) if taught else None
    train(images, tmp_path / "a", config, unet, teacher=teacher)
    should_stop = stop_at(*calls)
    for stops in range(len(calls)):  # each time like a new process
        torch.manual_seed(1000 + stops)  # the global generator must not matter
        with pytest.raises(Interrupted):
            train(images, tmp_path / "b", config, unet, teacher=teacher, should_stop=should_stop)
    train(images, tmp_path / "b", config, unet, teacher=teacher)
    assert_same_folder(tmp_path / "a", tmp_path / "b")


def test_a_killed_run_resumes_from_its_last_saved_state(images, whole, tmp_path):
    def die(record: dict[str, Any]) -> None:
        if record["images"] == 96:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # in the middle of a step: logged, but not saved
        train(images, tmp_path, replace(CONFIG, save_every=0.0), report=die)
    assert state_of(tmp_path)["images"] == 80
    with pytest.raises(UserError, match="not the state of this network"):
        train(images, tmp_path, identity="another network or other images")
    train(images, tmp_path)
    ema = train(images, tmp_path, report=die, should_stop=lambda: True)  # a finished run is not trained further
    assert_same_folder(whole, tmp_path)
    assert_same(load_file(whole / "ema.safetensors"), {k: v.contiguous() for k, v in ema.state_dict().items()})


def test_snapshots_hold_the_average_of_their_moment(images, whole, tmp_path):
    config = replace(CONFIG, snapshots=[1.0, 0.5, 0.25, 0.3])
    taken: list[int] = []
    with pytest.raises(Interrupted):
        train(images, tmp_path, config, should_stop=stop_at(6), snapshot=lambda seen, ema: taken.append(seen))
    average = {k: v.contiguous() for k, v in state_of(tmp_path)["ema"].items()}
    assert_same(average, load_file(whole / "ema-0000000096.safetensors"))
    train(images, tmp_path, config, snapshot=lambda seen, ema: taken.append(seen))
    assert taken == [48, 64, 96, 192]  # at the first step at or past 48, 57.6, 96 and 192 images


def test_a_loss_that_is_not_finite_stops_with_its_step_and_noise_level(images, tmp_path):
    with pytest.raises(UserError, match=rf"The loss of {tmp_path.name} is not finite at step 2, first at log-SNR"):
        train(images, tmp_path, replace(CONFIG, lr=1e30, warmup_images=0))
    denoiser = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", 5)
    exact = denoiser.loss
    denoiser.loss = lambda x, x0, logsnr: exact(x, x0, logsnr) / (logsnr < 5)  # inf at the clean end
    with pytest.raises(UserError, match=r"first at log-SNR [5-8]\."):
        train_level(denoiser, images, PROCESS, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_average_has_the_ramped_half_life():
    config = replace(CONFIG, batch=32, ema_halflife=1000, ema_ramp=0.05)
    assert ema_decay(config, 32) < 1e-5  # the first step replaces the initial weights
    assert ema_decay(config, 2000) == pytest.approx(0.5 ** (32 / 100))
    assert ema_decay(config, 20_000) == ema_decay(config, 10**9) == pytest.approx(0.5 ** (32 / 1000))


def test_learning_rate_warms_up_holds_and_decays_to_zero():
    config = replace(CONFIG, images=10_000, lr=1e-2, reference_channels=16, warmup_images=1000, decay_fraction=0.4)
    expected = {100: 1e-3, 1000: 1e-2, 6000: 1e-2, 8000: 0.5e-2, 10_000: 0, 10_100: 0}
    assert {n: learning_rate(config, 16, n) for n in expected} == pytest.approx(expected)
    assert learning_rate(config, 4, 5000) == pytest.approx(2e-2)  # narrower networks take larger steps


@pytest.mark.parametrize("change", [{"snapshots": [1.0, 1.5]}, {"accumulate": 3}, {"graph": "on"}])
def test_impossible_settings_are_refused(images, tmp_path, change):
    with pytest.raises(UserError, match=next(iter(change))):
        train(images, tmp_path, replace(CONFIG, **change))


# --------------------------------------------------------------------------------------------- noise levels


def table(process: Process) -> Tensor:
    return torch.as_tensor(process.logsnr_at(np.linspace(0, 1, 4097)), dtype=torch.float32)


def draw(images: Any, step: int, rank: int = 0, world: int = 1, process: Process = PROCESS, **change: Any) -> Any:
    config = replace(CONFIG, **change)
    return draw_batch(torch.as_tensor(images), config, table(process), step, rank, world)


@pytest.mark.parametrize(
    "process", [PROCESS, Process(CosineSchedule(), base_steps=50, spacing="logsnr")], ids=["linear", "cosine"]
)
def test_every_noise_level_that_the_sampler_visits_is_trained(images, process):
    drawn = torch.stack([draw(images, step, process=process, batch=32)[2] for step in range(150)])
    assert drawn.min() >= process.logsnr_min and drawn.max() <= process.logsnr_max
    path = np.linspace(0, 1, 200_001)
    where = np.interp(drawn.double().numpy(), process.logsnr_at(path), path)  # positions on the sampler's path
    # stratified: image i of a batch lies in the i-th of 32 equal parts of the path (1e-3 for the table's interpolation)
    part = np.arange(32)
    assert np.all(where >= part / 32 - 1e-3) and np.all(where <= (part + 1) / 32 + 1e-3)
    assert abs((where * 32 - part).mean() - 0.5) < 0.02  # uniform in its part: 4 standard errors are 0.017
    # the ends are reached: within a fifth of the first and last step of the finest grid
    assert where.min() < 0.2 / 49 and where.max() > 1 - 0.2 / 49


def test_a_batch_is_images_or_their_mirror_images(images):
    straight = torch.as_tensor(images).float() / 127.5 - 1

    def share(x0: Tensor, among: Tensor) -> float:
        return float((x0[:, None] == among[None]).flatten(2).all(2).any(1).double().mean())

    x0, noise, _ = draw(images, 3)
    assert share(x0, torch.cat([straight, straight.flip(-1)])) == 1 and 0.1 < share(x0, straight) < 0.9
    assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06  # 3072 values: 4 standard errors
    assert share(draw(images, 3, flips=False)[0], straight) == 1


def test_a_batch_depends_on_seed_and_step_and_is_sliced_by_rank(images):
    whole = draw(images, 9)
    assert_same(whole, draw(images, 9))
    for other in (draw(images, 8), draw(images, 9, seed=6)):
        assert all(not torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    for world in (2, 4):
        parts = [draw(images, 9, rank, world) for rank in range(world)]
        assert_same(whole, tuple(torch.cat(part) for part in zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------ processes

LONG = replace(CONFIG, images=4 * 21, batch=4, decay_fraction=0.0, snapshots=[1.0])
BF16 = replace(LONG, images=4 * 4, warmup_images=0, precision="bf16")
SMALL = {**UNET, "attention": []}


def _rank(rank: int, folder: Path) -> None:
    """Share work and train as one of two ranks."""
    where, limit = f"file://{folder}/meeting", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=limit)
    items = list(range(5))
    assert parallel.mine(items) == items[rank::2]
    squares = parallel.gather({i: i * i for i in parallel.mine(items)})
    assert list(squares.items()) == [(i, i * i) for i in items]  # in order on both ranks
    assert parallel.agree(rank == 1) and not parallel.agree(False)
    parallel.barrier()
    pictures = portraits(96, SIZE, seed=1)
    with pytest.raises(Interrupted):  # only one process gets the stop; all must stop
        train(pictures, folder / "stopped", LONG, SMALL, should_stop=lambda: rank == 1)
    train(pictures, folder / "bf16", replace(BF16, accumulate=2), SMALL)
    dist.destroy_process_group()


def test_two_processes_train_the_network_of_one(images, tmp_path):
    """Also with micro-batches and bf16. If one process must stop, all stop after the same step."""
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, two), daemon=True)
    other.start()
    _rank(0, two)
    other.join(60)
    assert other.exitcode == 0
    with pytest.raises(Interrupted):
        train(images, one / "stopped", LONG, SMALL, should_stop=stop_at(20))  # two processes ask at every 20th step
    train(images, one / "bf16", BF16, SMALL)
    start = build_denoiser(WIDTH, SIZE, RMS, SMALL, "v", 5).state_dict()
    for name, tolerance in (("stopped", 1e-4), ("bf16", 2e-2)):
        a, b = state_of(one / name), state_of(two / name)
        assert a["images"] == b["images"]
        for kind in ("model", "ema"):
            x, y, s = (torch.cat([v.flatten() for v in weights.values()]) for weights in (a[kind], b[kind], start))
            assert float((x - y).norm()) < tolerance * float(x.norm()) < 20 * tolerance * float((x - s).norm())
        losses = [[entry["loss"] for entry in state["history"]] for state in (a, b)]
        assert losses[1] == pytest.approx(losses[0], rel=tolerance)


# ------------------------------------------------------------------------------------------ levels made for ML-EM
def test_a_taught_level_comes_closer_to_its_teacher_than_to_the_images(images, tmp_path):
    """The teacher is an untrained network with an output of its own, so that images could not lead to it."""
    teacher = build_denoiser(WIDTH, SIZE, RMS, UNET, "v", 1)
    torch.manual_seed(0)
    torch.nn.init.normal_(teacher.unet.leave[2].weight, std=0.3)  # pyright: ignore
    before = [p.clone() for p in teacher.parameters()]
    config, batch = replace(CONFIG, images=16 * 40, lr=1e-2, ema_ramp=0.1), torch.randn(64, 3, SIZE, SIZE)
    logsnr = torch.linspace(-4, 4, 64)

    def distance(student: Any) -> float:
        return float((student(batch, logsnr) - teacher(batch, logsnr)).square().mean())

    with torch.no_grad():
        apart = distance(build_denoiser(WIDTH, SIZE, RMS, UNET, "v", 5))
    taught, alone = (train(images, tmp_path / n, config, teacher=t) for n, t in (("a", teacher), ("b", None)))
    with torch.no_grad():
        assert distance(taught) < 0.5 * min(apart, distance(alone))
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


@pytest.mark.parametrize("spacing", ["time", "logsnr"])
def test_half_of_the_noise_levels_can_be_drawn_around_one(spacing):
    process = replace(PROCESS, spacing=spacing)
    path = noise_quantiles(process, None)
    assert np.array_equal(path, process.logsnr_at(np.linspace(0, 1, len(path))))
    found = noise_quantiles(process, (2.0, 1.0))
    assert np.all(np.diff(found) > 0) and (found[0], found[-1]) == pytest.approx((path[0], path[-1]))
    share, expected = ((v > 1) & (v < 3) for v in (found, path))
    assert share.mean() == pytest.approx(0.5 * expected.mean() + 0.5 * 0.6827, abs=0.01)
