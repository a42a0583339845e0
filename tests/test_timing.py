"""What samplers cost: FLOPs against counts by hand, and seconds of parts that are timed apart."""

import time
from functools import partial

import numpy as np
import pytest
from torch import Tensor, nn
from toys import SHAPE, process

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level, flops_per_evaluation
from mlem_diffusion.diffusion.sampler import SingleLevel
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.errors import UserError
from mlem_diffusion.models.unet import Attention, Denoiser, UNet
from mlem_diffusion.multilevel.estimators import Multilevel
from mlem_diffusion.multilevel.timing import SPREAD, Timing, measure_timing, random_work, summarised, work_of

RULE = step_rule("sde/ddpm")


def sleeper(name: str, seconds: float) -> Level:
    return Level(name, lambda x, logsnr: (time.sleep(seconds), x)[1], seconds)


def test_parts_are_timed_apart() -> None:
    """Calls that sleep take as long for few images (2) as for many (16)."""
    family, path_of = [sleeper("quick", 0.005), sleeper("slow", 0.05)], partial(BrownianPath, shape=SHAPE)
    timing = measure_timing(family, [RULE], process().grid(9), path_of, 16, rounds=2, at_least=0.0)
    seconds = {name: median for name, (median, _) in timing.parts.items()}
    drawn, levels = {"start", "noise", "coins"}, {"quick", "slow", "few quick", "few slow"}
    assert set(seconds) == levels | drawn | {"step sde/ddpm", "call"}
    assert 0.005 / 16 <= seconds["quick"] < 0.8 * seconds["slow"] and seconds["slow"] >= 0.05 / 16  # even under load
    assert seconds["few slow"] == pytest.approx(8 * seconds["slow"], rel=0.5)
    assert 0 < seconds["call"] < 0.1 and min(spread for _, spread in timing.parts.values()) >= SPREAD


def test_what_slows_all_parts_alike_is_no_spread() -> None:
    load = np.array([1.0, 3.0, 1.5, 2.0, 1.2])
    parts = summarised({"a": load, "b": 2 * load, "c": 4 * load * [1, 1, 1.3, 1, 1]}).parts
    assert parts["a"] == pytest.approx((1.5, SPREAD)) and parts["b"] == pytest.approx((3.0, SPREAD))
    assert parts["c"] == pytest.approx((6.0, np.log([1.3, 1, 1, 1, 1]).std(ddof=1)))


def test_random_numbers_take_time_too() -> None:
    """Coins only in a multilevel run; steps that are no power of two draw more numbers for the same path."""
    path, grids = BrownianPath([0], SHAPE), [process(513).grid(steps) for steps in (16, 24, 32)]
    family = [sleeper(f"w{k}", k) for k in (1, 2, 3)]
    alone, several = SingleLevel(family[0]), Multilevel(family, np.array([1.0, 0.5, 0.25]))
    assert random_work(alone, step_rule("ode/ddim"), grids[0], path) == {"start": 1, "noise": 0, "coins": 0}
    assert random_work(several, step_rule("ode/ddim"), grids[0], path)["coins"] == 2
    noise = [random_work(alone, RULE, grid, path)["noise"] for grid in grids]
    assert 15 <= noise[0] < noise[2] < noise[1] < 512
    with pytest.raises(UserError, match="The timing lacks coins"):
        Timing({"start": (1.0, 0.1)}).draws([{"start": 1.0, "coins": 2.0}], 2, seed=0)


def test_work_gives_the_time_of_calls_on_any_number_of_images() -> None:
    """Calls of level k on r images that take a_k + b_k r: exact down to 2 of 16 images, and constant below."""
    sizes, a, b, table = [16, 9, 2, 1, 0], (3.0, 5.0), (0.5, 2.0), np.zeros((5, 16, 2))
    table[:, :, 0] = 1
    for j, r in enumerate(sizes):
        table[j, 16 - r :, 1] = -2.5
    parts = {f"{few}w{k}": ((a[k] + n * b[k]) / n, 0.1) for k in (0, 1) for few, n in (("", 16), ("few ", 2))}
    timing = Timing(parts | {"step sde/ddpm": (0.25, 0.1), "call": (7.0, 0.1)})
    work = work_of([table, table], [sleeper("w0", 1.0), sleeper("w1", 2.0)], RULE, 16, [0.0] * len(table))
    calls = 5 * (a[0] + 16 * b[0]) + sum(a[1] + max(r, 2) * b[1] for r in sizes if r) + 7.0 * 4
    assert timing.seconds(work) == pytest.approx(calls / 16 + 0.25 * 5)
    assert work["w0"] == work["step sde/ddpm"] == 5 and work["call"] == 8 / 32 and "few w0" not in work
    draws = timing.draws([work, {"w0": 2.0}], 2000, seed=0)
    assert draws[:, 0] == pytest.approx([timing.seconds(work), 2 * parts["w0"][0]])
    assert np.log(draws[1, 1:]).std() == pytest.approx(0.1, rel=0.05)


class Layers(nn.Sequential):
    """Layers of x as a network of (x, logsnr)."""

    def forward(self, x: Tensor, logsnr: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(("network", "channels", "by_hand"), [
    (Layers(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 8**2, 5)), 3,
     2 * 3 * 8 * 3 * 3 * 8**2 + 2 * 8 * 8**2 * 5),
    *((Layers(Attention(c)), c, 2 * 8**2 * c * 3 * c + 2 * 8**2 * c**2 + 4 * 8**4 * c) for c in (16, 128)),
])  # fmt: skip
def test_flops_by_hand(network: nn.Module, channels: int, by_hand: int) -> None:
    """Attention: two 1x1 convolutions (to 3C and C) and two products of length^2 x C, whatever the number of heads."""
    assert flops_per_evaluation(network, (channels, 8, 8)) == by_hand


def test_unet_of_width_8_at_64_pixels() -> None:
    """0.233 GFLOP; twice the width costs four times as much, except in the layers that read or write three channels."""
    flops = [flops_per_evaluation(Denoiser(UNet(width, 64)), (3, 64, 64)) / 1e9 for width in (8, 16)]
    assert flops[0] == pytest.approx(0.233, rel=0.01)
    assert 3.7 < flops[1] / flops[0] < 4
    assert flops_per_evaluation(UNet(8, 64, attention=()), (3, 64, 64)) / 1e9 < 0.99 * flops[0]
