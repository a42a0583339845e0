"""Results of a benchmark: rows in one JSON file per device model, measured part by part and stored between runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json, write_json

COLUMNS = (
    "what", "width", "batch", "mode", "ms", "tflops", "fraction_of_matmul", "images_per_s", "ratio_to_diffusers",
)  # fmt: skip
Row = dict[str, Any]


def row(
    what: str,
    mode: str,
    ms: float | None = None,
    *,
    width: int | None = None,
    batch: int | None = None,
    flops: float | None = None,
    ratio: float | None = None,
) -> Row:
    """One row; None marks a value that was not measured or has no meaning.

    ms: of the full batch; flops: per image, or in total without a batch. `add_fractions` sets fraction_of_matmul."""
    return {
        "what": what,
        "width": width,
        "batch": batch,
        "mode": mode,
        "ms": ms,
        "tflops": None if ms is None or flops is None else flops * (batch or 1) / ms * 1e-9,
        "fraction_of_matmul": None,
        "images_per_s": None if ms is None or batch is None else 1e3 * batch / ms,
        "ratio_to_diffusers": ratio,
    }


@dataclass
class Found:
    """The results of one part. facts: lists of entries that are not rows; skipped: to be measured in a later run."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: bool = False

    def add(self, kind: str, **entry: Any) -> None:
        self.facts.setdefault(kind, []).append(entry)

    def note(self, text: str) -> None:
        """Add one line about a row that is empty, or was not measured as requested."""
        self.add("notes", text=text)


@dataclass
class Cached:
    """A measured part, with the settings, code and commit that it was measured with, and the seconds it took."""

    settings: str
    code: str
    commit: str
    seconds: float
    found: Found


class Results:
    """All results on one device, in the order of `parts`; `path` is rewritten atomically after each part."""

    def __init__(self, path: Path, head: Mapping[str, Any], parts: Sequence[str]):
        self.path, self.head, self.parts = path, dict(head), list(parts)
        self.cached: dict[str, Cached] = {}

    def load(self, settings: Mapping[str, str], code: str, any_code: bool = False) -> None:
        """Load from the file the parts measured with the same device, versions, settings (by part) and code."""
        try:
            old = read_json(self.path, "")
            if any(old[key] != self.head[key] for key in ("device", "torch", "cuda", "size")):
                return
            cached, start = {}, 0
            for entry in old["parts"]:
                rows = old["rows"][start : start + entry["rows"]]
                start += entry["rows"]
                facts: dict[str, list] = {}
                for kind, entries in old["facts"].items():
                    for own in entries:
                        if own.get("part") == entry["part"]:
                            facts.setdefault(kind, []).append({k: v for k, v in own.items() if k != "part"})
                found = Found(rows, facts, entry["skipped"])
                cached[entry["part"]] = Cached(
                    entry["settings"], entry["code"], entry["commit"], entry["seconds"], found
                )
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            return  # no file, or not a file of this format
        for part, entry in cached.items():
            if settings.get(part) == entry.settings and (any_code or code == entry.code):
                self.cached[part] = entry

    def finished(self, part: str) -> bool:
        return part in self.cached and not self.cached[part].found.skipped

    def put(self, part: str, cached: Cached) -> None:
        self.cached[part] = cached
        write_json(self.path, self.document())

    def document(self) -> dict[str, Any]:
        """The file's content: the device and versions, facts that are not rows, the parts, and the rows."""
        rows: list[Row] = []
        facts: dict[str, list] = {}
        parts = []
        for name in self.parts:
            if name not in self.cached:
                continue
            cached = self.cached[name]
            rows += [dict(r) for r in cached.found.rows]
            for kind, entries in cached.found.facts.items():
                facts.setdefault(kind, []).extend({"part": name, **entry} for entry in entries)
            parts.append(
                {
                    "part": name,
                    "rows": len(cached.found.rows),
                    "seconds": cached.seconds,
                    "skipped": cached.found.skipped,
                    "commit": cached.commit,
                    "code": cached.code,
                    "settings": cached.settings,
                }
            )
        add_fractions(rows)
        add_training_ratios(rows)
        facts["cheapest_to_top"] = cheapest_to_top(rows)
        return {**self.head, "facts": facts, "parts": parts, "rows": rows}


def precision_of(mode: str) -> str | None:
    """The precision at the start of a row's mode; autocast multiplies in bf16."""
    first = mode.split()[0] if mode else ""
    return {"float32": "float32", "bf16": "bf16", "autocast": "bf16"}.get(first)


def add_fractions(rows: list[Row]) -> None:
    """Set fraction_of_matmul: TFLOP/s over those of the matrix product in the same precision, if it was measured."""
    peaks = {precision_of(r["mode"]): r["tflops"] for r in rows if r["what"] == "matmul" and r["tflops"]}
    for r in rows:
        peak = peaks.get(precision_of(r["mode"]))
        r["fraction_of_matmul"] = r["tflops"] / peak if r["tflops"] is not None and peak else None


def add_training_ratios(rows: list[Row]) -> None:
    """Set ratio_to_diffusers of the rows "train" from "train_diffusers" of the same width, batch and precision."""
    theirs = {(r["width"], r["batch"], r["mode"]): r["ms"] for r in rows if r["what"] == "train_diffusers"}
    for r in rows:
        other = theirs.get((r["width"], r["batch"], r["mode"]))
        if r["what"] == "train" and r["ms"] and other:
            r["ratio_to_diffusers"] = other / r["ms"]


def cheapest_to_top(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ratios of the largest level's seconds and FLOPs to the cheapest level's, for each batch size and mode."""
    out = []
    levels = [r for r in rows if r["what"] == "level"]
    for batch, mode in dict.fromkeys((r["batch"], r["mode"]) for r in levels):
        own = [r for r in levels if (r["batch"], r["mode"]) == (batch, mode)]
        low, high = min(own, key=lambda r: r["width"]), max(own, key=lambda r: r["width"])
        if low is not high and low["ms"] and high["ms"] and low["tflops"] and high["tflops"]:
            seconds = high["ms"] / low["ms"]
            entry = {"cheapest": low["width"], "top": high["width"], "batch": batch, "mode": mode}
            out.append({**entry, "seconds_ratio": seconds, "flops_ratio": seconds * high["tflops"] / low["tflops"]})
    return out


def file_name(device_model: str, size: str = "") -> str:
    """The file name for a device model, and for a size that is not its default: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{device_model} {size}").strip("-") + ".json"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def code_digest() -> str:
    """The digest of this package's sources, so that rows measured with different code are not mixed."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    return digest([(str(p.relative_to(package)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])
