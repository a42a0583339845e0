"""Handles Ctrl-C and SIGTERM from the first import on: import this before modules that load slowly (torch)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

TRY_AGAIN = 75  # exit status, as in mlem_diffusion.experiment.interrupts


def _end(number: int, frame: Any) -> None:
    text = f"{Path(sys.argv[0]).stem}: stopped before the stage began; run the same command again."
    os.write(2, text.encode() + b"\n")
    os._exit(TRY_AGAIN)


def _is_script() -> bool:
    return Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent


if "__mp_main__" in sys.modules:  # a worker imports the script when it starts; its parent gets the signal too
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, signal.SIG_IGN)
elif _is_script():
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _end)
