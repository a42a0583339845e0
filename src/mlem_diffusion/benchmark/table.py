"""Rows of a benchmark, and a Markdown table of them; values that were not measured are blank."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.benchmark import Measurement

Row = dict[str, Any]
HEADINGS = {
    "what": "what", "width": "width", "batch": "batch", "mode": "mode", "ms": "ms", "spread": "IQR",
    "tflops": "TFLOP/s", "fraction_of_matmul": "of matmul", "images_per_s": "images/s",
    "ratio_to_diffusers": "diffusers / ours",
}  # fmt: skip


def row(
    what: str, mode: str, found: Measurement | None = None, width: int | None = None, batch: int | None = None,
    flops: float | None = None, repeats: int = 1,
) -> Row:  # fmt: skip
    """One row; None marks a value that was not measured or has no meaning. mode begins with the precision, if any.

    found: the time of `repeats` repetitions. flops: per image, or in total without a batch."""
    out: Row = {"what": what, "width": width, "batch": batch, "mode": mode, "ms": None}
    if found is not None:
        out.update(ms=1e3 * found.median / repeats, spread=found.iqr / found.median)
        if flops is not None:
            out["tflops"] = flops * (batch or 1) / out["ms"] * 1e-9
            out["images_per_s"] = batch and 1e3 * batch / out["ms"]
    return out


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with fraction_of_matmul, in the same precision (autocast multiplies in bf16), and ratio_to_diffusers."""

    def precision(r: Row) -> str:
        return r["mode"].split(" ")[0].replace("autocast", "bf16")

    peaks = {precision(r): r.get("tflops") for r in rows if r["what"] == "matmul"}
    times = {(r["what"], r["width"], r["batch"], r["mode"]): r["ms"] for r in rows}
    out = []
    for r in rows:
        peak, ours = peaks.get(precision(r)), r.get("tflops")
        theirs = times.get((f"{r['what']}_diffusers", r["width"], r["batch"], r["mode"]))
        fraction = ours / peak if ours and peak else None
        ratio = theirs / r["ms"] if theirs and r["ms"] else None
        out.append({**r, "fraction_of_matmul": fraction, "ratio_to_diffusers": ratio})
    return out


def cell(column: str, value: Any) -> str:
    if column in ("fraction_of_matmul", "spread") and value is not None:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def report(document: Mapping[str, Any]) -> str:
    """A line about the device, and the rows of the largest batch as a table, without diffusers' and empty columns."""
    rows = [r for r in document["rows"] if not r["what"].endswith("_diffusers")]
    rows = [r for r in rows if r["batch"] in (None, max(o["batch"] or 0 for o in rows if o["what"] == r["what"]))]
    columns = [c for c in HEADINGS if any(r.get(c) is not None for r in rows)]
    lines = [[HEADINGS[c] for c in columns], ["---"] * len(columns)]
    lines += [[cell(c, r.get(c)) for c in columns] for r in rows]
    head = "{device}, torch {torch}{cuda}, {date:.10}, size {size} ({resolution}x{resolution} images); {timing}."
    cuda = f", CUDA {document['cuda']}" if document["cuda"] else ""
    return "\n".join([head.format_map({**document, "cuda": cuda}), "", *(f"| {' | '.join(line)} |" for line in lines)])
