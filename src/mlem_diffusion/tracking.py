"""Records of a run: metrics.jsonl always; Weights & Biases mirrors it when it is installed and not disabled."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from .checkpoint import atomic_write


class Tracker:
    """Appends one JSON object per record to metrics.jsonl and sends the same to W&B.

    mode: "offline", "online" or "disabled", as WANDB_MODE. fresh: drop what an earlier run of this
    stage recorded. A W&B failure becomes a warning: the record goes on.
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
        self.path, self.stage, self.run = directory / "metrics.jsonl", stage, None
        directory.mkdir(parents=True, exist_ok=True)
        if fresh and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = "".join(line for line in lines if f'"stage": "{stage}"' not in line)
            atomic_write(self.path, lambda p: p.write_text(kept))
        if mode == "disabled":
            return
        try:
            import wandb

            name = f"{config.get('name', directory.name)}-{stage}"
            settings = wandb.Settings(silent=True, console="off")
            self.run = wandb.init(
                project=project,
                name=name,
                job_type=stage,
                config=config,
                mode=mode,  # type: ignore[arg-type]
                dir=str(directory),
                settings=settings,
            )
        except Exception as error:
            warnings.warn(f"W&B is off ({error}); metrics.jsonl goes on.", stacklevel=2)

    def log(self, record: dict[str, Any]) -> None:
        """One record of plain numbers and strings."""
        with self.path.open("a") as file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            file.write(json.dumps({"stage": self.stage, **finite}, allow_nan=False) + "\n")
        self._send(record)

    def mirror(self, record: dict[str, Any]) -> None:
        """Send a record to W&B that metrics.jsonl holds already."""
        self._send(record)

    def image(self, key: str, path: Path) -> None:
        """A grid or plot that was just written."""
        if self.run is not None and path.is_file():
            import wandb

            self._send({key: wandb.Image(str(path))})

    def _send(self, record: dict[str, Any]) -> None:
        if self.run is not None:
            try:
                self.run.log(record)
            except Exception as error:
                warnings.warn(f"W&B is off ({error}); metrics.jsonl goes on.", stacklevel=2)
                self.run = None

    def finish(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                warnings.warn(f"W&B did not finish ({error}); metrics.jsonl is complete.", stacklevel=2)
            self.run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
