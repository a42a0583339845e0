"""Rows of a benchmark, and a Markdown table of them; values that were not measured are blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.benchmark import Measurement

Row = dict[str, Any]
HEADINGS = {
    "what": "what", "width": "width", "batch": "batch", "mode": "mode", "ms": "ms", "spread": "IQR",
    "tflops": "TFLOP/s", "fraction_of_matmul": "of matmul", "images_per_s": "images/s",
    "ratio_to_diffusers": "diffusers / ours",
}  # fmt: skip


def row(what: str, mode: str, found: Measurement | None = None, repeats: int = 1, **shape: Any) -> Row:
    """One row; None marks a value that was not measured or has no meaning. mode begins with the precision, if any.

    found: the time of `repeats` repetitions. shape: width, batch, and flops per image, or in total without a batch.
    spread: interquartile range over median.
    """
    width, batch, flops = (shape.get(name) for name in ("width", "batch", "flops"))
    ms = None if found is None else 1e3 * found.median / repeats
    out: Row = {"what": what, "width": width, "batch": batch, "mode": mode, "ms": ms}
    out["spread"] = None if found is None else found.iqr / found.median
    out["tflops"] = None if ms is None or flops is None else flops * (batch or 1) / ms * 1e-9
    out["images_per_s"] = None if ms is None or flops is None or batch is None else 1e3 * batch / ms
    return out


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with fraction_of_matmul, in the same precision (autocast multiplies in bf16), and ratio_to_diffusers."""
    peaks = {precision_of(r): r["tflops"] for r in rows if r["what"] == "matmul" and r["tflops"]}
    theirs = {(r["what"], r["width"], r["batch"], r["mode"]): r["ms"] for r in rows}
    out = []
    for r in rows:
        peak = peaks.get(precision_of(r))
        other = theirs.get((f"{r['what']}_diffusers", r["width"], r["batch"], r["mode"]))
        r = r | {"fraction_of_matmul": None, "ratio_to_diffusers": None}
        if peak and r["tflops"]:
            r["fraction_of_matmul"] = r["tflops"] / peak
        if other and r["ms"]:
            r["ratio_to_diffusers"] = other / r["ms"]
        out.append(r)
    return out


def precision_of(r: Row) -> str:
    first = r["mode"].split(" ")[0]
    return "bf16" if first == "autocast" else first


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


def report(document: Mapping[str, Any]) -> str:
    """A line about the device, and the rows as a table without columns that are empty in all rows."""
    rows = document["rows"]
    columns = [c for c in HEADINGS if any(r.get(c) is not None for r in rows)]
    lines = [[HEADINGS[c] for c in columns], ["---"] * len(columns)]
    lines += [[cell(c, r.get(c)) for c in columns] for r in rows]
    cuda = f", CUDA {document['cuda']}" if document["cuda"] else ""
    head = (
        f"{document['device']}, torch {document['torch']}{cuda}, {document['date'][:10]}, size {document['size']} "
        f"({document['resolution']}x{document['resolution']} images); {document['timing']}."
    )
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines)])


def summary(document: Mapping[str, Any]) -> str:
    """The report without diffusers' rows, and with the largest batch of each kind only, as docs/speed.md shows it."""
    rows = [r for r in document["rows"] if not r["what"].endswith("_diffusers")]
    largest: dict[str, int] = {}
    for r in rows:
        largest[r["what"]] = max(largest.get(r["what"], 0), r["batch"] or 0)
    return report({**document, "rows": [r for r in rows if r["batch"] in (None, largest[r["what"]])]})
