"""What a benchmark leaves behind: flat rows in one JSON file per device model, measured part by part and kept between runs."""

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
    """One row; None is what was not measured or has no meaning. ms: of the whole batch; flops: per image (or of the whole
    where there is no batch). fraction_of_matmul is filled in when rows are put together."""
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
    """What one part of a benchmark found. facts: lists of entries beside the table; skipped: to be measured another time."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: bool = False

    def add(self, kind: str, **entry: Any) -> None:
        self.facts.setdefault(kind, []).append(entry)

    def note(self, text: str) -> None:
        """One line about a row that stays empty, or was not measured as asked."""
        self.add("notes", text=text)


@dataclass
class Cached:
    """A part that has been measured: with which settings, code and commit, in how many seconds."""

    settings: str
    code: str
    commit: str
    seconds: float
    found: Found


class Results:
    """Everything measured on one device, in the order of `parts`; `path` is written anew, atomically, after each part."""

    def __init__(self, path: Path, head: Mapping[str, Any], parts: Sequence[str]):
        self.path, self.head, self.parts = path, dict(head), list(parts)
        self.cached: dict[str, Cached] = {}

    def load(self, settings: Mapping[str, str], code: str, any_code: bool = False) -> None:
        """Keep from the file what was measured with the same device, versions, settings (by part) and code."""
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
            return  # no file, or not one of ours
        for part, entry in cached.items():
            if settings.get(part) == entry.settings and (any_code or code == entry.code):
                self.cached[part] = entry

    def finished(self, part: str) -> bool:
        return part in self.cached and not self.cached[part].found.skipped

    def put(self, part: str, cached: Cached) -> None:
        self.cached[part] = cached
        write_json(self.path, self.document())

    def document(self) -> dict[str, Any]:
        """The file's content: facts about the device, what stands beside the table, the parts, and the rows."""
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
    """The precision that a row's mode begins with; autocast multiplies in bf16."""
    first = mode.split()[0] if mode else ""
    return {"float32": "float32", "bf16": "bf16", "autocast": "bf16"}.get(first)


def add_fractions(rows: list[Row]) -> None:
    """fraction_of_matmul: TFLOP/s over those of the matrix product in the same precision, where that was measured."""
    peaks = {precision_of(r["mode"]): r["tflops"] for r in rows if r["what"] == "matmul" and r["tflops"]}
    for r in rows:
        peak = peaks.get(precision_of(r["mode"]))
        r["fraction_of_matmul"] = r["tflops"] / peak if r["tflops"] is not None and peak else None


def add_training_ratios(rows: list[Row]) -> None:
    """ratio_to_diffusers of the rows "train", from "train_diffusers" of the same width, batch and precision."""
    theirs = {(r["width"], r["batch"], r["mode"]): r["ms"] for r in rows if r["what"] == "train_diffusers"}
    for r in rows:
        other = theirs.get((r["width"], r["batch"], r["mode"]))
        if r["what"] == "train" and r["ms"] and other:
            r["ratio_to_diffusers"] = other / r["ms"]


def cheapest_to_top(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times the largest level's seconds and FLOPs are those of the cheapest, for each batch size and mode."""
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
    """A device's model, and a size that is not the usual one there, as a file name: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{device_model} {size}").strip("-") + ".json"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def code_digest() -> str:
    """Of this package's sources: rows measured with other code are not mixed in."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    return digest([(str(p.relative_to(package)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])
