"""Inject real faults and count them in a table: promise, fault, number injected, number survived.

FAULTS=whole (make test-faults) injects every fault and writes the table to results/faults/. Without it the same tests
run in a short form, for continuous integration.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "scripts")]

import ledger  # noqa: E402  (in this folder, like pipeline)
from pipeline import Forker, Place  # noqa: E402

IS_WHOLE = os.environ.get("FAULTS") == "whole"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ledger.KEY] = ledger.Ledger()
    config.addinivalue_line("markers", "whole: left out of the short form")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("whole") and not IS_WHOLE]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def whole() -> bool:
    """Whether the tests inject every fault instead of a sample."""
    return IS_WHOLE


@pytest.fixture
def count(request: pytest.FixtureRequest) -> ledger.Count:
    """count(promise, fault, survived) records one injected fault; the test fails at its end if any was not survived."""
    counter = ledger.Count(request.config.stash[ledger.KEY])
    request.addfinalizer(counter.check)
    return counter


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[ledger.KEY]
    if found.rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(ledger.table(found.lines()))
        if IS_WHOLE:
            found.write(ROOT / "results" / "faults")


# ------------------------------------------------------------------------------------------------ the pipeline


@pytest.fixture(scope="session")
def forkers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Forker]]:
    """Two forkers, one per core."""
    started = [Forker(tmp_path_factory.mktemp("forker")) for _ in range(2)]
    yield started
    for forker in started:
        forker.close()


@pytest.fixture(scope="session")
def forker(forkers: list[Forker]) -> Forker:
    return forkers[0]


@dataclass(frozen=True)
class Stages:
    """An uninterrupted pipeline: the place before all stages and after each one, and the seconds that each took."""

    after: dict[str, Place]
    seconds: dict[str, float]

    def before(self, stage: str) -> Place:
        names = list(self.after)
        return self.after[names[names.index(stage) - 1]]


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, forker: Forker) -> Stages:
    """The pipeline after each stage: data, training, gamma, comparison, then optimise, sample and report."""
    base = tmp_path_factory.mktemp("pipeline")
    place = Place(base / "nothing")
    place.folder.mkdir()
    after, seconds = {"nothing": place}, {}
    for stage in ("prepare_data", "train_levels", "measure_gamma", "sample_compare", "optimise"):
        place = place.copy_to(base / stage)
        run = forker(stage, place.arguments())
        assert run.code == 0, str(run)
        after[stage], seconds[stage] = place, run.seconds
    place = place.copy_to(base / "everything")
    for stage in ("sample_compare", "sample", "report"):  # this comparison includes the plans
        run = forker(stage, place.arguments(*(["seeds='0-3'"] if stage == "sample" else [])))
        assert run.code == 0, str(run)
    return Stages({**after, "everything": place}, seconds)
