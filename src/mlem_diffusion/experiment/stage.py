"""The decorator of every script: Hydra, device, lock, finished work, provenance, signals and one-sentence errors."""

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from tqdm import TqdmMonitorWarning

from .. import parallel
from ..errors import SYSTEM_ERRORS, Interrupted, SlowPath, UserError, is_out_of_memory
from ..files import locked
from . import costs, signals
from .environment import ROOT
from .experiment import Experiment

__all__ = ["Experiment", "stage"]

Cost = Callable[[Experiment], list[tuple[str, Any]]]


def stage(
    outputs: Sequence[str] = (),
    depends: Sequence[str] = (),
    reads: Sequence[str] = (),
    cost: Cost | None = None,
    trained: bool = False,
    folder: str | None = None,
    shared: Callable[[Any], bool] = lambda cfg: False,
) -> Callable[[Callable[[Experiment], object]], Callable[[], None]]:
    """Make main(exp) a script; its name is that of the script's file.

    outputs: files in the results folder. The stage is finished if they exist and were made from equal `depends`, which
    are groups of the configuration, and equal `reads`: "images", "levels", or files of earlier stages. cost(exp): rows
    (text, {level: evaluations}) for a dry run. trained: there is nothing to do for a family of functions. folder: name
    of the results folder, if it is independent of the experiment. shared(cfg): whether runs may share the folder.
    """

    def decorate(main: Callable[[Experiment], object]) -> Callable[[], None]:
        name = Path(main.__code__.co_filename).stem

        def work(cfg: DictConfig) -> None:
            exp = Experiment(name, cfg, folder)
            if trained and cfg.family.callable is not None:
                exp.print(f"{name}: nothing to do, the levels of this experiment are functions (family.callable).")
            elif cfg.dry_run:
                exp.print(costs.estimate(exp, cost))
            else:
                run(exp)

        def run(exp: Experiment) -> None:
            alone = locked(exp.results / "cache", exp.name) if parallel.is_main() and not shared(exp.cfg) else None
            with alone or nullcontext():
                key = exp.finished_key(depends, reads) if outputs else ""
                if outputs and exp.is_finished(key, outputs):
                    return
                main(exp)
                parallel.barrier()
                exp.finish(key)

        @hydra.main(version_base=None, config_path=str(ROOT / "configs"), config_name="config")
        @functools.wraps(main)
        def script(cfg: DictConfig) -> None:
            with quiet(name):
                status = guarded(name, lambda: work(cfg))
            if status:
                sys.exit(status)

        return script

    return decorate


def guarded(name: str, work: Callable[[], None]) -> int:
    """Run the work as one of torchrun's ranks, or alone; print its errors and return the exit status."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # gloo transfers Python objects
        dist.init_process_group(backend, timeout=timedelta(days=7))  # one rank may do hours of work alone
    signals.catch()
    try:
        work()
    except (UserError, Interrupted, KeyboardInterrupt, OSError, MemoryError, RuntimeError, ImportError) as error:
        return report(name, error)
    finally:
        signals.release()
    return 0


def report(name: str, error: BaseException) -> int:
    """Print why the stage ended, in one line for expected errors, and return the exit status."""
    text, status = "", 2
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, Interrupted):
        text, status = f"{error}, run the same command again to continue.", signals.STOPPED
    elif isinstance(error, KeyboardInterrupt):
        text = "stopped; finished work is saved, run the same command again to continue."
        status = signals.STOPPED
    elif isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror}{where}: fix this and run the same command again."
    elif is_out_of_memory(error):
        text = (
            "there is not enough memory: use smaller batches (compare.batch, gamma.batch), more parts of a batch "
            "(train.accumulate=2 trains the same) or fewer workers (ARGS=workers=1)."
        )
    else:
        traceback.print_exception(error)
        return 1
    print(f"{name}: {text}", file=sys.stderr)
    return status


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Print each SlowPath warning as one line, without its place in the code, and drop those of libraries."""
    # torch itself still uses it for its forward derivatives
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", category=TqdmMonitorWarning)  # bars also work without a thread
    warnings.filterwarnings("ignore", message=".*tasks which were still being processed")  # joblib, after a stop
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, SlowPath):
            before(message, category, *where, **more)
        elif parallel.is_main():
            print(f"{name}: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
