"""What was injected and what was survived, as a table."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

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
    """(promise, fault) -> [injected, survived], in the order of first mention."""

    rows: dict[tuple[int, str], list[int]] = field(default_factory=dict)

    def add(self, promise: int, fault: str, survived: bool, times: int = 1) -> None:
        row = self.rows.setdefault((promise, fault), [0, 0])
        row[0] += times
        row[1] += times * bool(survived)

    def lines(self) -> list[tuple[str, str, int, int]]:
        ordered = sorted(self.rows.items(), key=lambda item: item[0][0])
        return [(f"{p}. {PROMISES[p]}", fault, *counts) for (p, fault), counts in ordered]

    def total(self) -> tuple[int, int]:
        return sum(r[0] for r in self.rows.values()), sum(r[1] for r in self.rows.values())

    def table(self) -> str:
        """Markdown."""
        body = [f"| {p} | {fault} | {injected:,} | {survived:,} |" for p, fault, injected, survived in self.lines()]
        injected, survived = self.total()
        head = ["| promise | fault | injected | survived |", "| --- | --- | ---: | ---: |"]
        return "\n".join([*head, *body, f"| all | | {injected:,} | {survived:,} |"])

    def write(self, folder: Path) -> None:
        """README.md and faults.json."""
        folder.mkdir(parents=True, exist_ok=True)
        when = time.strftime("%Y-%m-%d", time.gmtime())
        names = ("promise", "fault", "injected", "survived")
        facts = {"date": when, "python": platform.python_version(), "system": platform.system()}
        rows = [dict(zip(names, line, strict=True)) for line in self.lines()]
        (folder / "faults.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
        text = f"# Faults injected and survived\n\nWritten by `make test-faults` on {when}; what each fault is: tests/faults/.\n\n"
        (folder / "README.md").write_text(text + self.table() + "\n")


KEY = pytest.StashKey[Ledger]()


class Count:
    """One test's access to the ledger."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.lost = ledger, []

    def __call__(self, promise: int, fault: str, survived: bool, detail: str = "") -> None:
        """One fault was injected. detail: what happened, shown where it was not survived."""
        self.ledger.add(promise, fault, survived)
        if not survived:
            self.lost.append(f"{fault}: {detail}")

    def check(self) -> None:
        assert not self.lost, f"{len(self.lost)} not survived:\n" + "\n".join(self.lost[:20])
