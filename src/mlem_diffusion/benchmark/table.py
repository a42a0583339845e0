"""A benchmark's rows as a Markdown table; values that were not measured are blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .record import COLUMNS, Row

HEADINGS = {
    "what": "what",
    "width": "width",
    "batch": "batch",
    "mode": "mode",
    "ms": "ms",
    "tflops": "TFLOP/s",
    "fraction_of_matmul": "of matmul",
    "images_per_s": "images/s",
    "ratio_to_diffusers": "diffusers / ours",
}


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "fraction_of_matmul":
        return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"
    if not isinstance(value, float):
        return str(value)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 0.01 else f"{value:.3g}"


def render(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, one line each."""
    lines = [[HEADINGS[c] for c in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[cell(c, r[c]) for c in COLUMNS] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def beside(document: Mapping[str, Any]) -> str:
    """The facts that are not rows, as sentences in a Markdown list."""
    facts, out = document["facts"], []
    for e in facts.get("sampler_overhead", []):
        out.append(
            f"{e['estimator']}, {e['steps']} steps, batch {e['batch']}: "
            f"the whole sampler takes {1 + e['overhead']:.3f} times its networks' seconds, "
            f"{1 + e['overhead_without_noise']:.3f} times without drawing random numbers ({e['calls']} calls)."
        )
    for e in facts.get("cheapest_to_top", []):
        out.append(
            f"Level w{e['top']} to w{e['cheapest']}, batch {e['batch']}, {e['mode']}: "
            f"{e['seconds_ratio']:.3g} times the seconds, {e['flops_ratio']:.3g} times the FLOPs."
        )
    ratios = [e["ratio"] for e in facts.get("flops_ratio_diffusers", [])]
    if ratios:
        out.append(f"FLOPs of diffusers' UNet over ours: {min(ratios):.3f} to {max(ratios):.3f}.")
    return "\n".join(f"* {line}" for line in out)


def head(document: Mapping[str, Any]) -> str:
    """One line: device, versions, date, size and timing method."""
    cuda = f", CUDA {document['cuda']}" if document["cuda"] else ""
    return (
        f"{document['device']}, torch {document['torch']}{cuda}, {document['date'][:10]}, size {document['size']} "
        f"({document['resolution']}x{document['resolution']} images); {document['timing']}."
    )


def report(document: Mapping[str, Any]) -> str:
    """The full report that scripts print: head, table, facts, and the notes about empty rows."""
    notes = [f"* {e['text']}" for e in document["facts"].get("notes", [])]
    return "\n".join(
        [head(document), "", render(document["rows"]), "", beside(document), *dict.fromkeys(notes)]
    ).rstrip()


def summary(document: Mapping[str, Any]) -> str:
    """A summary in Markdown: head, facts, and the rows with the largest batch or no batch, without diffusers."""
    rows = [r for r in document["rows"] if not r["what"].endswith("_diffusers")]
    largest: dict[str, int] = {}
    for r in rows:
        largest[r["what"]] = max(largest.get(r["what"], 0), r["batch"] or 0)
    rows = [r for r in rows if r["batch"] is None or r["batch"] == largest[r["what"]]]
    return f"{head(document)}\n\n{render(rows)}\n\n{beside(document)}".rstrip()


def summaries(documents: Sequence[Mapping[str, Any]]) -> str:
    """The summaries of all devices, as docs/speed.md shows them."""
    return "\n\n".join(summary(document) for document in documents)
