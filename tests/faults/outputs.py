"""What a stage writes, in a form that two runs can be compared by."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
from pipeline import Place, strict

TIMES = re.compile(r"second|finished|date|timing|commit|device|^config$")  # a level also records its configuration
WRITTEN = {
    "train_levels": "checkpoints/*/w*/*.*",
    "measure_gamma": "results/*/gamma.json",
    "sample_compare": "results/*/compare.csv",
    "sample": "results/*/samples/*.png",
    "report": "results/*/report.html",
}


def outputs(place: Place, stage: str) -> dict[str, Any]:
    """The content of each file that a stage wrote, without times."""
    found = {str(path.relative_to(place.folder)): content(path) for path in place.folder.glob(WRITTEN[stage])}
    assert found and not list(place.folder.rglob("*.partial")), sorted(place.folder.rglob("*"))
    return found


def content(path: Path) -> Any:
    if path.suffix in (".pt", ".html"):  # states hold times, and so do reports
        return path.stat().st_size > 0
    if path.suffix == ".json":
        return without_times(strict(path))
    if path.suffix == ".csv":
        return pd.read_csv(path).drop(columns="seconds").to_csv()
    return path.read_bytes()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not TIMES.search(k)}
    return [without_times(v) for v in value] if isinstance(value, list) else value
