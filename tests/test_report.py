import html
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlem_diffusion.comparison.settings import Measurement
from mlem_diffusion.comparison.speedup import speedups
from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.report import render
from mlem_diffusion.figures import style
from mlem_diffusion.files import readable, write_text

DEMO = Path(__file__).parents[1] / "results" / "demo"


def text_of(page: str) -> str:
    """The words of a page, with the tags left out."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("cache", "training", "wandb"))
    one = {"step_rule": "ddim", "levels": "w4", "steps": 8, "network_calls": 8, "top_evaluations": 100, "coins": ""}
    rows = [one | {"dynamics": "ode", "estimator": kind, "gflops_realised": cost, "gflops_expected": cost}
            for kind in ("single", "quadrature") for cost in (2.0, 8.0)]  # fmt: skip
    settings = [Measurement(row, np.full(4, row["gflops_realised"] ** -2.0)) for row in rows]
    (tmp_path / "demo" / "speedup.json").write_text(json.dumps(speedups(settings)))
    return tmp_path / "demo"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_page_is_self_contained_and_complete(results: Path) -> None:
    page = render(results, "A <title>")
    images = re.findall(r'<img src="(.{22})', page)
    assert len(images) == 10 and set(images) == {"data:image/png;base64,"}
    assert not re.search(r"(src|href)=.http|url\(|@import|<script|<link", page)
    page = text_of(page)
    assert "A <title>" in page and "Warning" not in page
    gamma, ablation = (json.loads((results / f"{name}.json").read_text()) for name in ("gamma", "ablation"))
    low = gamma["estimates"]["to_largest"]["interval"][0]
    found = json.loads((results / "diagnostics.json").read_text())["sde"]["findings"]
    warning = next(f["text"] for f in found if f["severity"] == "warning")
    for words in (
        f"warning {warning}",
        "at least, in a window its rms errors largest at one point, not a headline",
        "strict ode any multilevel EM, any level FLOPs 1 0.5 to 0.125 1 (at least 1)",
        f"harder than Monte Carlo (gamma > 2): {gamma['htmc']}.",
        f"gamma (to_largest): none, 95% interval [{low:.2f}, unbounded]",
        f"Levels that pay off in flops: {' + '.join(ablation['kept']['flops'])}.",
        "quadrature gauss+",
    ):
        assert words in page, words


@pytest.mark.parametrize("keep", ["gamma.json", "speedup.json", "compare.csv", "training.png"])
def test_one_artefact_is_enough(results: Path, keep: str) -> None:
    for path in results.rglob("*"):
        if path.is_file() and path.name != keep:
            path.unlink()
    page = text_of(render(results, "x"))
    assert ("gamma.json is missing: run make measure-gamma EXPERIMENT=demo." in page) == (keep != "gamma.json")
    (results / keep).unlink()
    with pytest.raises(UserError, match="no results yet"):
        render(results, "x")


@pytest.mark.parametrize("name", ["gamma.json", "speedup.json", "compare.csv", "training.png"])
@pytest.mark.parametrize("content", [b'{"estimates": ', b"[1, 2]", b"a,b\n1,2\n", b"\x89PNG\xff"])
def test_damaged_artefacts_give_one_sentence(results: Path, name: str, content: bytes) -> None:
    (results / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        render(results, "x")
    assert "\n" not in str(error.value)


def test_titles_and_names_in_any_characters(results: Path, tmp_path: Path) -> None:
    """Bytes of names that are no UTF-8 arrive as surrogates, and so does all that the locale cannot decode."""
    title = "\u9854 \U0001f600 \u05e9 <b> $x_{ " + "long " * 99
    escaped = title.encode().decode("ascii", "surrogateescape")
    folder = results.rename(tmp_path / os.fsdecode(b"\xff"))
    change(folder / "gamma.json", htmc_reason="\ud83d")
    write_text(tmp_path / "report.html", render(folder, escaped))
    page = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert title.strip() in page and "experiment \ufffd" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        style.save(style.new_figure(3, 2, readable(escaped)), tmp_path / "figure.png")


def test_content_is_escaped(results: Path) -> None:
    evil = "<script>alert('x')</script>"
    change(results / "gamma.json", htmc_reason=evil, warnings=[evil])
    (results / "config.yaml").write_text(f"</pre>{evil}")
    table = results / "compare.csv"
    table.write_text(table.read_text().replace("w12", evil))
    page = render(results, evil)
    assert "<script" not in page and page.count(html.escape("<script>")) > 20
