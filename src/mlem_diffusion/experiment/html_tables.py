"""Formatting of numbers and tables for the report's template."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """Format a value with `digits` significant digits and thousands separators; a missing value becomes "–"."""
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
    """Format a 95% interval [lo, hi]; None stands for an unbounded end."""
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
    """Flatten nested dicts with dotted keys: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.") if value else {}
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_table(columns: Sequence[str], body: Iterable[Sequence[Any]]) -> dict[str, Any] | None:
    """The table for the template, or None without rows.

    None becomes a dash, "" an empty cell. Columns of numbers are right-aligned.
    """
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
    """A table of a list of dicts: the columns in `first` come first, nested keys are joined with dots."""
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

    Values keep all their digits, so that the configuration can be read exactly.
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
