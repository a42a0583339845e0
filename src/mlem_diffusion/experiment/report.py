"""One self-contained HTML page per experiment, from the artefacts in its results folder."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from ..comparison import speedup
from ..comparison.settings import describe, for_figures, read_table
from ..diffusion.step_rules import DYNAMICS_NAMES
from ..errors import UserError
from ..files import Damaged, expect_content, read_json
from ..gamma import measurement
from ..multilevel import ablation, diagnostics
from ..statistics import frontier

_AGAIN = "remove it and run its stage again"
_STAGES = {"gamma.json": "measure-gamma", "plans.json": "optimise", "compare.csv": "sample-compare"}


@dataclass
class Section:
    """A part of the page: a text, pictures (patterns of PNGs in the results folder), and tables."""

    title: str
    text: str = ""
    pictures: tuple[str, ...] = ()
    tables: dict[str, str] = field(default_factory=dict)  # heading -> HTML


def render(folder: Path, title: str) -> str:
    """The page of a results folder: images and styles are inline, there are no scripts, and nothing is loaded.
    Raises UserError if the folder holds no results, and Damaged (one sentence) for a file that cannot be read."""
    sections = []
    for name, make in _SECTIONS.items():
        path = folder / name
        if path.is_file():
            with expect_content(path, _AGAIN):
                sections.append(make(read_table(path) if path.suffix == ".csv" else read_json(path, _AGAIN)))
    last = ("samples.png", "grids/*.png", "training.png", "training/*.png")
    sections.append(Section("Samples and training", pictures=last))
    pictures = {}
    for s in sections:
        paths = [path for pattern in s.pictures for path in sorted(folder.glob(pattern))]
        pictures[s.title] = [(path.stem, _png(path)) for path in paths]
    if len(sections) == 1 and not any(pictures.values()):
        raise UserError(f"{folder} holds no results yet: run make train-levels EXPERIMENT={folder.name} first.")
    missing = {name: target for name, target in _STAGES.items() if not (folder / name).is_file()}
    warnings = [f"{name} is missing: run make {target} EXPERIMENT={folder.name}." for name, target in missing.items()]
    config = folder / "config.yaml"
    facts = {"title": title, "name": folder.name, "sections": sections, "pictures": pictures, "warnings": warnings}
    facts["config"] = config.read_text("utf-8", "replace") if config.is_file() else ""
    template = (Path(__file__).parent / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(facts)


def _png(path: Path) -> str:
    """A PNG file in base64; Damaged if its end is missing."""
    content = path.read_bytes()
    if not content.endswith(b"IEND\xaeB`\x82"):
        raise Damaged(path, f"{path} is no complete PNG: {_AGAIN}.")
    return base64.b64encode(content).decode("ascii")


def _table(rows: Any, columns: list[str] | None = None) -> str:
    frame = pd.DataFrame(rows, columns=columns)
    with pd.option_context("display.max_colwidth", None):
        return frame.to_html(index=False, border=0, na_rep="–", float_format="{:.3g}".format)


def _speedups(content: dict[str, Any]) -> Section:
    text = "A window: the baselines cost at least so many times what the method does, at every error in a range\n"
    text += "of a factor of two or more in rms error (one-sided 95% bound over seeds and timings).\n"
    text += "A speed-up is established if this is above 1. A dash: the curve spans less than a factor of two."
    return Section("Speed-ups", text, tables={"Speed-ups at equal error": _table(speedup.table(content))})


def _comparison(frame: pd.DataFrame) -> Section:
    rows, tables = for_figures(frame), {}
    columns = ["setting", "gflops_realised", "seconds", "error", "error_se", "distance"]
    groups: Any = rows[rows.trusted].groupby(["protocol", "dynamics"])
    for (protocol, dynamics), own in groups:
        best = [{"setting": describe(r), **r} for r in frontier(own.to_dict("records"), "gflops_realised", "error")]
        tables[f"Frontier of error against FLOPs, {DYNAMICS_NAMES[dynamics]}, {protocol}"] = _table(best, columns)
    text = "Errors are mean squared errors to the reference, images in [−1, 1]; costs are per image. "
    text += f"In {(~rows.trusted).sum()} settings the top level fired too rarely: they are on no frontier."
    return Section("Comparison", text, ("paper.png", "compare.png"), {**tables, "All settings": _table(frame)})


def _diagnostics(content: dict[str, Any]) -> Section:
    parts = [diagnostics.table(content[name]) for name in DYNAMICS_NAMES if name in content]
    return Section("Diagnostics and gains", "\n\n".join(parts), ("diagnostics-*.png", "gains.png"))


_SECTIONS = {
    "speedup.json": _speedups,
    "gamma.json": lambda content: Section("Scaling exponent γ", measurement.summary(content), ("gamma*.png",)),
    "ablation.json": lambda content: Section("Levels and ablation", ablation.table(content), ("ablation.png",)),
    "diagnostics.json": _diagnostics,
    "compare.csv": _comparison,
}
