"""Seconds of samplers: parts timed apart, how often they occur, and their sum."""

import time

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import SHAPE, process

from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.sampler import SingleLevel, sample
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.multilevel.timing import SPREAD, Timing, few, measure_timing, seconds_per_image, work_of

CPU, RULE, GRID = torch.device("cpu"), step_rule("sde/ddpm"), process().grid(9)


def sleeper(name: str, seconds: float, flops: float) -> Level:
    def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
        assert x.shape[1:] == SHAPE and logsnr.ndim == 0
        time.sleep(seconds)
        return x

    return Level(name, denoise, flops)


FAMILY = [sleeper("quick", 0.005, 1), sleeper("slow", 0.05, 2)]


def test_parts_are_timed_apart_and_add_up_to_the_time_of_a_run() -> None:
    """Calls that sleep take as long for few images as for many; a whole run agrees within a factor of 2."""
    timing = measure_timing(FAMILY, [RULE], GRID, SHAPE, 16, CPU, rounds=2, at_least=0.0)
    seconds = {name: median for name, (median, _) in timing.parts.items()}
    assert set(seconds) == {"quick", "slow", "few quick", "few slow", "step sde/ddpm", "call"}
    assert 0.005 / 16 <= seconds["quick"] < 0.025 / 16 < 0.05 / 16 <= seconds["slow"]
    assert seconds["few slow"] == pytest.approx(8 * seconds["slow"], rel=0.5) and few(16) == 2
    assert 0 < seconds["call"] < 0.01 and min(spread for _, spread in timing.parts.values()) >= SPREAD
    estimator = SingleLevel(FAMILY[1])
    began = time.perf_counter()
    sample(estimator, RULE, GRID, BrownianPath(range(16), SHAPE))
    seen = time.perf_counter() - began
    assert 0.5 < 16 * timing.seconds(work_of([estimator.weights(9, range(16))], ["slow"], RULE, 16)) / seen < 2
    assert seconds_per_image(FAMILY, SHAPE, 2, CPU)[1] == pytest.approx(0.03, rel=0.5)


def test_work_gives_the_time_of_calls_on_any_number_of_images() -> None:
    """Calls on r images that take a_k + b_k r: exact down to `few` images, and constant below."""
    rng, sizes, (a, b) = np.random.default_rng(0), [16, 9, 2, 1, 0], ((3.0, 5.0), (0.5, 2.0))
    tables = [np.zeros((5, 16, 2)), np.zeros((5, 16, 2))]
    for table in tables:
        table[:, :, 0] = 1
        for j, r in enumerate(sizes):
            table[j, rng.permutation(16)[:r], 1] = -2.5
    parts = {name: ((a[k] + 16 * b[k]) / 16, 0.1) for k, name in enumerate(("w0", "w1"))}
    parts |= {f"few {name}": ((a[k] + 2 * b[k]) / 2, 0.1) for k, name in enumerate(("w0", "w1"))}
    timing = Timing(parts | {"step sde/ddpm": (0.25, 0.1), "call": (7.0, 0.1)})
    work = work_of(tables, ["w0", "w1"], RULE, 16)
    calls = 5 * (a[0] + 16 * b[0]) + sum(a[1] + max(r, 2) * b[1] for r in sizes if r) + 7.0 * 4
    assert timing.seconds(work) == pytest.approx(calls / 16 + 0.25 * 5)
    assert work["w0"] == work["step sde/ddpm"] == 5 and work["call"] == 8 / 32 and "few w0" not in work
    draws = timing.draws([work, {"w0": 2.0}], 2000, seed=0)
    assert draws.shape == (2, 2001) and draws[:, 0] == pytest.approx([timing.seconds(work), 2 * parts["w0"][0]])
    assert np.log(draws[1, 1:]).std() == pytest.approx(0.1, rel=0.05)
