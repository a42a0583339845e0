"""Seconds of samplers: parts timed apart, how often they occur, and their sum."""

import time

import numpy as np
import pytest
import torch
from toys import SHAPE, process

from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.step_rules import step_rule
from mlem_diffusion.multilevel.timing import SPREAD, Timing, measure_timing, work_of

RULE = step_rule("sde/ddpm")


def sleeper(name: str, seconds: float) -> Level:
    return Level(name, lambda x, logsnr: (time.sleep(seconds), x)[1], seconds)


def test_parts_are_timed_apart() -> None:
    """Calls that sleep take as long for few images (2) as for many (16)."""
    family, where = [sleeper("quick", 0.005), sleeper("slow", 0.05)], (process().grid(9), SHAPE, 16)
    timing = measure_timing(family, [RULE], *where, torch.device("cpu"), rounds=2, at_least=0.0)
    seconds = {name: median for name, (median, _) in timing.parts.items()}
    assert set(seconds) == {"quick", "slow", "few quick", "few slow", "step sde/ddpm", "call"}
    assert 0.005 / 16 <= seconds["quick"] < 0.025 / 16 < 0.05 / 16 <= seconds["slow"]
    assert seconds["few slow"] == pytest.approx(8 * seconds["slow"], rel=0.5)
    assert 0 < seconds["call"] < 0.1 and min(spread for _, spread in timing.parts.values()) >= SPREAD


def test_work_gives_the_time_of_calls_on_any_number_of_images() -> None:
    """Calls of level k on r images that take a_k + b_k r: exact down to 2 of 16 images, and constant below."""
    sizes, a, b, table = [16, 9, 2, 1, 0], (3.0, 5.0), (0.5, 2.0), np.zeros((5, 16, 2))
    table[:, :, 0] = 1
    for j, r in enumerate(sizes):
        table[j, 16 - r :, 1] = -2.5
    parts = {f"{few}w{k}": ((a[k] + n * b[k]) / n, 0.1) for k in (0, 1) for few, n in (("", 16), ("few ", 2))}
    timing = Timing(parts | {"step sde/ddpm": (0.25, 0.1), "call": (7.0, 0.1)})
    work = work_of([table, table], ["w0", "w1"], RULE, 16)
    calls = 5 * (a[0] + 16 * b[0]) + sum(a[1] + max(r, 2) * b[1] for r in sizes if r) + 7.0 * 4
    assert timing.seconds(work) == pytest.approx(calls / 16 + 0.25 * 5)
    assert work["w0"] == work["step sde/ddpm"] == 5 and work["call"] == 8 / 32 and "few w0" not in work
    draws = timing.draws([work, {"w0": 2.0}], 2000, seed=0)
    assert draws[:, 0] == pytest.approx([timing.seconds(work), 2 * parts["w0"][0]])
    assert np.log(draws[1, 1:]).std() == pytest.approx(0.1, rel=0.05)
