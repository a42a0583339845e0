"""The miniature pipeline, run once for all tests that need its files."""

import os
import signal
from collections.abc import Iterator

import pytest
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from pipeline import Here, Place, apart

STAGES = ["prepare_data", "train_levels", "optimise", "measure_gamma", "sample_compare", "sample", "report"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that two workers end together; the one that makes the pipeline before all others."""
    slow = ["test_pipeline", "test_training_loop", "test_parallel", "test_learned", "test_networks", "test_data"]
    slow += ["test_kills", "test_resources", "test_damage", "test_divergence"]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


@pytest.fixture
def here(capsys, monkeypatch, tmp_path_factory) -> Iterator[Here]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # previews take half of a miniature training; the pipeline that `done` runs has them
    monkeypatch.setattr("mlem_diffusion.experiment.level_training.preview", lambda *drawn: None)
    yield Here(capsys, monkeypatch, tmp_path_factory.mktemp("cwd"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """The finished pipeline, which no test may change, and what it printed; one for all of xdist's workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    place, printed = Place(shared / "pipeline"), shared / "pipeline.txt"
    with FileLock(shared / "pipeline.lock"):
        if not printed.is_file():
            scripts = [(stage, *(["seeds='0-2,5'"] if stage == "sample" else [])) for stage in STAGES]
            finished = apart(place, *scripts)
            assert finished.code == 0, f"{finished.out}\n{finished.err}"
            assert "Traceback" not in finished.err and "Warning" not in finished.err, finished.err
            printed.write_text(finished.out)
    return place, printed.read_text()
