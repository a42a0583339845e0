"""Records of a run: always metrics.jsonl, and a copy in Weights & Biases if it is installed and not disabled."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import atomic_write
from . import wandb_process

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

PATIENCE = wandb_process.PATIENCE
HURRY = 2.0  # PATIENCE after a stop or an error


class Tracker:
    """Appends one JSON object per record to metrics.jsonl and sends the same to W&B.

    mode: "offline", "online" or "disabled", as WANDB_MODE. fresh: drop the records of earlier runs of this stage.
    W&B runs in its own process (wandb_process.py). Only `finish` waits for it, at most PATIENCE seconds. If W&B fails,
    one warning is given, and metrics.jsonl is still written.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        config: dict[str, Any],
        mode: str = "offline",
        project: str = "mlem-diffusion",
        fresh: bool = False,
    ):
        self.path, self.stage, self.dropped = directory / "metrics.jsonl", stage, False
        self.wandb: wandb_process.Mirror | None = None
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory):
            _drop_torn_line(self.path)
            if fresh:
                self._rewrite(lambda record: record.get("stage") != stage)
        if mode == "disabled":
            return
        if not wandb_process.installed():
            _off("not installed")
            return
        name = f"{config.get('name', directory.name)}-{stage}"
        options = {"project": project, "name": name, "job_type": stage, "config": config, "mode": mode}
        try:
            self.wandb = wandb_process.Mirror({**options, "dir": str(directory)})
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            _off(str(error))

    def log(self, record: dict[str, Any]) -> None:
        """Add one record of numbers and strings."""
        line = self._line(record)
        with _alone(self.path.parent):
            _append(self.path, line)
        self._send({"log": record})

    def mirror(self, record: dict[str, Any]) -> None:
        """Send a record to W&B that is already in metrics.jsonl."""
        self._send({"log": record})

    def image(self, key: str, path: Path) -> None:
        """Send a grid or plot that was just written to W&B."""
        if path.is_file():
            self._send({"image": {key: str(path.absolute())}})

    def settle(self, records: Sequence[dict[str, Any]]) -> None:
        """Log records that an interrupted run may have logged already, without duplicates."""
        with _alone(self.path.parent):
            self._rewrite(lambda _: True, [self._line(record) for record in records])
        for record in records:
            self._send({"log": record})

    def rewind(self, level: str, images: int) -> None:
        """Drop this stage's records of a level after `images` images: training resumes at this point."""
        with _alone(self.path.parent):
            self._rewrite(lambda record: not (self._own(record, [level]) and _number(record["images"]) > images))

    def take_over(self, path: Path) -> None:
        """Move the records of another metrics.jsonl to this one, in place of this stage's records of the same levels.

        A stop at any moment loses nothing, and the next call completes the move.
        """
        if not path.is_file():
            return
        records = [{k: v for k, v in record.items() if k != "stage"} for _, record in _records(path)]
        levels = [record["level"] for record in records if "level" in record]
        with _alone(self.path.parent):
            self._rewrite(lambda record: not self._own(record, levels), [self._line(record) for record in records])
        path.unlink()
        for record in records:
            self._send({"log": record})

    def _line(self, record: dict[str, Any]) -> bytes:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        return (json.dumps({"stage": self.stage, **finite}, allow_nan=False) + "\n").encode()

    def _own(self, record: dict[str, Any], levels: list[Any]) -> bool:
        """Whether this stage wrote the record while it trained one of these levels."""
        return record.get("stage") == self.stage and record.get("level") in levels and "images" in record

    def _rewrite(self, keep: Callable[[dict[str, Any]], bool], more: Sequence[bytes] = ()) -> None:
        """Replace the file by the lines whose record passes `keep`, followed by `more`, without duplicates of these."""
        new = set(more)
        lines = [line for line, record in _records(self.path) if line not in new and keep(record)]
        text = b"".join([*lines, *more])
        if (self.path.read_bytes() if self.path.is_file() else b"") != text:
            atomic_write(self.path, lambda p: p.write_bytes(text))

    def _send(self, line: dict[str, Any]) -> None:
        if self.wandb is None:
            return
        if (reason := self.wandb.failure()) is not None:
            self.wandb = None
            _off(reason)
        elif not self.wandb.send(line) and not self.dropped:
            self.dropped = True
            warnings.warn("W&B cannot keep up and misses records; metrics.jsonl has them all.", stacklevel=3)

    def finish(self, patience: float | None = None) -> None:
        """Let W&B finish within `patience` seconds (default: PATIENCE), or end it."""
        patience = PATIENCE if patience is None else patience
        if self.wandb is None:
            return
        mirror, self.wandb = self.wandb, None
        try:
            reason = mirror.finish(patience)
        except TimeoutError:
            warnings.warn(f"W&B did not finish within {patience:g} s; metrics.jsonl is complete.", stacklevel=2)
            return
        if reason is not None:
            _off(reason)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(None if kind is None else HURRY)


def _off(reason: str) -> None:
    warnings.warn(f"W&B is off ({reason}); metrics.jsonl is still written.", stacklevel=3)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Admit one process at a time: several may write to this file while another one rewrites it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _append(path: Path, line: bytes) -> None:
    """Append a line in one write, so that a kill damages at most the last line.

    Raises UserError, without a partial line, if the disk is full.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            if file.write(line) < len(line):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): fix this and run the same command again."
        ) from error


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that a kill left incomplete."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every line that holds a record, with the record."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append((line + b"\n", record))
    return found


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else -math.inf
