"""The decorator of every script: Hydra, device, lock, finished work, provenance, signals and one-sentence errors."""

import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import TqdmMonitorWarning

from .. import parallel
from ..errors import SYSTEM_ERRORS, Interrupted, SlowPath, UserError, is_out_of_memory
from ..files import locked
from . import runs
from .checks import settle
from .config import ROOT, given
from .experiment import Experiment
from .tracking import catch_signals, lenient_streams, release_signals, stop_asked

STOPPED = 75  # exit status of work that was stopped


def stage(
    outputs: Sequence[str] = (), depends: Sequence[str] = (), reads: Sequence[str] = (), cost: runs.Cost | None = None,
    trained: bool = False, folder: str | None = None,
) -> Callable[[Callable[[Experiment], object]], Callable[[], None]]:  # fmt: skip
    """Make main(exp) a script; its name is that of the script's file.
    outputs: files in the results folder. The stage is finished if they exist and were made from equal `depends`, which
    are groups of the configuration, and equal `reads`: "images", "levels", or files of earlier stages. cost(exp,
    levels): evaluations of each level by name, for a dry run. trained: there is nothing to do for a family of
    functions. folder: name of the results folder, if it is independent of the experiment."""

    def decorate(main: Callable[[Experiment], object]) -> Callable[[], None]:
        file = Path(main.__code__.co_filename)
        name, process, failed = file.stem, os.getpid(), []
        if main.__module__ == "__main__" and Path(sys.path[0]).resolve() == file.resolve().parent:
            del sys.path[0]  # the scripts must not hide modules of the user, such as sample.py
        if file.resolve().parents[1] != ROOT:
            print(f"{name}: the package in use is that of {ROOT}: run pip install -e . here.", file=sys.stderr)
            sys.exit(2)

        def work(cfg: DictConfig) -> None:
            settle(cfg, given())
            exp = Experiment(name, cfg, folder)
            if trained and cfg.family.callable is not None:
                exp.print(f"{name}: nothing to do, the levels of this experiment are functions (family.callable).")
                return
            if cfg.dry_run:
                exp.print(runs.estimate(exp, cost))
                return
            alone = parallel.is_main() and cfg.only is None  # jobs that train single levels share the folder
            with locked(exp.results / "cache", name, beside=True) if alone else nullcontext():
                if outputs and exp.is_finished(outputs, depends, reads):
                    return
                main(exp)
                parallel.barrier()
                exp.finish()

        @hydra.main(version_base=None, config_path=str(ROOT / "configs"), config_name="config")
        @functools.wraps(main)
        def job(cfg: DictConfig) -> None:
            try:
                guarded(name, lambda: work(cfg))
            except SystemExit as end:
                here = os.getpid() == process and parallel.world() == 1  # ranks would wait for each other
                if end.code == STOPPED or not here or HydraConfig.get().mode != RunMode.MULTIRUN:
                    raise
                failed.append(end.code)  # the other jobs of the sweep do not depend on this one

        def script() -> None:
            # Hydra reads a ~ only in quotes
            sys.argv[1:] = [re.sub(r"""^([+\w.]+=)(~[^'"]*)$""", r"\1'\2'", word) for word in sys.argv[1:]]
            failed.clear()
            job()
            if failed:
                print(f"{name}: {len(failed)} of the sweep's jobs ended with an error (see above).", file=sys.stderr)
                sys.exit(max(failed))

        return script

    return decorate


def guarded(name: str, work: Callable[[], None]) -> None:
    """Run the work as one of torchrun's ranks, or alone; errors are printed and end the process."""
    # each warning is one line, without its place in the code
    warnings.formatwarning = lambda message, *where, **more: f"{name}: {message}\n"
    # torch itself still uses it for its forward derivatives
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", category=TqdmMonitorWarning)  # bars also work without a thread
    warnings.filterwarnings("ignore", message=".*tasks which were still being processed")  # joblib, after a stop
    catch_signals()
    with lenient_streams():
        try:
            parallel.connect(stop_asked)
            if not parallel.is_main():
                warnings.filterwarnings("ignore", category=SlowPath)
            work()
        except (UserError, Interrupted, KeyboardInterrupt, OSError, MemoryError, RuntimeError, ImportError) as error:
            sys.exit(report(name, error))
        finally:
            release_signals()


def report(name: str, error: BaseException) -> int:
    """Print why the stage ended, in one line for expected errors, and return the exit status."""
    status = 2
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, (Interrupted, KeyboardInterrupt)):
        reason = str(error) or "stopped; finished work is saved"
        text, status = f"{reason}, run the same command again to continue.", STOPPED
    elif isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror}{where}: fix this and run the same command again."
    elif "gloo/transport" in str(error):
        text, status = "another process of this run ended (see above); run the same command again.", STOPPED
    elif is_out_of_memory(error):
        text = "there is not enough memory: set smaller batches (compare.batch, gamma.batch), train.accumulate=2 "
        text += "(trains the same) or ARGS=workers=1."
    else:
        traceback.print_exception(error)
        return 1
    print(f"{name}: {text}", file=sys.stderr)
    return status
