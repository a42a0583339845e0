"""Faults are injected for real and counted: promise, faults injected, survived.

FAULTS=whole (make test-faults) runs every fault and writes the table to results/faults/; without it a short form of the
same tests runs, for continuous integration.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "scripts")]

import ledger  # noqa: E402  (beside this file)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ledger.KEY] = ledger.Ledger()


@pytest.fixture(scope="session")
def whole() -> bool:
    """Whether every fault is to be injected, not a sample of them."""
    return os.environ.get("FAULTS") == "whole"


@pytest.fixture
def count(request: pytest.FixtureRequest) -> ledger.Count:
    """count(promise, fault, survived): one fault was injected; the test fails at its end where one was not survived."""
    counter = ledger.Count(request.config.stash[ledger.KEY])
    request.addfinalizer(counter.check)
    return counter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[ledger.KEY]
    if found.rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(found.table())
        if os.environ.get("FAULTS") == "whole":
            found.write(ROOT / "results" / "faults")
