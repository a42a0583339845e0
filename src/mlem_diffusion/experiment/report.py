"""One self-contained HTML page per experiment, from the artefacts in its results folder."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from ..comparison.table import describe, for_figures, read
from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULES
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
    """A part of the page; `summary` stands at the top of the page, `folded` tables are closed at first."""

    title: str
    text: str = ""
    pictures: tuple[str, ...] = ()  # patterns of PNGs in the results folder
    tables: dict[str, str] = field(default_factory=dict)  # heading -> HTML
    folded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)


def render(folder: Path, title: str) -> str:
    """The page of a results folder: images and styles are inline, there are no scripts, and nothing is loaded.

    Raises UserError if the folder holds no results, and Damaged (one sentence) for a file that cannot be read.
    """
    paths = {name: folder / name for name in _SECTIONS if (folder / name).is_file()}
    contents: Any = {name: read(p) if p.suffix == ".csv" else read_json(p, _AGAIN) for name, p in paths.items()}
    sections = []
    for name, content in contents.items():
        with expect_content(paths[name], _AGAIN):
            sections.append(_SECTIONS[name](content))
    sections.append(Section("Samples and training", pictures=("grids/*.png", "training.png", "training/*.png")))
    pictures = {section.title: _pictures(folder, section.pictures) for section in sections}
    if len(sections) == 1 and not any(pictures.values()):
        raise UserError(f"{folder} holds no results yet: run make train-levels EXPERIMENT={folder.name} first.")
    missing = [name for name in _STAGES if name not in contents]
    warnings = [f"{name} is missing: run make {_STAGES[name]} EXPERIMENT={folder.name}." for name in missing]
    with expect_content(folder / "provenance.json", _AGAIN):
        compared = contents.get("provenance.json", {}).get("stages", {}).get("sample_compare", {}).get("made_with")
        if compared and contents.get("gamma.json", {}).get("made_with", compared) != compared:
            warnings.append("gamma.json and the comparison were made with different levels: run both stages again.")
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


def _interval(interval: Any) -> str:
    low, high = interval or (None, None)
    return f"{number(low)} and above" if high is None else f"{number(low)} to {number(high)}"


def _table(rows: Any, columns: list[str] | None = None) -> str:
    with pd.option_context("display.max_colwidth", None):
        return pd.DataFrame(rows, columns=columns).map(number).to_html(index=False, border=0)


# ---- a section per file ----


def _speedups(content: dict[str, Any]) -> Section:
    keys = [(d, m, e, u) for d in DYNAMICS_NAMES for m in _METHODS for e in ("error", "distance") for u in _UNITS]
    rows, summary = [], []
    for dynamics, method, measure, unit in keys:
        entry = (((content.get(dynamics) or {}).get(method) or {}).get(measure) or {}).get(unit)
        if entry is None:
            continue
        row: Any = {"dynamics": dynamics, "method": _METHODS[method], "equal": measure, "counted in": _UNITS[unit]}
        row |= {"speed-up": entry["max"], "95% lower bound": entry["lower95"], "at": entry["at"]}
        for setting, words in (("baseline", "cheapest baseline"), ("ours", "ML-EM")):
            row[words] = describe({**entry[setting], "dynamics": dynamics}) if entry[setting] else None
        rows.append(row)
        if measure == "error":
            what = f"{dynamics.upper()}, {_METHODS[method]}, {_UNITS[unit]} at equal error"
            summary.append(f"{what}: {_verdict(entry['max'], entry['lower95'])}.")
    text = "The cost of the cheapest baseline over that of the cheapest ML-EM setting, the largest along the frontier."
    return Section("Speed-ups", text, tables={"": _table(rows)}, summary=summary)


def _verdict(best: float | None, lower: float | None) -> str:
    if best is None:
        return "never reaches the baselines' frontier"
    if best < 1:
        return f"slower than the cheapest baseline (speed-up at most {number(best)})"
    doubt = "" if lower is not None and lower >= 1 else ", not established"
    return f"up to {number(best)} times cheaper than the cheapest baseline (95% lower bound {number(lower)}{doubt})"


def _verdicts(content: dict[str, Any]) -> Section:
    def bound(found: dict[str, Any]) -> float | None:
        return max((p["lower95"] for p in found["curve"] if p["lower95"] is not None), default=None)

    rows = []
    for rule, entry in ((rule, content[rule]) for rule in STEP_RULES if rule in content):
        for name, found in entry["against_em"].items():
            row = {"rule": rule, "estimator": name, "over EM": bound(found)}
            row["over all baselines"] = bound(entry["against_all_baselines"].get(name, {"curve": []}))
            twice = [_interval(window["rms_error"]) for window in found["windows"] if window["least"] == 2]
            rows.append(row | {"2x over EM at rms errors": twice})
    text = "Largest 95% lower bounds of speed-ups at equal error, for settings that were selected on other seeds."
    return Section("Estimators", text, tables={"": _table(rows)})


def _gamma(content: dict[str, Any]) -> Section:
    summary = [f"Harder than Monte Carlo (γ above 2): {content['htmc']}. {content['htmc_reason']}"]
    for name, words in _ESTIMATES.items():
        gamma, interval = (content["estimates"][name][key] for key in ("gamma", "interval"))
        summary.append(f"γ by {words}: {number(gamma)} ({_interval(interval)}).")
    levels = {"Levels": _table(content["levels"], ["name", "gflop", "images", "loss"])}
    text = "Cost grows as error to the power −γ. Brackets: 95% intervals; a dash: no finite value."
    return Section("Scaling exponent γ", text, ("gamma.png",), levels, {}, content.get("warnings") or [], summary)


def _ablation(content: dict[str, Any]) -> Section:
    rows = []
    for level in content["levels"]:
        row = {"level": level["name"], "MFLOP": level["flops"] / 1e6, "ms per image": 1e3 * level["seconds"]}
        for unit, words in _UNITS.items():
            for rule, ratio in (level[f"cost_ratio_{unit}"] or {}).items():
                row[f"{words}, {rule}"] = f"{ratio['mean']:.3f} ({ratio['largest']:.2f})"
            row[f"kept in {words}"] = "yes" if level[f"kept_{unit}"] else "no"
        rows.append(row)
    kept = [f"Levels that pay off in {words}: {' + '.join(content['kept'][unit])}." for unit, words in _UNITS.items()]
    text = "Cost without the level over cost with it, at equal predicted error: geometric mean (largest)."
    return Section("Levels and ablation", text, ("ablation.png",), {"": _table(rows)}, summary=kept)


def _diagnostics(content: dict[str, Any]) -> Section:
    entries = [content[name] for name in DYNAMICS_NAMES if name in content]
    notes = [f"{e['dynamics'].upper()}, {f['severity']}: {f['text']}" for e in entries for f in e["findings"]]
    return Section("Diagnostics and gains", pictures=("diagnostics-*.png", "gains.png"), notes=notes)


def _plans(content: dict[str, Any]) -> Section:
    columns = ["dynamics", "step_rule", "method", "probabilities", "levels", "steps", "cost", "predicted"]
    plans = _table(content["plans"], [*columns, "selected_error", "largest_effect"])
    text = f"{content['tried']} plans were tried on their own seeds, {len(content['plans'])} selected. Cost in FLOPs."
    return Section("Plans", text, folded={"All plans": plans})


def _comparison(frame: pd.DataFrame) -> Section:
    pooled, tables = for_figures(frame), {}
    columns = ["setting", "gflops_realised", "seconds", "error", "error_se", "distance"]
    for dynamics, words in DYNAMICS_NAMES.items():
        own: Any = pooled[(pooled.dynamics == dynamics) & pooled.trusted]
        for cost, unit in (("gflops_realised", "FLOPs"), ("seconds", "seconds")):
            best = [{"setting": describe(row), **row} for row in frontier(own.to_dict("records"), cost, "error")]
            tables[f"Frontier of error against {unit}, {words}"] = _table(best, columns)
    text = "Errors are mean squared errors to the reference, images in [−1, 1]; costs are per image. "
    text += f"In {(~pooled.trusted).sum()} settings the top level fired too rarely: they are on no frontier."
    return Section("Comparison", text, ("compare.png",), folded={**tables, "All settings": _table(frame)})


def _provenance(content: dict[str, Any]) -> Section:
    stages = [{"stage": name, **entry} for name, entry in content["stages"].items()]
    facts = pd.json_normalize({key: value for key, value in content.items() if key != "stages"}).iloc[0].items()
    tables = {"Stages": _table(stages, ["stage", "seconds", "finished", "commit", "device"])}
    return Section("Provenance", tables=tables, folded={"Data and machine": _table(facts, ["fact", "value"])})


_SECTIONS = {
    "speedup.json": _speedups,
    "verdicts.json": _verdicts,
    "gamma.json": _gamma,
    "ablation.json": _ablation,
    "diagnostics.json": _diagnostics,
    "plans.json": _plans,
    "compare.csv": _comparison,
    "provenance.json": _provenance,
}
