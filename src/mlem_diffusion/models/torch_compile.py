"""torch.compile with a cache on disk and a fallback to eager execution if compilation fails."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import SlowPath, UserError

SETTINGS = ("auto", "on", "off", "max")
_PROGRAMS = 256  # programs that dynamo may cache per function: each level of a family needs its own


def should_compile(setting: str, device: torch.device | str) -> bool:
    """Return whether to compile ("on" and "max": yes, "off": no, "auto": on CUDA); UserError for other settings."""
    if setting not in SETTINGS:
        raise UserError(f"compile = {setting!r} is unknown; expected one of {', '.join(SETTINGS)}.")
    return setting in ("on", "max") or (setting == "auto" and torch.device(device).type == "cuda")


def options(setting: str, device: torch.device | str) -> dict[str, Any]:
    """Return inductor options: 1x1 convolutions as matrix products and, for "max", kernel tuning, which takes minutes.

    CUDA graphs are left to the callers, who know which buffers are fixed.
    """
    if torch.device(device).type != "cuda":
        return {}
    tuned = {"coordinate_descent_tuning": True, "max_autotune": True} if setting == "max" else {}
    return {"conv_1x1_as_mm": True, "triton.cudagraphs": False, **tuned}


def use_compile_cache() -> Path:
    """Set TORCHINDUCTOR_CACHE_DIR if it is unset, and return it: the cache of compiled programs between runs."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / "mlem-diffusion" / "compile")
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def compiled(function: Callable[..., Any], what: str, **torch_compile: Any) -> Callable[..., Any]:
    """Compile a function or module, named `what` in warnings; keywords are as in torch.compile.

    If the first compiled call fails but the eager call works, the function stays eager, with a SlowPath warning.
    Out-of-memory errors, and errors after a compiled call has worked, are raised. The result has `is_compiled()`.
    """
    use_compile_cache()
    for name in ("recompile_limit", "cache_size_limit"):  # the second is for older versions of torch
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, max(_PROGRAMS, getattr(torch._dynamo.config, name)))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns CPU users that CUDA is missing
    try:
        fast = torch.compile(function, **torch_compile)
    except Exception as error:  # torch.compile does not support this Python or system
        unsupported = error

        def fast(*args: Any) -> Any:
            raise unsupported

    return _Compiled(function, what, fast)


class _Compiled:
    def __init__(self, function: Callable[..., Any], what: str, fast: Callable[..., Any]):
        self.function, self.what, self.fast = function, what, fast
        self.works: bool | None = None  # None: not tried yet

    def is_compiled(self) -> bool:
        """Return whether compilation has worked or is still to be tried."""
        return self.works is not False

    def __call__(self, *args: Any) -> Any:
        if self.works is False:
            return self.function(*args)
        try:
            out = self.fast(*args)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if self.works:
                raise
            out = self.function(*args)  # raises the function's own errors
            self.works = False
            warnings.warn(
                f"{self.what} runs eagerly: compilation failed ({first_line(error)}).", SlowPath, stacklevel=2
            )
            return out
        self.works = True
        return out


def first_line(error: BaseException) -> str:
    """Return the first line of an error that is not blank, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:160]
