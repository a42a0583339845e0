"""The benchmark: its rows, its comparisons, resuming after a stop, and a complete run in miniature.

`python tests/test_benchmark.py` prints the README's section from the committed results.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlem_diffusion.benchmark import networks, plan, table
from mlem_diffusion.benchmark.forward import Bench, attempt, forward, matmul
from mlem_diffusion.benchmark.record import (
    COLUMNS,
    Cached,
    Found,
    Results,
    add_fractions,
    cheapest_to_top,
    file_name,
    row,
)
from mlem_diffusion.benchmark.timing import measure
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import UserError
from mlem_diffusion.files import read_json
from mlem_diffusion.models.flops import flops_per_evaluation

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
REFERENCE = {"multipliers": [1, 2, 2, 2], "blocks": 2, "attention": [16], "dropout": 0.0}
TINY = {"multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
HEAD = {
    "device": "a card", "torch": "2", "cuda": None, "date": "2026-01-02 03:04 UTC", "commit": "abc", "size": "small",
    "sizes": {}, "resolution": 16, "timing": "wall clock",
}  # fmt: skip
SIZE: dict[str, Any] = {
    "resolution": 16, "precision": "float32", "repeats": 1, "minutes": None, "reference": TINY, "levels": [4, 8],
    "matmul": {"side": 32, "precisions": ["float32", "bf16"], "seconds_about": 1},
    "forward": {"widths": [4], "batches": [2, 1], "modes": {"eager": {"seconds_about": 1}}, "seconds_about": 1},
    "level": {"mode": "eager", "batches": [2], "seconds_about": 1},
    "noise": {"steps": 3, "batches": [2], "c": 4, "seconds_about": 1},
    "sampler": {"mode": "eager", "steps": 3, "batches": [2], "c": 4, "repeats": 1, "seconds_about": 1},
    "train": {"width": 4, "batch": 4, "seconds": 0.1, "precisions": ["float32", "bf16"], "compile": "off", "images": 16,
              "seconds_about": 1},
    "first_step": None,
}  # fmt: skip
PROCESS = Process(LinearSchedule(), base_steps=20)


def results_in(folder: Path, parts: list[plan.Part], **head: Any) -> Results:
    return Results(folder / "card.json", {**HEAD, **head}, [p.name for p in parts])


def part(name: str, measure: Any, **changes: Any) -> plan.Part:
    options = {"group": "level", "seconds": 1.0, "settings": "s", "empty": (row("level", "float32 eager", width=8),)}
    return plan.Part(name=name, measure=measure, **{**options, **changes})


def run(parts: list[plan.Part], results: Results, **options: Any) -> bool:
    return plan.run_parts(parts, results, **{"device": CPU, "code": "c", "commit": "abc", **options})


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document that a complete run in miniature wrote."""
    parts = plan.parts_of(SIZE, PROCESS, TINY, [4, 8, 12], CPU)
    results = results_in(tmp_path_factory.mktemp("benchmark"), parts)
    assert run(parts, results)
    return read_json(results.path, "")


def test_every_row_has_exactly_the_columns(document: dict[str, Any]) -> None:
    assert all(tuple(r) == COLUMNS for r in document["rows"])
    for r in document["rows"]:
        assert isinstance(r["what"], str) and isinstance(r["mode"], str)
        for column in set(COLUMNS) - {"what", "mode"}:
            assert r[column] is None or r[column] > 0, r
    assert sum(p["rows"] for p in document["parts"]) == len(document["rows"])


def test_a_complete_run_measures_every_kind(document: dict[str, Any]) -> None:
    rows = document["rows"]
    ours = {r["what"] for r in rows if r["ms"] is not None} - {"forward_diffusers", "train_diffusers"}
    assert ours == {"matmul", "forward", "level", "noise", "sampler", "sampler_loop", "sampler_networks", "train"}
    assert [(r["width"], r["batch"]) for r in rows if r["what"] == "forward"] == [(4, 2), (4, 1)]
    assert [r["width"] for r in rows if r["what"] == "level"] == [4, 8]
    assert {r["mode"] for r in rows if r["what"] == "train"} == {"float32", "bf16"}
    ours, theirs = ([r["ms"] for r in rows if r["what"] == what] for what in ("train", "train_diffusers"))
    if all(theirs):  # diffusers is installed
        found = [r["ratio_to_diffusers"] for r in rows if r["what"] == "train"]
        assert found == pytest.approx([b / a for a, b in zip(ours, theirs, strict=True)])
    assert len([r for r in rows if r["what"] == "sampler"]) == 3
    for r in rows:
        if r["batch"] and r["ms"]:
            assert r["images_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms"])


def test_flops_and_the_yardstick(document: dict[str, Any]) -> None:
    rows = document["rows"]
    flops = flops_per_evaluation(networks.denoiser_of("ours", 8, 16, TINY, CPU), 16)
    wide = next(r for r in rows if r["what"] == "level" and r["width"] == 8)
    assert wide["tflops"] == pytest.approx(2 * flops / wide["ms"] * 1e-9)
    peaks = {r["mode"].split()[0]: r["tflops"] for r in rows if r["what"] == "matmul"}
    assert wide["fraction_of_matmul"] == pytest.approx(wide["tflops"] / peaks["float32"])
    trained = next(r for r in rows if r["what"] == "train" and r["mode"] == "bf16")
    narrow = flops_per_evaluation(networks.denoiser_of("ours", 4, 16, TINY, CPU), 16)
    assert trained["tflops"] == pytest.approx(3 * narrow * trained["images_per_s"] * 1e-12)
    assert trained["fraction_of_matmul"] == pytest.approx(trained["tflops"] / peaks["bf16"])


def test_facts_derived_from_the_table(document: dict[str, Any]) -> None:
    facts, rows = document["facts"], document["rows"]
    (entry,) = facts["cheapest_to_top"]
    low, high = (r for r in rows if r["what"] == "level")
    assert entry["seconds_ratio"] == pytest.approx(high["ms"] / low["ms"])
    assert entry["flops_ratio"] == pytest.approx(high["ms"] * high["tflops"] / (low["ms"] * low["tflops"]))
    assert len(facts["sampler_overhead"]) == 3
    whole, networks_alone = (next(r["ms"] for r in rows if r["what"] == w) for w in ("sampler", "sampler_networks"))
    assert facts["sampler_overhead"][0]["overhead"] == pytest.approx(whole / networks_alone - 1)
    assert facts["sampler_overhead"][0]["calls"] == 3  # DDPM: one call for each step


@pytest.mark.parametrize("unet", [REFERENCE, TINY, {**TINY, "attention": [16]}])
@pytest.mark.parametrize("width", [8, 48])
def test_diffusers_network_has_the_same_flops_and_parameters(unet: dict[str, Any], width: int) -> None:
    pytest.importorskip("diffusers")
    ours, theirs = (networks.denoiser_of(whose, width, 32, unet, CPU) for whose in ("ours", "diffusers"))
    assert flops_per_evaluation(theirs, 32) == pytest.approx(flops_per_evaluation(ours, 32), rel=0.01)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01 if width == 48 else 0.02)


def test_diffusers_network_takes_one_noise_level_for_all() -> None:
    pytest.importorskip("diffusers")
    net = networks.denoiser_of("diffusers", 4, 16, TINY, CPU)
    x, logsnr = networks.inputs(3, 16, CPU)
    with torch.no_grad():
        assert torch.allclose(net(x, logsnr), net(x, logsnr[:1]), atol=1e-5)
        assert not torch.allclose(net(x, logsnr), net(x, logsnr + 1), atol=1e-3)


def test_weights_are_random_everywhere() -> None:
    net = networks.denoiser_of("ours", 4, 16, TINY, CPU)
    assert all(p.any() for p in net.parameters() if p.ndim > 1)


def test_comparison_with_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    bench = Bench(CPU, 16, "float32", 1)
    ours, theirs = forward(bench, 4, [2], "eager", TINY).rows
    assert ours["ratio_to_diffusers"] == pytest.approx(theirs["ms"] / ours["ms"])
    monkeypatch.setattr("mlem_diffusion.benchmark.forward.has_diffusers", lambda: False)
    found = forward(bench, 4, [2], "eager", TINY)
    assert found.rows[0]["ms"] and found.rows[0]["ratio_to_diffusers"] is None and found.rows[1]["ms"] is None
    assert "not installed" in found.facts["notes"][0]["text"]


def test_a_failed_compilation_gives_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    found = forward(Bench(CPU, 16, "float32", 1), 4, [2], "compiled", TINY)
    assert all(r["ms"] is None and r["mode"] == "float32 compiled" for r in found.rows)
    assert any("no compiler here" in note["text"] for note in found.facts["notes"])


def test_a_failing_function_does_not_stop_the_others() -> None:
    found = Found()

    def fail() -> None:
        raise RuntimeError("out of memory\nmore")

    times = attempt(found, {"bad": fail, "good": lambda: None}, Bench(CPU, 8, "float32", 1))
    assert times["bad"] is None and times["good"] is not None
    assert [n["text"] for n in found.facts["notes"]] == ["bad: out of memory."]


def test_a_failing_part_leaves_an_empty_row_and_the_rest_continues(tmp_path: Path) -> None:
    def fail() -> Found:
        raise RuntimeError("it broke")

    parts = [part("a", fail), part("b", lambda: Found([row("level", "float32 eager", 2.0, width=8, batch=4)]))]
    results = results_in(tmp_path, parts)
    assert run(parts, results)
    written = read_json(results.path, "")
    assert [r["ms"] for r in written["rows"]] == [None, 2.0]
    assert written["facts"]["notes"] == [{"part": "a", "text": "a: it broke."}]


def test_a_rerun_continues_where_the_last_one_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str) -> Any:
        def measure() -> Found:
            calls.append(name)
            return Found([row("level", "float32 eager", float(len(calls)), width=8)], {"seen": [{"by": name}]})

        return measure

    parts = [part(name, counted(name)) for name in "abc"]
    first = results_in(tmp_path, parts)
    assert not run(parts, first, should_stop=lambda: len(calls) == 2)
    assert calls == ["a", "b"]
    again = results_in(tmp_path, parts)
    again.load(dict.fromkeys("abc", "s"), "c")
    assert run(parts, again) and calls == ["a", "b", "c"]
    assert again.document() == read_json(again.path, "")
    assert [r["ms"] for r in again.document()["rows"]] == [1, 2, 3]
    assert [e["by"] for e in again.document()["facts"]["seen"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("head", "settings", "code", "any_code", "reused"),
    [
        ({}, "s", "c", False, ["a"]),
        ({}, "other", "c", False, []),
        ({}, "s", "changed", False, []),
        ({}, "s", "changed", True, ["a"]),
        ({"device": "another card"}, "s", "c", True, []),
        ({"torch": "3"}, "s", "c", True, []),
    ],
)
def test_only_rows_of_equal_measurements_are_reused(
    tmp_path: Path, head: dict, settings: str, code: str, any_code: bool, reused: list[str]
) -> None:
    parts = [part("a", Found)]
    results_in(tmp_path, parts).put("a", Cached("s", "c", "abc", 1.0, Found([row("level", "float32 eager", 2.0)])))
    again = results_in(tmp_path, parts, **head)
    again.load({"a": settings}, code, any_code)
    assert list(again.cached) == reused


def test_a_broken_file_is_measured_again(tmp_path: Path) -> None:
    again = results_in(tmp_path, [part("a", Found)])
    for text in ("{", "[]", "{}", json.dumps(HEAD)):
        again.path.write_text(text)
        again.load({"a": "s"}, "c")
        assert not again.cached


def test_time_limits(tmp_path: Path) -> None:
    def slow() -> Found:
        time.sleep(5)
        return Found([row("level", "", 1.0)])

    parts = [part("a", Found), part("b", slow, seconds=100.0), part("c", slow, optional=True, seconds=0.1)]
    results = results_in(tmp_path, parts)
    assert not run(parts, results, seconds_left=lambda: 50.0)  # b would not fit into this call
    assert list(results.cached) == ["a"]
    assert run([parts[0], parts[2]], results, spare=lambda: 0.05) and results.cached["c"].found.skipped
    assert run([parts[2]], results, spare=lambda: 0.2)  # it is tried, and stopped
    assert results.cached["c"].seconds < 4 and results.cached["c"].found.rows[0]["ms"] is None
    assert not results.finished("c") and "not finished after" in results.document()["facts"]["notes"][0]["text"]


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="typo is unknown"):
        plan.parts_of({**SIZE, "typo": 1}, PROCESS, TINY, [4], CPU)
    with pytest.raises(UserError, match="mode 'quick'"):
        networks.fast(networks.denoiser_of("ours", 4, 16, TINY, CPU), "float32", "quick", "w4")


def test_groups_are_chosen_by_name() -> None:
    parts = plan.parts_of(SIZE, PROCESS, TINY, [4], CPU)
    assert plan.chosen(parts, []) == parts
    assert [p.name for p in plan.chosen(parts, ["level", "matmul"])] == ["matmul", "level w4", "level w8"]
    with pytest.raises(UserError, match="speed is not a group"):
        plan.chosen(parts, ["speed"])


def test_the_expected_duration_is_not_a_setting() -> None:
    slower = {**SIZE, "level": {**SIZE["level"], "seconds_about": 9}, "sampler": {**SIZE["sampler"], "steps": 4}}
    before, after = (
        {p.name: p.settings for p in plan.parts_of(size, PROCESS, TINY, [4], CPU)} for size in (SIZE, slower)
    )
    assert {name for name in before if before[name] != after[name]} == {"sampler batch 2"}


def test_the_table_leaves_missing_measurements_blank() -> None:
    rows = [row("level", "bf16 compiled", width=8, batch=16), row("matmul", "bf16 8192-cube", 1.5, flops=2.0 * 8192**3)]
    lines = table.render(rows).splitlines()
    assert lines[2] == "| level | 8 | 16 | bf16 compiled |  |  |  |  |  |"
    assert lines[3] == "| matmul |  |  | bf16 8192-cube | 1.5 | 733 |  |  |  |"


def test_the_summary_keeps_the_largest_batch(document: dict[str, Any]) -> None:
    text = table.summary(document)
    assert "forward_diffusers" not in text and "train_diffusers" not in text
    assert re.findall(r"\| forward \| 4 \| (\d+) ", text) == ["2"]
    assert "| matmul |" in text and text.startswith("a card, torch 2, 2026-01-02")
    assert table.report(document).count("| forward |") == 2


def test_fractions_take_the_product_of_the_same_precision() -> None:
    rows = [
        row("matmul", "float32 x", 1.0, flops=1e9),
        row("matmul", "bf16 x", 1.0, flops=4e9),
        row("train", "autocast", 1.0, batch=1, flops=1e9),
        row("level", "float32 eager", 1.0, batch=1, flops=1e9),
        row("noise", "path", 1.0, batch=1),
    ]
    add_fractions(rows)
    assert [r["fraction_of_matmul"] for r in rows] == [1, 1, 0.25, 1, None]
    assert cheapest_to_top(rows) == []


def test_timing_alternates_functions() -> None:
    order: list[str] = []

    def work(name: str) -> None:
        order.append(name)
        time.sleep(0.04)

    times = measure([lambda: work("a"), lambda: work("b")], CPU, 2)
    assert order == ["a", "b"] + ["a", "b"] * 2 and min(times) > 39


def test_matmul_counts_two_flops_per_multiply_add() -> None:
    (r,) = matmul(Bench(CPU, 8, "float32", 1), 64, ["float32"]).rows
    assert r["tflops"] == pytest.approx(2 * 64**3 / r["ms"] * 1e-9) and np.isfinite(r["ms"])


def test_file_names_are_safe() -> None:
    assert file_name("AMD EPYC 9B14 (2 threads)/x") == "AMD-EPYC-9B14-2-threads-x.json"
    assert file_name("NVIDIA H100", "small") == "NVIDIA-H100-small.json"


def script(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "experiment=smoke", f"paths.results={folder}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *overrides], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_the_script_measures_prints_and_schedules_the_rest(tmp_path: Path) -> None:
    done = script(tmp_path, "only=[matmul]")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert written["size"] == "small" and [r["what"] for r in written["rows"]] == ["matmul"] * 2
    assert table.render(written["rows"]) in done.stdout
    planned = script(tmp_path, "dry_run=true", "only=[matmul,train]").stdout
    assert re.search(r"^matmul +measured before$", planned, flags=re.MULTILINE)
    assert re.search(r"^train float32 ours +about \d+ s$", planned, flags=re.MULTILINE)
    assert json.loads(path.read_text()) == written
