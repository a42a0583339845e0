"""The benchmark: fair networks, right units, comparisons, parts that fail or are measured already."""

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from mlem_diffusion import benchmark
from mlem_diffusion.benchmark import denoisers, row
from mlem_diffusion.diffusion.level import flops_per_evaluation
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import Interrupted

CPU, PROCESS = torch.device("cpu"), Process(LinearSchedule(), base_steps=20)
TINY = {"multipliers": [1, 2], "blocks": 1, "attention": [8]}
REFERENCE = {"multipliers": [1, 2, 2, 2], "blocks": 2, "attention": [16]}
CFG = SimpleNamespace(
    resolution=16, precision="float32", seconds=0.01, unet=TINY, matmul=64, widths=[4], batches=[2, 1], modes=["eager"],
    train=SimpleNamespace(width=4, batch=4, precisions=["float32"]), steps=5,
)  # fmt: skip
HEAD = {"device": "a card", "torch": "2", "cuda": "13", "date": "2026-01-02", "size": "small", "resolution": 16}


def took(seconds: float) -> Measurement:
    return Measurement(1, [seconds] * 3, TaskSpec("f()", "", ""))


@pytest.fixture(scope="module")
def rows() -> list[benchmark.Row]:
    found = benchmark.measure(benchmark.parts_of(CFG, PROCESS, CPU), lambda done, total: None, bool)
    return json.loads(json.dumps(found, allow_nan=False))


def test_a_complete_run(rows: list[benchmark.Row]) -> None:
    ours = [(r["what"], r["width"], r["batch"]) for r in rows if not r["what"].endswith("_diffusers")]
    networks = [("forward", 4, 2), ("forward", 4, 1), ("train", 4, 4)]
    assert ours == [("matmul", None, None), *networks, *[("sampler", None, 2)] * 4]
    assert all(r["ms"] > 0 for r in rows)
    flops = flops_per_evaluation(denoisers(4, 16, TINY, CPU)[""], (3, 16, 16))
    for r in [r for r in rows if r["what"] in ("forward", "train")]:
        assert r["images_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms"])
        cost = flops if r["what"] == "forward" else 3 * flops
        assert r["tflops"] == pytest.approx(cost * r["images_per_s"] * 1e-12)
    assert rows[0]["tflops"] == pytest.approx(2 * 64**3 / rows[0]["ms"] * 1e-9) and rows[0]["fraction_of_matmul"] == 1


def test_failed_parts_leave_a_reason_and_rows_are_saved_after_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[benchmark.Row]:
        yield row("forward", "float32 bad", took(0.5))
        raise RuntimeError("out of memory\nmore")

    monkeypatch.delattr(torch, "compile")  # an eager network is not reported as compiled
    saved: list[list[benchmark.Row]] = []
    todo = {"bad": broken, "forward w4 compiled": lambda: benchmark.forward(CFG, CPU, 4, "compiled"), "never": broken}
    with pytest.raises(Interrupted):
        benchmark.measure(todo, Mock(side_effect=[None, None, Interrupted("asked")]), saved.append)
    assert [len(rows) for rows in saved] == [2, 3] and [r["ms"] for r in saved[-1]] == [500, None, None]
    assert saved[-1][1]["mode"] == "bad: out of memory" and "compilation failed" in saved[-1][2]["mode"]


@pytest.mark.parametrize(("width", "unet"), [(8, REFERENCE), (48, {**TINY, "attention": [16]})])
def test_diffusers_network_has_the_same_flops_and_parameters(unet: dict[str, Any], width: int) -> None:
    pytest.importorskip("diffusers")
    ours, theirs = denoisers(width, 32, unet, CPU).values()
    assert flops_per_evaluation(theirs, (3, 32, 32)) == pytest.approx(flops_per_evaluation(ours, (3, 32, 32)), rel=0.01)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert all(p.any() for p in (*ours.parameters(), *theirs.parameters()) if p.ndim > 1)


def test_fractions_and_ratios_take_equal_precisions_and_shapes() -> None:
    rows = [row("matmul", "float32", took(1e-3), flops=1e9), row("matmul", "bf16", took(1e-3), flops=4e9)]
    rows += [row("train", "autocast", took(1e-3), batch=1, flops=1e9), row("sampler", "ddpm", took(1.0))]
    rows += [row("train_diffusers", "autocast", took(3e-3), batch=1), row("train", "bf16", batch=1)]
    found = benchmark.compared(rows)
    assert [r["fraction_of_matmul"] for r in found] == [1, 1, 0.25, None, None, None]
    assert [r["ratio_to_diffusers"] for r in found] == [None, None, pytest.approx(3), None, None, None]


def test_the_table(rows: list[benchmark.Row]) -> None:
    text = benchmark.report({**HEAD, "timing": "median", "rows": rows})
    assert text.startswith("a card, torch 2, CUDA 13, 2026-01-02, size small (16x16 images); median.\n\n| what |")
    assert "_diffusers" not in text and re.findall(r"\| forward \| 4 \| (\d+) ", text) == ["2"]
    peak, failed = row("matmul", "bf16", took(1.5e-3), flops=2.0 * 8192**3), row("forward", "f", width=8)
    lines = benchmark.report({**HEAD, "timing": "", "rows": [peak, failed]}).splitlines()
    assert lines[2] == "| what | width | mode | ms | IQR | TFLOP/s |"
    assert lines[4:] == ["| matmul |  | bf16 | 1.5 | 0.0% | 733 |", "| forward | 8 | f |  |  |  |"]
