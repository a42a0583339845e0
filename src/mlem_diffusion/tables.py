"""compare.csv: its columns, reading and writing it, and what figures and report ask of it; numbers and tables
for people.

One row is one sampler setting; every cost is per image (GFLOPs, not GMACs; seconds of wall clock). A row is
a plain dict: numbers are numbers, an empty field is None.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_text

Row = dict[str, Any]

# fmt: off
COLUMNS = [
    "dynamics", "step_rule", "drift", "probabilities", "coins", "cost_knob", "levels", "steps", "seed",
    "error", "error_se", "distance", "distance_name", "distance_floor",
    "n", "network_calls", "gflops_expected", "gflops_realised", "seconds",
]
# fmt: on
EXTRA_COLUMNS = ["n_fires_top", "plan", "predicted", "jump", "selected_error", "diverged"]

_TEXT = {"dynamics", "step_rule", "drift", "probabilities", "coins", "levels", "distance_name", "plan"}
_WHOLE = {"steps", "n", "seed"}
# Two rows that agree in all of these are one setting, run from different seeds.
_SETTING = ("dynamics", "step_rule", "drift", "probabilities", "coins", "cost_knob", "levels", "steps", "plan")

DYNAMICS_NAMES = {"sde": "stochastic (SDE)", "ode": "deterministic (ODE)"}
STEP_RULE_NAMES = {
    "em": "EM",
    "ddpm": "DDPM ancestral",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM-Solver++(2M)",
    "heun": "Heun",
    "unipc": "UniPC",
}

BASELINES = ("single", "stitched")

MIN_FIRES = 100
"""Below this many evaluations of the top level in a whole run, neither the error nor its standard error can
be trusted."""


def write_rows(rows: Iterable[Row], csv_path: Path) -> Path:
    """Write rows with the columns in their fixed order, extra columns after them; None and non-finite become
    empty fields.

    Floats keep six significant digits. The file appears whole or not at all.
    """
    rows = list(rows)
    for row in rows:
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise UserError(f"A row for {csv_path.name} lacks the column(s) {', '.join(missing)}.")
    extra = [name for name in EXTRA_COLUMNS if any(name in row for row in rows)]
    extra += sorted({name for row in rows for name in row} - set(COLUMNS) - set(extra))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS + extra)
    writer.writerows([_to_field(row.get(name)) for name in COLUMNS + extra] for row in rows)
    write_text(csv_path, text.getvalue())
    return csv_path


def read_rows(csv_path: Path) -> list[Row]:
    """Read what `write_rows` wrote. Raises UserError when the file is missing, lacks a column or holds a
    bad number."""
    if not csv_path.is_file():
        raise UserError(f"{csv_path} is not there.")
    with csv_path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restkey="", restval=None)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{csv_path.name} lacks the column(s) {', '.join(missing)}.")
        rows = []
        for record in reader:
            if "" in record or any(value is None for value in record.values()):
                raise UserError(f"{csv_path.name}, line {reader.line_num}: the number of fields is wrong.")
            where = f"{csv_path.name}, line {reader.line_num}"
            rows.append({name: _from_field(name, text, where) for name, text in record.items()})
    return rows


def _to_field(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_field(name: str, text: str, where: str) -> Any:
    # "" is a value of a text column (no coins, no probabilities), but an absent number.
    if name in _TEXT:
        return text
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        if name in COLUMNS and name != "seed":
            raise UserError(f"{where}: {name} is not a number ({text[:40]!r}).") from None
        return text
    if not math.isfinite(number):
        return None
    whole = name in _WHOLE if name in COLUMNS else text.lstrip("+-").isdigit()
    return int(number) if whole else number


def key_of(row: Row) -> tuple:
    """What names a row's setting, whatever its seed."""
    return tuple(row.get(name) for name in _SETTING)


def pool_seeds(rows: Iterable[Row]) -> list[Row]:
    """Average the rows that differ only in their seed: means of errors, distances and costs; standard errors
    in quadrature.

    `n` is kept (images per seed), `n_fires_top` is summed, and `runs` counts the rows that went in.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    pooled = []
    for group in groups.values():
        merged = dict(group[0], runs=len(group))
        if len(group) > 1:
            for name in (
                "error",
                "distance",
                "network_calls",
                "gflops_expected",
                "gflops_realised",
                "seconds",
            ):
                values = _numbers(group, name)
                merged[name] = sum(values) / len(values) if values else None
            spread = _numbers(group, "error_se")
            merged["error_se"] = math.sqrt(sum(v * v for v in spread)) / len(spread) if spread else None
            fires = _numbers(group, "n_fires_top")
            merged["n_fires_top"] = sum(fires) if fires else None
        pooled.append(merged)
    return pooled


def _numbers(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def method_of(row: Row) -> str:
    """One of "single", "stitched" (both baselines), "plain" (ML-EM as published: independent coins, with whatever
    probabilities) or "best" (the other estimators: nested and systematic coins, quadrature).
    """
    if row["drift"] in BASELINES:
        return row["drift"]
    return "plain" if row["drift"] == "ml_em" and row.get("coins") == "independent" else "best"


def trusted(row: Row) -> bool:
    """False for a random run whose top level fired fewer than MIN_FIRES times (True when the count was not
    recorded)."""
    fires = row.get("n_fires_top")
    return row["drift"] != "ml_em" or fires in (None, "") or float(fires) >= MIN_FIRES


def frontier(rows: Iterable[Row], cost: str, measure: str, keep: Callable[[Row], bool] = trusted) -> list[Row]:
    """The lower-left frontier, cheapest first: rows with a smaller `measure` than every row that is as cheap
    or cheaper.

    Rows with an absent or non-positive cost or measure (the reference compared with itself) and rows that
    `keep` rejects are left out.
    """
    usable = [r for r in rows if keep(r) and (r.get(cost) or 0) > 0 and (r.get(measure) or 0) > 0]
    best: list[Row] = []
    for row in sorted(usable, key=lambda r: (r[cost], r[measure])):
        if not best or row[measure] < best[-1][measure]:
            best.append(row)
    return best


def describe(row: Row) -> str:
    """A setting in words, e.g. "DDIM, w64, 16 steps" or "ML-EM w4+w8+w16, DDIM, 64 steps, systematic coins,
    C = 0.3"."""
    rule = STEP_RULE_NAMES.get(str(row.get("step_rule")), str(row.get("step_rule") or ""))
    names, steps = str(row.get("levels") or "").split("+"), row.get("steps")
    levels = "+".join(names) if len(names) <= 4 else f"{names[0]}+…+{names[-1]} ({len(names)} levels)"
    parts = [rule, f"{steps} steps" if steps is not None else ""]
    if row.get("drift") in ("ml_em", "quadrature"):
        parts.insert(0, f"{'ML-EM' if row['drift'] == 'ml_em' else 'quadrature'} {levels}".strip())
        if row.get("coins"):
            parts.append(
                row["coins"].replace("-shared", "") + " coins" + (", shared" if "-shared" in row["coins"] else "")
            )
        if row.get("probabilities") not in (None, "", "constant"):
            parts.append(f"{row['probabilities']} probabilities")
        parts.append(f"C = {row['cost_knob']:.3g}" if isinstance(row.get("cost_knob"), (int, float)) else "")
    elif row.get("drift") == "stitched":
        parts.insert(0, f"stitched {levels}".strip())
        if isinstance(row.get("cost_knob"), (int, float)):
            parts.append(f"switch at {row['cost_knob']:.3g}")
    else:
        parts.insert(1, levels)
    return ", ".join(part for part in parts if part)


# ---- for people ----


def number(value: Any, digits: int = 3) -> str:
    """A value for people: `digits` significant digits, thousands separated, "–" for what is absent."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if exponent < -4 or exponent > 8:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(power)}"
    if exponent >= digits:
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}"
    return f"{value:.{digits - 1 - exponent}f}"


def interval(value: Any) -> str:
    """A 95% interval [lo, hi]; hi is None when nothing bounds it from above."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return "–"
    low, high = value
    if low is None and high is None:
        return "unbounded"
    if high is None:
        return f"{number(low)} and above"
    return f"up to {number(high)}" if low is None else f"{number(low)} to {number(high)}"


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        plain = all(v is None or isinstance(v, (str, int, float)) for v in value)
        return ", ".join(map(number, value)) if plain and len(value) <= 24 else f"[{len(value):,} values]"
    return number(value)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same values with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.") if value else {}
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_table(columns: Sequence[str], body: Iterable[Sequence[Any]]) -> dict[str, Any] | None:
    """What the template draws: None as a dash, "" as an empty cell; a column of numbers is right-aligned."""
    body = [list(line) for line in body]
    if not body:
        return None
    numeric = [
        all(isinstance(line[i], (int, float, type(None))) or line[i] == "" for line in body)
        and any(line[i] not in (None, "") for line in body)
        for i in range(len(columns))
    ]
    return {
        "columns": list(columns),
        "numeric": numeric,
        "body": [[_cell(value) for value in line] for line in body],
    }


def records_table(records: Any, first: Sequence[str] = ()) -> dict[str, Any] | None:
    """A table of a list of dicts: the columns named in `first` lead, nested keys are joined with dots."""
    flat = [flatten(record) for record in records or [] if isinstance(record, dict)]
    for record in flat:
        record.update({key: interval(value) for key, value in record.items() if key.endswith("interval")})
    present = list(dict.fromkeys(key for record in flat for key in record))
    columns = [key for key in first if key in present] + [key for key in present if key not in first]
    return as_table(
        [name.removeprefix("estimates.").replace("_", " ").replace(".", ": ") for name in columns],
        ([r.get(c) for c in columns] for r in flat),
    )


def flat_table(nested: Any) -> dict[str, Any] | None:
    """A table of two columns without headings: the keys of a nested dict, joined with dots, and their values.

    Values keep all their digits: what was configured has to be readable exactly.
    """
    if not isinstance(nested, dict):
        return None
    table = as_table(("", ""), ((key, _exactly(value)) for key, value in flatten(nested).items()))
    return dict(table, numeric=[False, False]) if table else None


def _exactly(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 24:
        return f"[{len(value):,} values]"
    if value is None or isinstance(value, (bool, list, tuple)):
        return json.dumps(value, default=str)
    return f"{value:.12g}" if isinstance(value, float) else str(value)
