"""One self-contained HTML page per experiment, from the artefacts in its results folder."""

import base64
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from ..comparison.table import describe, for_figures, read
from ..diffusion.step_rules import DYNAMICS_NAMES
from ..errors import UserError
from ..files import Damaged, expect_content, read_json
from ..statistics import frontier

_AGAIN = "remove it and run its stage again"
_STAGES = {"gamma.json": "measure-gamma", "plans.json": "optimise", "compare.csv": "sample-compare"}
_ESTIMATES = {"loss_fit": "loss", "differences": "neighbouring levels", "to_largest": "the largest level"}
_METHODS = {"paper": "paper's ML-EM", "any": "any multilevel"}
_UNITS = {"flops": "FLOPs", "seconds": "seconds"}


@dataclass
class Section:
    """A part of the page: a list of sentences, pictures (patterns of PNGs in the results folder), and tables."""

    title: str
    sentences: list[str] = field(default_factory=list)
    pictures: tuple[str, ...] = ()
    tables: dict[str, str] = field(default_factory=dict)  # heading -> HTML


def render(folder: Path, title: str) -> str:
    """The page of a results folder: images and styles are inline, there are no scripts, and nothing is loaded.

    Raises UserError if the folder holds no results, and Damaged (one sentence) for a file that cannot be read.
    """
    sections = []
    for name, make in _SECTIONS.items():
        path = folder / name
        if path.is_file():
            with expect_content(path, _AGAIN):
                sections.append(make(read(path) if path.suffix == ".csv" else read_json(path, _AGAIN)))
    sections.append(Section("Samples and training", pictures=("grids/*.png", "training.png", "training/*.png")))
    pictures = {section.title: _pictures(folder, section.pictures) for section in sections}
    if len(sections) == 1 and not any(pictures.values()):
        raise UserError(f"{folder} holds no results yet: run make train-levels EXPERIMENT={folder.name} first.")
    missing = {name: target for name, target in _STAGES.items() if not (folder / name).is_file()}
    warnings = [f"{name} is missing: run make {target} EXPERIMENT={folder.name}." for name, target in missing.items()]
    config = folder / "config.yaml"
    facts = {"title": title, "name": folder.name, "sections": sections, "pictures": pictures, "warnings": warnings}
    facts["config"] = config.read_text("utf-8", "replace") if config.is_file() else ""
    template = (Path(__file__).parent / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(facts)


def _pictures(folder: Path, patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    """The names of the PNGs of these patterns, and their contents as data URIs."""
    found = []
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        try:
            Image.open(path, formats=("PNG",)).verify()
        except Exception as error:  # damaged files raise almost any exception
            raise Damaged(path, f"{path} is not a readable PNG: {_AGAIN}.") from error
        found.append((path.stem, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")))
    return found


def number(value: Any) -> str:
    """Three significant digits for a float; a missing value becomes a dash, a list is joined by commas."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(number, value))
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:#.3g}".rstrip(".")
    return str(value)


def _table(rows: Any, columns: list[str] | None = None) -> str:
    with pd.option_context("display.max_colwidth", None):
        return pd.DataFrame(rows, columns=columns).map(number).to_html(index=False, border=0)


# ---- a section per file ----


def _speedups(content: dict[str, Any]) -> Section:
    rows = []
    for dynamics, method, measure, unit in product(DYNAMICS_NAMES, _METHODS, ("error", "distance"), _UNITS):
        entry = content.get(dynamics, {}).get(method, {}).get(measure, {}).get(unit)
        if entry is not None:
            row: Any = {"dynamics": dynamics, "method": _METHODS[method], "equal": measure, "counted in": _UNITS[unit]}
            row |= {"speed-up": entry["max"], "95% lower bound": entry["lower95"], "at": entry["at"]}
            for setting, words in (("baseline", "cheapest baseline"), ("ours", "ML-EM")):
                row[words] = describe({**entry[setting], "dynamics": dynamics}) if entry[setting] else None
            rows.append(row)
    text = "The cost of the cheapest baseline over that of the cheapest ML-EM setting, the largest along the frontier. "
    text += "A dash: ML-EM never reaches the frontier. It is established if the lower bound is above 1."
    return Section("Speed-ups", [text], tables={"All speed-ups": _table(rows)})


def _gamma(content: dict[str, Any]) -> Section:
    sentences = [f"Harder than Monte Carlo (γ above 2): {content['htmc']}. {content['htmc_reason']}"]
    for name, words in _ESTIMATES.items():
        gamma, (low, high) = (content["estimates"][name][key] for key in ("gamma", "interval"))
        interval = f"{number(low)} and above" if high is None else f"{number(low)} to {number(high)}"
        sentences.append(f"γ by {words}: {number(gamma)} (95% interval {interval}).")
    levels = {"Levels": _table(content["levels"], ["name", "gflop", "images", "loss"])}
    return Section("Scaling exponent γ", [*sentences, *content.get("warnings", ())], ("gamma.png",), levels)


def _ablation(content: dict[str, Any]) -> Section:
    kept = [f"Levels that pay off in {_UNITS[unit]}: {' + '.join(names)}." for unit, names in content["kept"].items()]
    return Section("Levels and ablation", kept, ("ablation.png",))


def _diagnostics(content: dict[str, Any]) -> Section:
    entries = [content[name] for name in DYNAMICS_NAMES if name in content]
    found = [f"{e['dynamics'].upper()}, {f['severity']}: {f['text']}" for e in entries for f in e["findings"]]
    return Section("Diagnostics and gains", found, ("diagnostics-*.png", "gains.png"))


def _comparison(frame: pd.DataFrame) -> Section:
    rows, tables = for_figures(frame), {}
    columns = ["setting", "gflops_realised", "seconds", "error", "error_se", "distance"]
    for dynamics, words in DYNAMICS_NAMES.items():
        own: Any = rows[(rows.dynamics == dynamics) & rows.trusted]
        best = [
            {"setting": describe(row), **row} for row in frontier(own.to_dict("records"), "gflops_realised", "error")
        ]
        tables[f"Frontier of error against FLOPs, {words}"] = _table(best, columns)
    text = "Errors are mean squared errors to the reference, images in [−1, 1]; costs are per image. "
    text += f"In {(~rows.trusted).sum()} settings the top level fired too rarely: they are on no frontier."
    return Section("Comparison", [text], ("compare.png",), {**tables, "All settings": _table(frame)})


_SECTIONS = {
    "speedup.json": _speedups,
    "gamma.json": _gamma,
    "ablation.json": _ablation,
    "diagnostics.json": _diagnostics,
    "compare.csv": _comparison,
}
