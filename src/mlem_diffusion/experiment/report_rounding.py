"""The report's section on lower precision, from precision.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from .html_tables import as_table


def precision_section(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """Tables of rounding per level, of settings in both precisions, and of their speed-ups; None without the file."""
    if not content:
        return None
    levels = [
        (level["level"], float(np.median(level["rms_rounding"])), max(level["rms_rounding"]), level["worst_ratio"])
        for level in content["levels"]
    ]
    settings = [
        (
            row["dynamics"],
            row["setting"],
            row["error_float32"],
            row["error_bf16"],
            f"{100 * row['change'] / row['error_float32']:+.2f}% ± "
            f"{200 * row['change_se'] / row['error_float32']:.2f}%",
        )
        for row in content.get("settings", [])
    ]
    found = content.get("speedup", {})
    speedups = [
        (dynamics, kind, *(_bound(found[p][dynamics][kind]) for p in ("float32", "bf16")))
        for dynamics in found.get("float32", {})
        for kind in ("paper", "any")
    ]
    return {
        "levels": as_table(
            ("level", "rounding, median rms", "largest rms", "over the level difference, at worst"), levels
        ),
        "settings": as_table(("dynamics", "setting", "error, float32", "error, bf16", "change (two s.e.)"), settings),
        "speedups": as_table(("dynamics", "ML-EM", "speed-up, float32", "speed-up, bf16"), speedups),
        "samples": content.get("samples"),
    }


def _bound(entry: dict[str, Any]) -> str:
    return "not reached" if entry["max"] is None else f"{entry['max']:.2f} (≥ {entry['lower95'] or 0:.2f})"
