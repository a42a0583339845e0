"""A benchmark's rows as a Markdown table; values that were not measured are blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.benchmark import Measurement

COLUMNS = {
    "what": "what",
    "width": "width",
    "batch": "batch",
    "mode": "mode",
    "ms": "ms",
    "spread": "IQR",
    "tflops": "TFLOP/s",
    "fraction_of_matmul": "of matmul",
    "images_per_s": "images/s",
    "ratio_to_diffusers": "diffusers / ours",
}
Row = dict[str, Any]


def row(
    what: str,
    mode: str,
    measured: Measurement | None = None,
    *,
    width: int | None = None,
    batch: int | None = None,
    flops: float | None = None,
    repeats: int = 1,
) -> Row:
    """One row; None marks a value that was not measured or has no meaning.

    measured: the times of `repeats` repetitions on the full batch. flops: per image, or in total without a batch.
    spread: interquartile range over the median. `compared` sets the other columns.
    """
    ms = None if measured is None else 1e3 * measured.median / repeats
    return {
        "what": what,
        "width": width,
        "batch": batch,
        "mode": mode,
        "ms": ms,
        "spread": None if measured is None else measured.iqr / measured.median,
        "tflops": None if ms is None or flops is None else flops * (batch or 1) / ms * 1e-9,
        "images_per_s": None if ms is None or flops is None or batch is None else 1e3 * batch / ms,
    }


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with fraction_of_matmul (same precision; autocast multiplies in bf16) and ratio_to_diffusers."""
    peaks = {_precision(r): r["tflops"] for r in rows if r["what"] == "matmul" and r["tflops"]}
    theirs = {_key(r): r["ms"] for r in rows if r["what"].endswith("_diffusers")}
    out = []
    for r in rows:
        peak, other = peaks.get(_precision(r)), theirs.get(_key(r | {"what": f"{r['what']}_diffusers"}))
        fraction = r["tflops"] / peak if r["tflops"] is not None and peak else None
        out.append(r | {"fraction_of_matmul": fraction, "ratio_to_diffusers": other / r["ms"] if other else None})
    return out


def _precision(r: Row) -> str:
    first = r["mode"].split(" ")[0]
    return "bf16" if first == "autocast" else first


def _key(r: Row) -> tuple:
    return r["what"], r["width"], r["batch"], r["mode"]


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("fraction_of_matmul", "spread"):
        return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"
    if not isinstance(value, float):
        return str(value)
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 0.01 else f"{value:.3g}"


def render(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, one line each, without columns that are empty in all rows."""
    columns = [c for c in COLUMNS if any(r.get(c) is not None for r in rows)]
    lines = [[COLUMNS[c] for c in columns], ["---"] * len(columns)]
    lines += [[cell(c, r.get(c)) for c in columns] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def head(document: Mapping[str, Any]) -> str:
    """One line: device, versions, date, size and timing method."""
    cuda = f", CUDA {document['cuda']}" if document["cuda"] else ""
    return (
        f"{document['device']}, torch {document['torch']}{cuda}, {document['date'][:10]}, size {document['size']} "
        f"({document['resolution']}x{document['resolution']} images); {document['timing']}."
    )


def report(document: Mapping[str, Any]) -> str:
    """What the script prints: head and table."""
    return f"{head(document)}\n\n{render(document['rows'])}"


def summary(document: Mapping[str, Any]) -> str:
    """A summary in Markdown: head, and the rows with the largest batch or no batch, without diffusers."""
    rows = [r for r in document["rows"] if not r["what"].endswith("_diffusers")]
    largest: dict[str, int] = {}
    for r in rows:
        largest[r["what"]] = max(largest.get(r["what"], 0), r["batch"] or 0)
    return report({**document, "rows": [r for r in rows if r["batch"] in (None, largest[r["what"]])]})


def summaries(documents: Sequence[Mapping[str, Any]]) -> str:
    """The summaries of all devices, as docs/speed.md shows them."""
    return "\n\n".join(summary(document) for document in documents)
