"""torch.compile with a cache on disk and a fallback to eager execution if compilation fails."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import SlowPath, UserError, is_out_of_memory

T = TypeVar("T")

SETTINGS = ("auto", "on", "off", "max")
_PROGRAMS = 256  # programs that dynamo may cache per function: each level of a family needs its own


def should_compile(setting: str, device: torch.device | str) -> bool:
    """Return whether to compile ("on" and "max": yes, "off": no, "auto": on CUDA); UserError for other settings."""
    if setting not in SETTINGS:
        raise UserError(f"compile = {setting!r} is unknown; expected one of {', '.join(SETTINGS)}.")
    return setting in ("on", "max") or (setting == "auto" and torch.device(device).type == "cuda")


def options(setting: str, device: torch.device | str) -> dict[str, Any]:
    """Return torch.compile's arguments: 1x1 convolutions as matrix products; "max" tunes kernels, which takes minutes.

    CUDA graphs are left to the callers, who know which buffers are fixed.
    """
    if torch.device(device).type != "cuda":
        return {}
    tuned = {"coordinate_descent_tuning": True, "max_autotune": True} if setting == "max" else {}
    return {"options": {"conv_1x1_as_mm": True, "triton.cudagraphs": False, **tuned}}


class Compiled:
    """A function or module that is compiled when it is first used.

    If the first use fails but works with the eager function, the function stays eager, with one SlowPath warning that
    begins with `what`. Out-of-memory errors, and errors after the first use, are raised. Keywords: as in torch.compile.
    """

    def __init__(self, function: Callable[..., Any], what: str, **torch_compile: Any):
        self.function, self.what, self.settings = function, what, torch_compile
        self.tried, self.failed = False, False

    def __call__(self, *args: Any) -> Any:
        return self.use(lambda function: function(*args))

    def use(self, work: Callable[[Callable[..., Any]], T]) -> T:
        """Return work(function); its first call also decides whether the function is compiled."""
        if self.tried:
            return work(self.function)
        try:
            _prepare()
            fast = torch.compile(self.function, **self.settings)
            result = work(fast)
            self.function = fast
        except Exception as error:
            if is_out_of_memory(error):
                raise
            result = work(self.function)  # raises the function's own errors
            self.failed = True
            text = f"{self.what} runs eagerly: compilation failed ({first_line(error)})."
            warnings.warn(text, SlowPath, stacklevel=3)
        self.tried = True
        return result


def _prepare() -> None:
    """Keep compiled programs on disk between runs, and as many in memory as a family of levels needs."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "mlem-diffusion" / "compile"))
    for name in ("recompile_limit", "cache_size_limit"):  # the second is for older versions of torch
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, max(_PROGRAMS, getattr(torch._dynamo.config, name)))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns CPU users that CUDA is missing


def first_line(error: BaseException) -> str:
    """Return the first line of an error that is not blank, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:160]
