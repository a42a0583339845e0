"""A table of the faults injected and survived."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlem_diffusion.files import write_json, write_text

PROMISES = {
    1: "killed at any moment, nothing is lost",
    2: "broken inputs give the right result or one sentence",
    3: "no code runs from data",
    4: "wrong numbers say so",
    5: "resources that fail stop nothing silently",
    6: "memory and file handles stay flat",
}


@dataclass
class Ledger:
    """Counts per fault: (promise, fault) -> [injected, survived], in the order of first use."""

    rows: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def add(self, promise: int, fault: str, survived: bool, times: int = 1) -> None:
        row = self.rows.setdefault((promise, fault), [0, 0])
        row[0] += times
        row[1] += times * bool(survived)

    def lines(self) -> list[Line]:
        ordered = sorted(self.rows.items(), key=lambda item: item[0][0])
        return [(f"{p}. {PROMISES[p]}", fault, *counts) for (p, fault), counts in ordered]

    def write(self, folder: Path) -> None:
        """Write faults.json, and README.md with the table.

        Rows of an earlier run stay unless this run injected the same faults (`make test-faults ARGS="-k kills"`).
        """
        path, before = folder / "faults.json", []
        with contextlib.suppress(OSError, ValueError, KeyError):
            before = json.loads(path.read_text())["rows"]
        when, names = time.strftime("%Y-%m-%d", time.gmtime()), ("promise", "fault", "injected", "survived")
        new = [{**dict(zip(names, line, strict=True)), "date": when} for line in self.lines()]
        own = {(row["promise"], row["fault"]) for row in new}
        rows = [row for row in before if (row["promise"], row["fault"]) not in own] + new
        rows.sort(key=lambda row: row["promise"])
        write_json(path, {"python": platform.python_version(), "system": platform.system(), "rows": rows})
        text = "# Faults injected and survived\n\nWritten by `make test-faults`; what each fault is: tests/faults/.\n\n"
        write_text(folder / "README.md", text + table([tuple(row[name] for name in names) for row in rows]) + "\n")


KEY = pytest.StashKey[Ledger]()
Line = tuple[str, str, int, int]


def table(lines: Sequence[Line]) -> str:
    """The table in Markdown, with the sums."""
    body = [f"| {promise} | {fault} | {injected:,} | {survived:,} |" for promise, fault, injected, survived in lines]
    head = ["| promise | fault | injected | survived |", "| --- | --- | ---: | ---: |"]
    injected, survived = (sum(line[i] for line in lines) for i in (2, 3))
    return "\n".join([*head, *body, f"| all | | {injected:,} | {survived:,} |"])


class Count:
    """One test's access to the ledger."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.lost = ledger, []

    def __call__(self, promise: int, fault: str, survived: bool, detail: str = "") -> None:
        """Record one injected fault; `detail` is shown if it was not survived."""
        self.ledger.add(promise, fault, survived)
        if not survived:
            self.lost.append(f"{fault}: {detail}")

    def check(self) -> None:
        assert not self.lost, f"{len(self.lost)} not survived:\n" + "\n".join(self.lost[:20])
