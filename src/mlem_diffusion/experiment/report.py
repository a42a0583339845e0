"""One self-contained HTML page per experiment, from the artefacts in its results folder."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..comparison.table import BASELINES, COLUMNS, Row, describe, method_of, pool_seeds, read_rows, trusted
from ..diffusion.step_rules import DYNAMICS_NAMES, STEP_RULE_NAMES
from ..errors import UserError
from ..files import Damaged, expect_content, read_json, write_text
from ..statistics import frontier
from .html_tables import as_table, flat_table, flatten, interval, number, records_table
from .provenance import check_same_levels, check_written

# The stage that writes each artefact; the page gives its command if the artefact is missing.
_STAGES = {
    "provenance.json": "train-levels",
    "training.png": "train-levels",
    "gamma.json": "measure-gamma",
    "gamma.png": "measure-gamma",
    "compare.csv": "sample-compare",
    "compare.png": "sample-compare",
    "speedup.json": "sample-compare",
}
_ESTIMATES = {
    "loss_fit": "fit of the denoising loss",
    "differences": "differences of neighbouring levels",
    "to_largest": "differences to the largest level",
}
_METHODS = {"paper": "paper's ML-EM", "any": "any multilevel"}
_MEASURES = {"error": "MSE", "distance": "distance"}
_UNITS = {"flops": "FLOPs", "seconds": "seconds"}
_FRONTIER_ROWS = 14


def write_report(results_dir: Path, *, title: str) -> Path:
    """Write results_dir/report.html, with all images and styles inline, no network and no scripts; return its path.

    Reads gamma.json, speedup.json, best.json, provenance.json, ablation.json, compare.csv, config.yaml, the figures
    gamma.png, compare.png and training.png, and the pictures in grids/ and training/. The page lists what is missing.
    Raises UserError if the folder holds none of them, if a file is damaged or was changed after its stage wrote it, or
    if gamma and the comparison were made with different levels.
    """
    import jinja2

    results_dir = Path(results_dir)
    notices: list[str] = []
    documents = {name: _load_json(results_dir / f"{name}.json") for name in ("gamma", "speedup", "best", "provenance")}
    gamma, speedup, provenance = (documents[name] or {} for name in ("gamma", "speedup", "provenance"))
    with expect_content(results_dir / "provenance.json", "restore it (git checkout), or delete it"):
        check_written(results_dir, provenance)
    check_same_levels(results_dir, gamma, provenance)
    rows = _load_rows(results_dir / "compare.csv")
    figures = {name: _load_image(results_dir / f"{name}.png") for name in ("gamma", "compare", "training")}
    hierarchy = [
        picture
        for path in [results_dir / "gains.png", *sorted(results_dir.glob("diagnostics-*.png"))]
        if path.is_file() and (picture := _load_image(path))
    ]
    diagnostics = _load_json(results_dir / "diagnostics.json") if hierarchy else None
    folders = {name: [_load_image(path) for path in _pictures(results_dir / name)] for name in ("grids", "training")}
    config = results_dir / "config.yaml"
    configs = [(config.name, config.read_text("utf-8", "replace"))] if config.is_file() else []
    if not (any(documents.values()) or rows or any(figures.values()) or any(folders.values()) or configs):
        raise UserError(
            f"{results_dir} holds no results yet: run make train-levels EXPERIMENT={results_dir.name} first."
        )
    notices += [
        f"{name} is missing: run make {stage} EXPERIMENT={results_dir.name}"
        for name, stage in _STAGES.items()
        if not (results_dir / name).exists()
    ]

    with expect_content(results_dir / "ablation.json", _AGAIN):
        levels = _levels_section(results_dir)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (Path(__file__).parent / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title,
        experiment=str(provenance.get("experiment") or results_dir.name),
        notices=notices,
        gamma=_gamma_section(gamma),
        speedup=_speedup_section(speedup, rows),
        distance_note=_distance_note(rows),
        frontiers=_frontier_tables(rows),
        comparison=_comparison_table(rows),
        best=flat_table({k: v for k, v in (documents["best"] or {}).items() if k != "made_with"} or None),
        figures=figures,
        hierarchy=hierarchy,
        findings=_findings(diagnostics or {}),
        levels=levels,
        precision=None,
        precision_picture=_load_image(results_dir / "precision.png")
        if (results_dir / "precision.png").is_file()
        else None,
        methods=_methods_table(results_dir) if (results_dir / "verdicts.json").is_file() else None,
        folders={name: [image for image in images if image] for name, images in folders.items()},
        provenance=_provenance_tables(provenance),
        configs=configs,
    )
    path = results_dir / "report.html"
    write_text(path, page)
    return path


# ---- reading ----


_AGAIN = "remove it and run its stage again"


def _load_json(path: Path) -> dict[str, Any] | None:
    return read_json(path, _AGAIN) if path.is_file() else None


def _load_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        return read_rows(path)
    except (UserError, ValueError, csv.Error) as problem:
        raise Damaged(path, f"{path} cannot be read ({str(problem).rstrip('.')}): {_AGAIN}.") from problem


def _load_image(path: Path) -> dict[str, Any] | None:
    """A PNG as a data URI with its size in pixels; None if the file is missing, Damaged if it is not a valid PNG."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            picture.verify()  # every chunk has a checksum
    except Exception as error:  # damaged files raise almost any exception
        raise Damaged(path, f"{path} is not a readable PNG: {_AGAIN}.") from error
    return {
        "name": path.stem,
        "uri": "data:image/png;base64," + base64.b64encode(content).decode("ascii"),
        "width": int.from_bytes(content[16:20], "big"),
        "height": int.from_bytes(content[20:24], "big"),
    }


def _pictures(folder: Path) -> list[Path]:
    """The PNGs of a folder in natural order: w8 before w16."""

    def natural(path: Path) -> list[Any]:
        return [
            (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.stem) if part
        ]

    return sorted(folder.glob("*.png"), key=natural)


# ---- sections ----


def _gamma_section(gamma: dict[str, Any]) -> dict[str, Any] | None:
    if not gamma:
        return None
    estimates = [
        (name, words, estimate)
        for name, words in _ESTIMATES.items()
        if isinstance(estimate := (gamma.get("estimates") or {}).get(name), dict)
    ]
    values = [float(e["gamma"]) for _, _, e in estimates if _is_number(e.get("gamma"))]
    answer = {"yes": "yes", "no": "no"}.get(str(gamma.get("htmc")), "undetermined")
    default = {
        "yes": "The interval of gamma lies above 2",
        "no": "The interval of gamma lies below 2",
        "undetermined": "The interval of gamma contains 2, or its bounds are too uncertain",
    }[answer]
    return {
        "answer": answer,
        "range": f"γ from {number(min(values))} to {number(max(values))} by {len(values)} estimates" if values else "",
        "reason": str(gamma.get("htmc_reason") or default).strip().rstrip("."),
        "estimates": [
            (words, number(e["gamma"]) if e.get("gamma") else "no finite value", interval(e.get("interval")))
            for _, words, e in estimates
        ],
        "estimates_table": as_table(
            ("estimate", "gamma", "95% interval", "further"),
            (
                (words, e.get("gamma"), interval(e.get("interval")), _further(e, ("gamma", "interval")))
                for _, words, e in estimates
            ),
        ),
        "levels": records_table(
            gamma.get("levels"), ("name", "width", "params", "parameters", "gflop", "images", "loss")
        ),
        "per_noise_level": records_table(gamma.get("per_noise_level"), ("logsnr", "gamma", "interval")),
        "training_lengths": _lengths_table(gamma.get("training_lengths")),
        "warnings": [str(text) for text in gamma.get("warnings") or []],
    }


def _findings(diagnostics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The findings in diagnostics.json as (dynamics, severity, sentence)."""
    return [
        (DYNAMICS_NAMES.get(dynamics, dynamics), str(finding.get("severity", "")), str(finding.get("text", "")))
        for dynamics, found in diagnostics.items()
        for finding in found.get("findings", [])
    ]


def _levels_section(results_dir: Path) -> dict[str, Any] | None:
    """The section on levels from ablation.json: figure, table, and the levels that remain; None without the file."""
    content = _load_json(results_dir / "ablation.json")
    if not content:
        return None
    body, units = [], ("flops", "seconds")
    rules = list(dict.fromkeys(rule for level in content["levels"] for rule in level["cost_ratio_flops"] or {}))
    for level in content["levels"]:
        row = [
            level["name"],
            level["flops"] / 1e6,
            level["flops_share"],
            1e3 * level["seconds"],
            level["seconds_share"],
        ]
        for rule in rules:
            for unit in units:
                found = (level[f"cost_ratio_{unit}"] or {}).get(rule)
                row.append(f"{found['mean']:.3f} ({found['largest']:.2f})" if found else "–")
        body.append([*row, *("yes" if level[f"kept_{unit}"] else "no" for unit in units)])
    ratios = [f"cost ratio in {_UNITS[unit]}, {rule}" for rule in rules for unit in units]
    columns = ("level", "MFLOP", "share", "ms per image", "share", *ratios, "kept in FLOPs", "kept in seconds")
    return {
        "table": as_table(columns, body),
        "picture": _load_image(results_dir / "ablation.png"),
        "kept": [
            (_UNITS[unit], " + ".join(content["kept"][unit]), ", ".join(e["name"] for e in content["removed"][unit]))
            for unit in units
        ],
        "tolerance": content["tolerance"],
        "where": f"batches of {content['batch']} on {content['device']}",
    }


def _methods_table(results_dir: Path) -> dict[str, Any] | None:
    """Speed-ups of each estimator in verdicts.json: largest lower bound, and errors with a speed-up of at least 2."""
    body = []
    for rule, entry in (_load_json(results_dir / "verdicts.json") or {}).items():
        for name, found in entry.get("against_em", {}).items():
            other = entry.get("against_all_baselines", {}).get(name, {})
            two = next((w for w in found.get("windows", []) if w["least"] == 2), None)
            window = f"{number(two['rms_error'][0])} to {number(two['rms_error'][1])}" if two else ""
            body.append((rule, name, _largest_bound(found), _largest_bound(other), window))
    columns = ("rule", "estimator", "over EM", "over all baselines", "2x over EM at rms errors from")
    return as_table(columns, body)


def _largest_bound(found: dict[str, Any]) -> float | None:
    return max((p["lower95"] for p in found.get("curve", []) if p["lower95"] is not None), default=None)


def _lengths_table(lengths: Any) -> dict[str, Any] | None:
    """A table of gamma by each estimate at each training length."""
    records = [entry for entry in lengths or [] if isinstance(entry, dict)]

    def cell(entry: dict[str, Any], name: str) -> str:
        estimate = (entry.get("estimates") or {}).get(name) or {}
        value = number(estimate["gamma"]) if estimate.get("gamma") else "no finite value"
        return f"{value} ({interval(estimate.get('interval'))})"

    def images(entry: dict[str, Any]) -> str:
        seen = entry.get("images") or []
        return ", ".join(f"{n:,}" for n in dict.fromkeys(seen if isinstance(seen, list) else [seen]))

    return as_table(
        ("fraction", "images per level", *_ESTIMATES.values(), "HTMC"),
        (
            (entry.get("fraction"), images(entry), *(cell(entry, name) for name in _ESTIMATES), entry.get("htmc"))
            for entry in records
        ),
    )


def _further(record: dict[str, Any], shown: Sequence[str]) -> str:
    """The remaining scalars of a record in one line."""
    rest = [
        f"{key.replace('_', ' ')} {number(value)}"
        for key, value in flatten(record).items()
        if key not in shown and value not in (None, "") and not isinstance(value, (list, tuple))
    ]
    return ", ".join(rest) or "–"


def _speedup_section(speedup: dict[str, Any], rows: list[Row]) -> dict[str, Any] | None:
    """Cards, sentences, a table and curves of the speed-ups; None without speedup.json."""
    if not speedup:
        return None
    cards, sentences, lines, curves = [], [], [], []
    for dynamics, words in DYNAMICS_NAMES.items():
        if not isinstance(speedup.get(dynamics), dict):
            continue
        for measure in _MEASURES:
            clauses = []
            for method in _METHODS:
                entries = {unit: _entry(speedup, dynamics, method, measure, unit) for unit in _UNITS}
                known = _look_up(speedup, dynamics, method, measure) is not None
                measured = any(entries.values()) or (known and _was_measured(rows, dynamics, method, measure))
                texts = [_clause(entry, unit, measure, measured) for unit, entry in entries.items()]
                if not any(entries.values()):  # one sentence for both costs
                    texts = [texts[0].removeprefix("in FLOPs ")]
                text = "; ".join(texts)
                text += _ratio_clause(_look_up(speedup, dynamics, method, measure, "flops"))
                clauses.append((_METHODS[method], text))
                if measure == "error":
                    cards.append(_card(words, method, entries["flops"], measured))
                for unit, entry in entries.items():
                    lines.append(_speedup_line(dynamics, method, measure, unit, entry, measured))
                    curve = records_table((entry or {}).get("curve"))
                    if curve:
                        curves.append((f"{words}, {_METHODS[method]}, equal {measure}, {_UNITS[unit]}", curve))
            sentences.append((f"{words[0].upper()}{words[1:]}, at equal {measure}", clauses))
    columns = (
        "dynamics",
        "method",
        "at equal",
        "counted in",
        "speed-up",
        "95% lower bound",
        "at",
        "cheapest baseline",
        "ML-EM",
    )
    return {"cards": cards, "sentences": sentences, "table": as_table(columns, lines), "curves": curves}


def _look_up(nested: Any, *keys: str) -> Any:
    for key in keys:
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested


def _entry(speedup: dict[str, Any], *keys: str) -> dict[str, Any] | None:
    """The entry at these keys if it holds a speed-up, else None."""
    value = _look_up(speedup, *keys)
    return value if isinstance(value, dict) and _is_number(value.get("max")) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _at_least_one(value: Any) -> bool:
    return _is_number(value) and value >= 1


def _was_measured(rows: list[Row], dynamics: str, method: str, measure: str) -> bool:
    """Whether compare.csv has settings of this method with this measure; True without the file."""
    wanted = ("paper",) if method == "paper" else ("paper", "other")
    of_interest = (row for row in rows if row["dynamics"] == dynamics and method_of(row) in wanted)
    return not rows or any(row.get(measure) is not None for row in of_interest)


def _clause(entry: dict[str, Any] | None, unit: str, measure: str, measured: bool) -> str:
    """A clause on one cost of one method; a speed-up below 1 is called slower."""
    if not measured:
        return "not measured"
    counted = f"in {_UNITS[unit]}"
    if entry is None:
        noun = "an error" if measure == "error" else "a distance"
        return f"{counted} no speed-up, since it never reaches {noun} of the baselines' frontier"
    best, lower = entry["max"], entry.get("lower95")
    where = f"at {_MEASURES[measure]} {number(entry.get('at'))}"
    if best < 1:
        times = f"{number(1 / best)} times" if best > 0 else "infinitely"
        return (
            f"{counted} it is slower than the cheapest baseline, at {times} the cost even at its best "
            f"(speed-up {number(best)}, {where})"
        )
    gain = f"{number(best)} times {'cheaper' if unit == 'flops' else 'faster'} than the cheapest baseline"
    bound = f"95% lower bound {number(lower)}" if _is_number(lower) else "no lower bound"
    if _at_least_one(lower):
        return f"{counted} up to {gain} ({bound}, {where})"
    return f"{counted} at best {gain}, but that is not established ({bound}, {where})"


def _ratio_clause(entry: Any) -> str:
    """A clause on the error ratio at equal FLOPs; empty if it was not measured."""
    ratio, bound, cost = (_look_up(entry, "error_ratio_at_equal_cost", key) for key in ("max", "lower95", "at"))
    if not _is_number(ratio) or ratio <= 0:
        return ""
    known = f", 95% lower bound {number(bound)}" if ratio >= 1 and _is_number(bound) else ""
    size = f"up to {number(ratio)} times smaller" if ratio >= 1 else f"at best {number(1 / ratio)} times larger"
    return f"; at equal FLOPs its error is {size} (at {number(cost)} GFLOP per image{known})"


def _card(words: str, method: str, entry: dict[str, Any] | None, measured: bool) -> dict[str, str]:
    label = f"{words}: {_METHODS[method]}"
    if entry is None:
        return {
            "label": label,
            "value": "none",
            "tone": "bad",
            "note": "never reaches the baselines" if measured else "not measured",
        }
    best, lower = entry["max"], entry.get("lower95")
    tone = "bad" if best < 1 else "good" if _at_least_one(lower) else "open"
    note = "slower than the cheapest baseline" if best < 1 else f"95% lower bound {number(lower)}"
    return {"label": label, "value": f"{number(best)}×", "tone": tone, "note": note}


def _speedup_line(
    dynamics: str, method: str, measure: str, unit: str, entry: dict[str, Any] | None, measured: bool
) -> tuple[Any, ...]:
    head = (dynamics.upper(), method, measure, _UNITS[unit])
    if entry is None:
        return (*head, None, None, None, "–", "never reaches the baselines" if measured else "not measured")
    settings = [_setting_words(entry.get(key)) for key in ("baseline", "ours")]
    return (*head, float(entry["max"]), entry.get("lower95"), entry.get("at"), *settings)


def _setting_words(setting: Any) -> str:
    if not isinstance(setting, dict):
        return str(setting or "–")
    if "estimator" not in setting and "step_rule" not in setting:
        return _further(setting, ())
    costs = [
        f"{number(setting[key])} {unit}"
        for key, unit in (("gflops_realised", "GFLOP"), ("seconds", "s"))
        if _is_number(setting.get(key))
    ]
    return describe(setting) + (f" ({', '.join(costs)})" if costs else "")


def _distance_note(rows: list[Row]) -> str:
    for row in rows:
        if row.get("distance") is not None:
            floor = row.get("distance_floor")
            name, n = row["distance_name"] or "configured distance", number(row["num_samples"])
            text = f"Distances are the {name} of n = {n} images to the training images"
            return text + (f"; for as many real images the distance is {number(floor)} (the floor)." if floor else ".")
    return "No distance was computed." if rows else ""


def _frontier_tables(rows: list[Row]) -> list[tuple[str, dict[str, Any]]]:
    """Tables of the settings on the error-cost frontier, per dynamics and cost, baselines and ML-EM together."""
    tables = []
    for dynamics, words in DYNAMICS_NAMES.items():
        own = [row for row in pool_seeds(rows) if row["dynamics"] == dynamics and trusted(row)]
        for cost, unit in (("gflops_realised", "FLOPs"), ("seconds", "seconds")):
            best = frontier(own, cost, "error")
            if len(best) > _FRONTIER_ROWS:  # thin it evenly, including both ends
                best = [best[round(i * (len(best) - 1) / (_FRONTIER_ROWS - 1))] for i in range(_FRONTIER_ROWS)]
            table = as_table(
                ("setting", "GFLOP", "seconds", "network calls", "error (MSE)", "± 2 se", "distance"),
                (
                    (
                        describe(row),
                        row["gflops_realised"],
                        row["seconds"],
                        row["network_calls"],
                        row["error"],
                        "" if row["error_se"] is None else 2 * row["error_se"],
                        row["distance"],
                    )
                    for row in best
                ),
            )
            if table:
                table["marked"] = [row["estimator"] not in BASELINES for row in best]
                tables.append((f"{words}, error against {unit}", table))
    return tables


def _comparison_table(rows: list[Row]) -> dict[str, Any] | None:
    names = COLUMNS + [name for name in (rows[0] if rows else ()) if name not in COLUMNS]
    table = as_table(
        [name.replace("_", " ") for name in names],
        ([_field(row, name) for name in names] for row in rows),
    )
    if table:
        table["untrusted"] = sum(not trusted(row) for row in rows)
    return table


def _field(row: Row, name: str) -> Any:
    value = row.get(name)
    if name == "step_rule":
        return STEP_RULE_NAMES.get(str(value), value)
    return "" if name == "error_se" and value is None else value  # unknown for one image or one shared coin draw


def _provenance_tables(provenance: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Tables of the scalars, of each nested part, and of the stages."""
    scalars = {key: value for key, value in provenance.items() if not isinstance(value, dict)}
    parts = [("run", flat_table({key.replace("_", " "): value for key, value in scalars.items()}))]
    for key, value in provenance.items():
        if not isinstance(value, dict):
            continue
        if key == "stages":
            parts.append((key, _stages_table({n: s for n, s in value.items() if isinstance(s, dict)})))
        else:
            parts.append((key, flat_table(value)))
    return [(name, table) for name, table in parts if table]


def _stages_table(stages: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """A table with one row per stage, without hashes."""
    shown = ("finished", "commit", "device")
    return as_table(
        ("stage", "time", *shown, "further"),
        (
            (
                name.replace("_", " "),
                _duration(stage.get("seconds")),
                *(str(stage.get(key) or "–") for key in shown),
                _further(stage, ("seconds", "fingerprint", "outputs", "made_with", *shown)),
            )
            for name, stage in stages.items()
        ),
    )


def _duration(seconds: Any) -> str:
    if not _is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{number(float(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
