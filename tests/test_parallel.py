"""Several processes give the result of one, bit for bit; a stop or an error on one ends all."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlem_diffusion import parallel
from mlem_diffusion.comparison.features import Extractor
from mlem_diffusion.comparison.runner import NoiseCache, Runner
from mlem_diffusion.comparison.settings import SamplerSetting
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import Interrupted, SlowPath
from mlem_diffusion.files import read_arrays, write_arrays
from mlem_diffusion.models.family import as_level, build_denoiser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import launch  # noqa: E402

UNET = {"multipliers": [1, 2], "blocks": 1, "attention": [4]}
SETTINGS = [
    SamplerSetting("sde", "ddpm", "single", ("w4",), 5),
    SamplerSetting("ode", "ddim", "ml_em", ("w2", "w4"), 6, "constant", "independent", 2.0),
    SamplerSetting("sde", "ddpm", "ml_em", ("w2", "w4"), 6, "constant", "independent-shared", 2.0),
]


def make_runner(cache: Path) -> Runner:
    """A runner with small random UNets; it has 5 batches per setting and 3 of references, both odd."""
    levels = [as_level(f"w{w}", build_denoiser(w, 8, 0.5, UNET, "v", seed=1).eval(), 1e6 * w**2) for w in (2, 4)]
    extractor = Extractor("FD-mean", "k", lambda images: images.float().mean((2, 3)))
    return Runner(
        levels={level.name: level for level in levels}, process=Process(LinearSchedule(), base_steps=12), gamma=2.5,
        shape=(3, 8, 8), seeds=list(range(100, 113)), num_reference=8, batch=3, device=torch.device("cpu"),
        extractor=extractor, cache=cache, key="a", grid_images=5,
    )  # fmt: skip


def compared(cache: Path) -> dict[str, Any]:
    """All measurements of a comparison except its seconds."""
    runner, noise, out = make_runner(cache), NoiseCache(), {}
    references = {dynamics: runner.reference(dynamics) for dynamics in ("sde", "ode")}
    for i, setting in enumerate(SETTINGS):
        found = runner.run(setting, references[setting.dynamics], noise)
        found["costs"].pop("seconds")
        out |= {f"{i} {name}": value for name, value in found.items()}
    return {**references, **out}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name] if isinstance(a[name], dict) else np.array_equal(a[name], b[name]), name


# --------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two gloo processes call every in_process_*(folder) of this file; return the folder and the results of each."""
    folder = tmp_path_factory.mktemp("two")
    command, port = [sys.executable, str(Path(__file__)), str(folder)], launch.free_port()
    more = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env={**launch.environment(rank, 2, port), **more}, text=True, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        errors = "\n".join(process.communicate(timeout=200)[1] for process in started)
    finally:
        for process in started:
            process.kill()
    if "Address family" in errors or "Permission denied" in errors:
        pytest.skip("processes cannot open sockets here")
    assert not any(process.returncode for process in started), errors[-3000:]
    return folder, [pickle.loads((folder / f"result-{rank}.pkl").read_bytes()) for rank in range(2)]


def in_process_compare(folder: Path) -> Any:
    return compared(folder / f"cache-{parallel.rank()}")  # no process needs the main one's files


def in_process_primitives(folder: Path) -> Any:
    me, taken = parallel.rank(), []
    one_asks = [parallel.agree(False), parallel.agree(me == 1)]
    received = parallel.from_main(lambda: f"from {parallel.rank()}")
    everywhere = parallel.gather({7 - me: me, me: -me})
    parallel.deal(list("abcde"), lambda item: (item, parallel.rank()), taken.append)
    stopped = []
    with pytest.raises(Interrupted, match="after 2 of 5"):
        parallel.deal(list("abcde"), lambda item: item, stopped.append, lambda: me == 1)
    return {"agree": one_asks, "received": received, "gather": everywhere, "deal": taken, "stopped": stopped}


def in_process_serve(folder: Path) -> Any:
    """The main process sends two requests; the first is interrupted on all processes."""
    context: list[Any] = []

    def do(limit: int) -> list[int]:
        found: list[int] = []
        stop = (lambda: len(found) >= limit) if parallel.is_main() else parallel.never
        parallel.deal(range(5), lambda i: i * i, lambda part: found.extend(part.values()), stop)
        return found

    if not parallel.is_main():
        parallel.serve((context, do))
        return context
    parallel.ask(helped, 2)
    with pytest.raises(Interrupted):
        do(2)
    parallel.ask(helped, 9)
    found = do(9)
    parallel.dismiss()
    return found


def helped(context: Any, limit: int) -> None:
    found, do = context
    found.append(limit)
    found.append(do(limit))


def test_two_processes_give_the_comparison_of_one(two, tmp_path):
    """All processes agree bit for bit in errors, features, clusters, first images, references and evaluation counts."""
    folder, found = two
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the two processes also use one thread; rounding depends on the number of threads
    try:
        one = compared(tmp_path)
    finally:
        torch.set_num_threads(threads)
    for of_process in found:
        assert_same(of_process["compare"], one)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 5 and sorted(path.name for path in (folder / "cache-0").iterdir()) == names
    assert not (folder / "cache-1").exists()  # only the main process writes


def test_communication_between_processes(two):
    a, b = (of_process["primitives"] for of_process in two[1])
    assert a == b and a["agree"] == [False, True] and a["received"] == "from 0"
    assert list(a["gather"].items()) == [(0, 0), (1, -1), (6, 1), (7, 0)]
    assert a["deal"] == [{0: ("a", 0), 1: ("b", 1)}, {2: ("c", 0), 3: ("d", 1)}, {4: ("e", 0)}]
    assert a["stopped"] == [{0: "a", 1: "b"}]


def test_processes_serve_until_they_are_dismissed(two):
    main, other = (of_process["serve"] for of_process in two[1])
    assert main == [0, 1, 4, 9, 16] and other == [2, 9, main]  # the first request was interrupted


def test_one_process_needs_no_group():
    taken: list[Any] = []
    parallel.deal("ab", str.upper, taken.append)
    parallel.ask(print, "never printed")
    parallel.dismiss()
    assert taken == [{0: "A"}, {1: "B"}]
    assert parallel.agree(True) and not parallel.agree(False) and parallel.from_main(lambda: 3) == 3


# ------------------------------------------------------------------------------------------------ stopping


def test_a_stop_loses_only_the_batch_in_flight(tmp_path):
    whole, runner = make_runner(tmp_path / "whole").reference("sde"), make_runner(tmp_path / "cache")
    for left in (2, 1):
        with pytest.raises(Interrupted):
            runner.reference("sde", lambda: True)
        assert len(list((tmp_path / "cache").glob("*part*"))) == 3 - left
    counted: list[int] = []
    assert torch.equal(runner.reference("sde", parallel.never, counted.append), whole)
    assert counted == [0, 0, 0]  # progress includes earlier batches
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [runner.reference_path("sde").name]


def test_cached_batches_are_not_computed_again(tmp_path):
    done: list[int] = []

    def work(i: int) -> parallel.Arrays:
        done.append(i)
        return {"x": np.full(2, i)}

    written: list[Any] = []

    def write(arrays: parallel.Arrays) -> None:
        written.append(arrays["x"].tolist())
        (tmp_path / "file").write_text("whole")

    job = parallel.Job(tmp_path / "file", 4, work, write)
    stops = iter([False, True])
    with pytest.raises(Interrupted):
        parallel.run_jobs([job], lambda: next(stops))
    assert done == [0, 1]
    job.part(0).unlink()  # the missing batches are computed, and the order is that of the batches
    for _ in range(2):
        parallel.run_jobs([job])
    assert done == [0, 1, 0, 2, 3] and written == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_batch_is_computed_again(tmp_path):
    done: list[int] = []

    def work(i: int) -> parallel.Arrays:
        done.append(i)
        return {"x": np.full(2, i)}

    job = parallel.Job(tmp_path / "file.npz", 3, work, lambda arrays: write_arrays(tmp_path / "file.npz", arrays))
    with pytest.raises(Interrupted):
        parallel.run_jobs([job], lambda: len(done) == 2)
    job.part(0).write_bytes(job.part(0).read_bytes()[:-5])
    with pytest.warns(SlowPath, match="was damaged, so it is computed again"):
        parallel.run_jobs([job])
    assert done == [0, 1, 0, 2]
    assert read_arrays(tmp_path / "file.npz", "")["x"].tolist() == [0, 0, 1, 1, 2, 2]


def test_parts_of_complete_files_are_removed(tmp_path):
    for name in ("a.npz", "a-part000000.npz", "a-part000001.npz", "b-part000000.npz", "c-partly.npz"):
        (tmp_path / name).write_bytes(b"")
    parallel.remove_parts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b-part000000.npz", "c-partly.npz"]


def test_seconds_are_device_seconds(tmp_path):
    """Seconds per image are summed over all batches and do not shrink with the number of processes."""
    runner = make_runner(tmp_path)
    job = runner.setting_job(SETTINGS[0], runner.reference("sde"), NoiseCache())
    parts = [job.work(i) for i in range(job.count)]
    job.write({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    total = sum(float(part["seconds"].sum()) for part in parts)
    assert runner.read(SETTINGS[0])["costs"]["seconds"] == pytest.approx(total / 13)


# ---------------------------------------------------------------------------------------------- launching


def launched(tmp_path: Path, code: str, count: int = 2) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}\n")
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), str(count), str(script), "a=1"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_launcher_gives_each_process_its_place(tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    code = (
        f"import json; print(json.dumps([os.environ[n] for n in {names}] + sys.argv[1:]) + '\\n', end='', flush=True)"
    )
    out, err = launched(tmp_path, code, 3).communicate(timeout=60)
    found = sorted(json.loads(line) for line in out.splitlines())
    assert [v[:4] + v[5:] for v in found] == [[str(r), str(r), "3", "127.0.0.1", "a=1"] for r in range(3)], err
    assert len({v[4] for v in found}) == 1


@pytest.mark.parametrize(
    ("code", "status"), [("sys.exit(0)", 0), ("sys.exit(2 if rank else 0)", 2), ("sys.exit(75)", 75)]
)
def test_the_launcher_ends_with_the_status_of_the_failed_process(tmp_path, code, status):
    process = launched(tmp_path, code)
    process.communicate(timeout=60)
    assert process.returncode == status


def test_a_signal_reaches_every_process_which_may_finish(tmp_path):
    code = """
import signal
def stop(*_):
    time.sleep(0.3)
    print(f"stopped {rank}\\n", end="", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready\\n", end="", flush=True)
time.sleep(60)
"""
    process = launched(tmp_path, code)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == ["stopped 0", "stopped 1"] and process.returncode == 75


if __name__ == "__main__":
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        folder = Path(sys.argv[1])
        called = {"compare": in_process_compare, "primitives": in_process_primitives, "serve": in_process_serve}
        result = pickle.dumps({name: function(folder) for name, function in called.items()})
        (folder / f"result-{dist.get_rank()}.pkl").write_bytes(result)
        dist.barrier()
    finally:
        dist.destroy_process_group()
