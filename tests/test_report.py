from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlem_diffusion.comparison.table import COLUMNS, write_rows
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.report import write_report
from mlem_diffusion.figures.image_grid import save_grid
from mlem_diffusion.files import sha256_of, write_json

PIXELS = np.arange(4 * 3 * 8 * 8, dtype=np.uint8).reshape(4, 3, 8, 8)
EMPTY_ENTRY = {"max": None, "lower95": None, "at": None, "baseline": None, "ours": None, "curve": []}


def make_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "dynamics": "sde",
        "step_rule": "em",
        "estimator": "single",
        "probabilities": "",
        "coins": "",
        "levels": "w8",
    }
    row |= {
        "steps": 16,
        "seed": 0,
        "error": 0.02,
        "error_se": 0.001,
        "distance": 7.5,
        "distance_name": "Frechet",
    }
    row |= {
        "distance_floor": 1.25,
        "num_samples": 64,
        "network_calls": 16.0,
        "gflops_expected": 3.2,
        "gflops_realised": 3.2,
    }
    return row | {"seconds": 0.05} | changes


def make_entry(best: float, lower: float | None) -> dict[str, Any]:
    settings = {
        "baseline": make_row(),
        "ours": make_row(estimator="ml_em", coins="independent", c=0.5, levels="w4+w8"),
    }
    curve = [{"at": 0.02, "speedup": best, "lower95": lower}, {"at": 0.01, "speedup": None, "lower95": None}]
    return {"max": best, "lower95": lower, "at": 0.02, **settings, "curve": curve}


GAMMA = {
    "estimates": {
        "loss_fit": {"gamma": None, "interval": [0.8, None]},
        "differences": {"gamma": 2.512, "interval": [2.21, 3.04]},
        "to_largest": {"gamma": 2.7, "interval": [2.3, 3.3]},
    },
    "htmc": "yes",
    "htmc_reason": "Both lie above 2.",
    "levels": [{"width": 4, "gflop": 0.0123, "images": 50000, "loss": 0.0812}],
    "per_noise_level": [{"logsnr": -3.0, "estimates": {"differences": {"gamma": 2.0, "interval": [1.0, None]}}}],
    "training_lengths": [{"images": 25000, "estimates": {"differences": {"gamma": 3.1, "interval": [2.0, 4.0]}}}],
    "warnings": ["w4 & w8 are <close>."],
}
SPEEDUP = {
    "sde": {
        "paper": {
            "error": {"flops": make_entry(1.84, 1.42), "seconds": make_entry(0.5, 0.4)},
            "distance": {"flops": make_entry(1.2, 0.9), "seconds": EMPTY_ENTRY},
        },
        "any": {"error": {"flops": make_entry(3.3, None), "seconds": None}, "distance": None},
        "left_out": 2,
    }
}
PROVENANCE = {
    "experiment": "tiny",
    "data": {"source": "faces.zip", "sha256": "3f" * 32, "count": 24000, "crop": [148, 148]},
    "commit": "0123abc",
    "device": "cpu",
    "threads": 2,
    "packages": {"torch": "2.5.1"},
    "stages": {
        "train_levels": {"seconds": 3723.0, "finished": "2026-01-02", "fingerprint": "5e" * 32},
        "measure_gamma": {"seconds": None},
        "sample_compare": {
            "seconds": 5.0,
            "finished": "2026-01-03",
            "commit": "4567def",
            "device": "a large GPU",
            "fingerprint": "5e" * 32,
            "gamma_used": 2.512,
            "settings": 41,
            "left_out": {"sde": 2},
            "workers": 3,
        },
    },
    "config": {"train": {"ema": 0.9999, "resume": True, "empty": {}}, "many": list(range(500))},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    ml_em = make_row(
        estimator="ml_em",
        probabilities="constant",
        coins="independent",
        c=0.5,
        levels="w4+w8",
        error=0.01,
    )
    write_rows(
        [make_row(), ml_em | {"top_evaluations": 500}, ml_em | {"top_evaluations": 5, "c": 0.1}],
        folder / "compare.csv",
    )
    for name, content in (
        ("gamma", GAMMA),
        ("speedup", SPEEDUP),
        ("provenance", PROVENANCE),
        ("best", {"C": 0.5}),
    ):
        write_json(folder / f"{name}.json", content)
    for name in (
        "gamma",
        "compare",
        "training",
        "grids/ode",
        "training/w16-ema-1000",
        "training/w8-ema-1000",
    ):
        save_grid(PIXELS, folder / f"{name}.png")
    (folder / "config.yaml").write_text("train:\n  note: </pre><script>alert(1)</script>\n")
    return folder


class Page(HTMLParser):
    """Text and tags of a page; knows which tags must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def make_page(folder: Path, title: str = "A tiny experiment") -> Page:
    path = write_report(folder, title=title)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_page_is_self_contained(results: Path) -> None:
    page = make_page(results)
    text = (results / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6
    for image in images:
        assert (image["src"] or "").startswith("data:image/png;base64,") and image["alt"]
        assert (image["width"], image["height"]) == ("19", "19")
    assert [a["href"] for tag, a in page.tags if tag == "a" and not (a["href"] or "").startswith("#")] == []
    assert "Not on this page" not in page.text
    assert sorted(p.name for p in results.iterdir() if "report" in p.name) == ["report.html"]


def test_levels_have_a_section_of_their_own(results: Path) -> None:
    assert "Levels: FLOPs" not in make_page(results).text
    ratio = {"sde/ddpm": {"mean": 1.234, "largest": 1.5, "errors": [1e-3, 1e-1]}}
    level = {"flops": 2e6, "flops_share": 0.125, "seconds": 3e-3, "seconds_share": 0.5, "kept_flops": True}
    first = {"name": "w4", **level, "kept_seconds": False, "cost_ratio_flops": ratio, "cost_ratio_seconds": ratio}
    last = {"name": "w16", **level, "kept_seconds": True, "cost_ratio_flops": None, "cost_ratio_seconds": None}
    content = {
        "levels": [first, last], "kept": {"flops": ["w4", "w16"], "seconds": ["w16"]},
        "removed": {"flops": [], "seconds": [{"name": "w4", "cost_ratio": ratio}]},
        "tolerance": {"mean": 0.02, "largest": 0.1}, "batch": 96, "device": "a <large> GPU", "threads": 1,
    }  # fmt: skip
    write_json(results / "ablation.json", content)
    save_grid(PIXELS, results / "ablation.png")
    page = make_page(results)
    assert "Levels: FLOPs, seconds and ablation" in page.text and "batches of 96 on a <large> GPU" in page.text
    assert "1.234 (1.50)" in page.text and "cost ratio in seconds, sde/ddpm" in page.text
    assert "w4 + w16 earn their place." in page.text
    assert "w16 earns its place; removed one by one, the lowest cost ratio first: w4." in page.text
    assert "more than 2.0% on geometric average" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 7
    (results / "ablation.json").write_text("{")
    with pytest.raises(UserError, match=r"ablation\.json is not valid JSON .*: remove it and run its stage again"):
        make_page(results)


def test_summary_text(results: Path) -> None:
    text = make_page(results).text
    assert "2.51 (2.21 to 3.04) from the differences of neighbouring levels" in text
    assert "no finite value (0.800 and above)" in text
    assert "Harder than Monte Carlo: yes . Both lie above 2." in text
    assert "in FLOPs up to 1.84 times cheaper than the cheapest baseline (95% lower bound 1.42, at MSE 0.0200)" in text
    assert "in seconds it is slower than the cheapest baseline, at 2.00 times the cost even at its best" in text
    assert "1.20 times cheaper than the cheapest baseline, but that is not established (95% lower bound 0.900" in text
    assert "in seconds no speed-up, since it never reaches a distance of the baselines' frontier" in text
    assert "3.30 times cheaper than the cheapest baseline, but that is not established (no lower bound" in text
    assert "Any multilevel: not measured." in text  # the absent distance
    assert "deterministic" not in text.lower()  # there is no ODE in this experiment


def test_tables_and_provenance(results: Path) -> None:
    text = make_page(results).text
    for words in (
        "1 h 2 min",
        "3f" * 32,
        "[148, 148]",
        "0.9999",
        "[500 values]",
        "ML-EM w4+w8, EM, 16 steps, independent coins, C = 0.5",
        "All settings (3 rows of compare.csv)",
        "In 1 of them the top level fired too rarely",
        "Distances are the Frechet of n = 64 images to the training images; "
        "for as many real images the distance is 1.25",
        "w4 & w8 are <close>.",
    ):
        assert words in text
    assert text.index("w8-ema-1000") < text.index("w16-ema-1000")  # natural order


def test_stages_list_commit_device_and_further_facts(results: Path) -> None:
    text = make_page(results).text
    assert "stage time finished commit device further" in text
    assert "train levels 1 h 2 min 2026-01-02 – – –" in text
    assert (
        "sample compare 5.00 s 2026-01-03 4567def a large GPU gamma used 2.51, settings 41, left out.sde 2, workers 3"
        in text
    )
    assert "5e5e" not in text and "fingerprint" not in text


def test_an_unknown_standard_error_is_an_empty_cell(results: Path) -> None:
    write_rows(
        [make_row(error_se=None), make_row(steps=32, gflops_realised=6.4, seconds=0.1, error=0.01)],
        results / "compare.csv",
    )
    make_page(results)
    html = (results / "report.html").read_text(encoding="utf-8")
    assert html.count('<td class="num">0.0200</td><td class="num"></td>') == 3  # on two frontiers, and among all
    assert '<td class="num">0.00200</td>' in html and html.count('<td class="num">0.00100</td>') == 1


def test_names_are_escaped(results: Path) -> None:
    evil = "<script>alert('x')</script>"
    for name in ("provenance", "gamma"):
        content = json.loads((results / f"{name}.json").read_text())
        content |= {"experiment": evil, "htmc_reason": evil, "warnings": [evil], evil: {evil: evil}}
        write_json(results / f"{name}.json", content)
    write_rows([make_row(levels=evil, distance_name='"><img src=x>')], results / "compare.csv")
    (results / "grids" / 'a"onload="x.png').write_bytes((results / "gamma.png").read_bytes())
    page = make_page(results, title=evil)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all((a["src"] or "").startswith("data:") and "onload" not in a for tag, a in page.tags if tag == "img")
    assert page.text.count(evil) >= 6


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("gamma.json", "measure-gamma"),
        ("speedup.json", "sample-compare"),
        ("compare.csv", "sample-compare"),
        ("compare.png", "sample-compare"),
        ("training.png", "train-levels"),
        ("provenance.json", "train-levels"),
    ],
)
def test_missing_artefacts_are_reported(results: Path, name: str, stage: str) -> None:
    (results / name).unlink()
    assert f"{name} is missing: run make {stage} EXPERIMENT=tiny." in make_page(results).text


@pytest.mark.parametrize(
    "keep",
    ["gamma.json", "speedup.json", "compare.csv", "provenance.json", "compare.png", "config.yaml"],
)
def test_one_artefact_is_enough(results: Path, keep: str) -> None:
    for path in list(results.rglob("*")):
        if path.is_file() and path.name != keep:
            path.unlink()
    assert "is missing" in make_page(results).text


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results yet"):
        write_report(tmp_path, title="x")
    with pytest.raises(UserError, match="no results yet"):
        write_report(tmp_path / "absent", title="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gamma.json", b'{"estimates": ', "is not valid JSON"),
        ("gamma.json", b'{"estimates": {}}', "does not carry its checksum"),
        ("speedup.json", b"[1, 2]", "does not contain a JSON object"),
        ("provenance.json", b"\xff\xfe\x00", "is not valid JSON"),
        ("compare.csv", b"a,b\n1,2\n", "cannot be read"),
        ("compare.png", b"", "is not a readable PNG"),
    ],
)
def test_damaged_artefacts_are_refused(results: Path, name: str, content: bytes, what: str) -> None:
    (results / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        make_page(results)
    text = str(error.value)
    assert f"{results / name} {what}" in text and "run its stage again" in text and "\n" not in text


def test_a_picture_with_one_wrong_bit_is_refused(results: Path) -> None:
    content = bytearray((results / "gamma.png").read_bytes())
    content[len(content) // 2] ^= 1
    (results / "gamma.png").write_bytes(content)
    with pytest.raises(UserError, match=r"gamma\.png is not a readable PNG"):
        make_page(results)


def test_files_that_no_stage_wrote_are_refused(results: Path) -> None:
    table = results / "compare.csv"
    stages = {"sample_compare": {"seconds": 1.0, "outputs": {"compare.csv": sha256_of(table)}}}
    write_json(results / "provenance.json", {**PROVENANCE, "stages": stages})
    make_page(results)
    table.write_text(table.read_text().replace("0.02", "0.03"))
    with pytest.raises(UserError, match=r"compare\.csv is not the file that sample-compare wrote: run make"):
        make_page(results)


def test_gamma_of_other_levels_is_refused(results: Path) -> None:
    stages = {"sample_compare": {"seconds": 1.0, "made_with": {"levels": {"w4": "a"}, "data": "d"}}}
    write_json(results / "provenance.json", {**PROVENANCE, "stages": stages})
    write_json(results / "gamma.json", {**GAMMA, "made_with": {"levels": {"w4": "b"}, "data": "d"}})
    with pytest.raises(UserError, match="were made with different levels"):
        make_page(results)


@pytest.mark.parametrize("empty", [None, {}, EMPTY_ENTRY])
def test_null_speed_ups(results: Path, empty: Any) -> None:
    speedup = copy.deepcopy(SPEEDUP)
    for method in ("paper", "any"):
        speedup["sde"][method] = {"error": {"flops": empty, "seconds": empty}}  # type: ignore[index]
    write_json(results / "speedup.json", speedup)
    text = make_page(results).text
    assert "Paper's ML-EM: no speed-up, since it never reaches an error of the baselines' frontier." in text
    write_json(results / "speedup.json", {"sde": {"paper": None, "any": None}, "ode": None})
    assert "Paper's ML-EM: not measured." in make_page(results).text


def test_odd_but_valid_gamma(results: Path) -> None:
    odd = {
        "estimates": {"differences": {"gamma": 1.5, "interval": None}},
        "htmc": "no",
        "levels": None,
        "warnings": None,
    }
    write_json(results / "gamma.json", odd)
    assert "Harder than Monte Carlo: no" in make_page(results).text
    write_json(results / "gamma.json", {"estimates": None, "htmc": None, "loss": None})
    assert "Harder than Monte Carlo: undetermined" in make_page(results).text


def test_precision_is_shown_if_it_was_checked(results: Path) -> None:
    content = {
        "logsnr": [-1.0, 1.0],
        "levels": [{"level": "w4", "rms_rounding": [0.001, 0.003], "rms_difference": [0.1, 0.1], "worst_ratio": 0.031}],
        "samples": 48,
        "settings": [
            {"dynamics": "sde", "setting": "DDPM, w4, 8 steps", "gflops": 1.0, "error_float32": 0.02,
             "error_bf16": 0.0202, "change": 0.0002, "change_se": 0.0001}
        ],
        "speedup": {
            p: {"sde": {"paper": {"max": None, "lower95": None}, "any": {"max": 2.5, "lower95": 2.1}}}
            for p in ("float32", "bf16")
        },
    }  # fmt: skip
    assert "Precision: bf16" not in make_page(results).text
    write_json(results / "precision.json", content)
    text = make_page(results).text
    for part in (
        "Precision: bf16 against float32",
        "0.031",
        "+1.00% ± 1.00%",
        "48 samples",
        "2.50 (≥ 2.10)",
        "not reached",
    ):
        assert part in text, part
