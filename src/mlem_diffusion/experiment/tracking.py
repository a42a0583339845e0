"""What a run shows and hears: progress bars, records, and the signals that stop it.
Records go to metrics.jsonl, and a copy to Weights & Biases if it is installed and not disabled. Ctrl-C, SIGTERM and
SIGHUP set a flag; the work saves its state and stops, or is ended after a few seconds."""

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from .. import parallel
from ..errors import Interrupted, SlowPath, UserError
from ..files import read_json, write_json

TIMEOUT, PATIENCE = 20.0, 60.0  # seconds for W&B to begin a run, and to finish it
GRACE = 5.0  # seconds to save and stop
_FREE = ("max_minutes", "overwrite", "force", "workers", "threads", "tracking")  # may change in a W&B run
_asked = False


class Tracker:
    """Appends records to metrics.jsonl, and copies them to W&B from there: workers and ranks append to the same file.
    The name of a PNG or CSV file in the folder is sent as a picture or table. A stage with the same settings continues
    its W&B run, whose id is in the cache. W&B fails at most once: then one warning is given, and the run goes on."""

    def __init__(self, folder: Path, stage: str, config: dict[str, Any], mode: str, project: str):
        self.folder, self.stage, self.config, self.project = folder, stage, config, project
        self.path, self.run = folder / "metrics.jsonl", None
        off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
        self.mode: Any = "disabled" if off else (mode or "offline").strip().lower()
        same = repr(sorted((k, v) for k, v in config.items() if k not in _FREE))
        self.key = hashlib.sha256(same.encode()).hexdigest()
        self.state = folder / "cache" / f"wandb-{stage}-{config.get('only') or 'all'}.json"
        # what a stage has logged with other settings stays in its own W&B run
        self.id, self.sent = os.urandom(6).hex(), self.path.stat().st_size if self.path.is_file() else 0
        with contextlib.suppress(UserError, LookupError, TypeError, ValueError):
            self.id, sent = read_json(self.state, "")[self.key]
            self.sent = min(self.sent, int(sent))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record of numbers and strings, in one write; UserError if the disk is full."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps({"stage": self.stage, **finite}, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror or error}).") from error
        self._mirror()

    def finish(self) -> None:
        """Let W&B finish; it may take PATIENCE seconds, for instance to upload."""
        self._mirror()
        if self.run is not None:
            ending = threading.Thread(target=self._try, args=(lambda wandb, run: run.finish(),), daemon=True)
            ending.start()
            ending.join(PATIENCE)
            if ending.is_alive():
                warnings.warn(f"W&B did not end in {PATIENCE:g} s; metrics.jsonl is complete.", SlowPath, stacklevel=2)

    def _mirror(self) -> None:
        """Send the records that metrics.jsonl has gained."""
        if self.mode == "disabled" or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.sent)
            lines = [line for line in file.readlines() if line.endswith(b"\n")]
        self.sent += sum(map(len, lines))
        for record in map(json.loads, lines):
            if record.pop("stage") == self.stage:
                self._try(lambda wandb, run, new=record: run.log({k: self._shown(wandb, v) for k, v in new.items()}))
        if lines:
            self._try(lambda wandb, run: write_json(self.state, {self.key: [self.id, self.sent]}))

    def _shown(self, wandb: Any, value: Any) -> Any:
        if (path := self.folder / str(value)).suffix == ".csv":
            return wandb.Table(dataframe=pd.read_csv(path).replace({float("nan"): None}))
        return wandb.Image(str(path)) if path.suffix == ".png" else value

    def _try(self, action: Any) -> None:
        if self.mode == "disabled":
            return
        try:
            import wandb

            if self.run is None:
                if "WANDB_MODE" in os.environ:  # W&B refuses what we understand: empty or upper case
                    os.environ["WANDB_MODE"] = self.mode
                settings = wandb.Settings(silent=True, init_timeout=TIMEOUT, console="off", resume="allow")
                group = str(self.config.get("name", self.folder.name))
                self.run = wandb.init(
                    project=self.project, group=group, name=f"{group}-{self.stage}", job_type=self.stage, id=self.id,
                    config=self.config, mode=self.mode, dir=str(self.folder), settings=settings, reinit="create_new",
                )  # fmt: skip
                self.run.define_metric("train/*", step_metric="train/images_seen")
            action(wandb, self.run)
        except (Exception, SystemExit) as error:
            self.mode = "disabled"
            reason = " ".join(map(str.strip, str(error).splitlines()[:3])) or type(error).__name__
            warnings.warn(f"W&B is off ({reason}); metrics.jsonl is still written.", SlowPath, stacklevel=3)


class bar(tqdm):
    """A bar on rank 0, which is also a callback (done, total) that raises Interrupted if the work should stop."""

    def __init__(
        self, label: str, total: int | None, unit: str = "img", should_stop: Callable[[], bool] = parallel.never,
        position: int | None = None,
    ):  # fmt: skip
        self.should_stop = should_stop
        file: Any = Lenient(sys.stderr)
        seconds = 1.0 if file.isatty() else 30.0  # a log file needs few lines
        super().__init__(
            total=total, desc=label, unit=unit, position=position, unit_scale=True, dynamic_ncols=True, leave=False,
            mininterval=seconds, disable=not parallel.is_main(), file=file,
        )  # fmt: skip

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        self.update(done - self.n)
        if done < total and self.should_stop():
            raise Interrupted("stopped; finished work is saved")


class Lenient:
    """A stream for messages that never raises: what cannot be shown is lost, and the work goes on."""

    def __init__(self, stream: Any):
        self.stream = stream
        if stream is None:  # closed by the shell: 2>&-
            self.stream = open(os.devnull, "w")  # noqa: SIM115
            os.set_inheritable(self.stream.fileno(), True)  # workers need it
        if isinstance(stream, io.TextIOWrapper):
            self._try(lambda: stream.reconfigure(errors="backslashreplace"))  # letters that the encoding lacks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except (OSError, ValueError):  # its reader or terminal has gone, or it was closed
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())  # also for what it still holds


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Context in which no print, warning or bar can end the work."""
    out: Any = Lenient(sys.stdout)
    err: Any = Lenient(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()


def catch_signals() -> None:
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _stop)
    signal.signal(signal.SIGALRM, _end)


def release_signals() -> None:
    """Restore Python's own handlers."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) == _stop:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def stop_asked() -> bool:
    """Whether a signal asked this process, or its parent, to stop."""
    return _asked or parallel.stop_requested()


def _stop(number: int, frame: Any) -> None:
    global _asked
    if not _asked:  # launchers often send a signal twice
        _asked = True
        signal.setitimer(signal.ITIMER_REAL, GRACE)


def _end(number: int, frame: Any) -> None:
    release_signals()  # a further signal ends the process at once
    raise KeyboardInterrupt
