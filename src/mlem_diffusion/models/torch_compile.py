"""torch.compile with a cache on disk between runs, and eagerly on where compilation fails."""

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
_PROGRAMS = 256  # that dynamo may keep of one function: every level of a family is a program of its own


def should_compile(setting: str, device: torch.device | str) -> bool:
    """Whether to compile: "on" and "max" yes, "off" no, "auto" on CUDA alone; UserError for anything else."""
    if setting not in SETTINGS:
        raise UserError(f"compile = {setting!r} is unknown; expected one of {', '.join(SETTINGS)}.")
    return setting in ("on", "max") or (setting == "auto" and torch.device(device).type == "cuda")


def options(setting: str, device: torch.device | str) -> dict[str, Any]:
    """Inductor options: 1x1 convolutions as matrix products, and for "max" tuned kernels, which takes minutes more.

    CUDA graphs are left to the callers: they know which buffers stay where they are.
    """
    if torch.device(device).type != "cuda":
        return {}
    tuned = {"coordinate_descent_tuning": True, "max_autotune": True} if setting == "max" else {}
    return {"conv_1x1_as_mm": True, "triton.cudagraphs": False, **tuned}


def use_compile_cache() -> Path:
    """The folder in which compiled programs are kept between runs: TORCHINDUCTOR_CACHE_DIR, set here unless it is."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / "mlem-diffusion" / "compile")
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def compiled(function: Callable[..., Any], what: str, **torch_compile: Any) -> Callable[..., Any]:
    """torch.compile of a function or module, called `what` in warnings; keywords as in torch.compile.

    Where its first call fails and the eager one does not, it stays eager and warns SlowPath. Running out of memory, and
    whatever fails once it has worked, is raised. The result has `is_compiled()`.
    """
    use_compile_cache()
    for name in ("recompile_limit", "cache_size_limit"):  # the second is the name in older versions
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, max(_PROGRAMS, getattr(torch._dynamo.config, name)))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells CPU users that they lack CUDA
    try:
        fast = torch.compile(function, **torch_compile)
    except Exception as error:  # on a Python or a system that it does not support
        unsupported = error

        def fast(*args: Any) -> Any:
            raise unsupported

    return _Compiled(function, what, fast)


class _Compiled:
    def __init__(self, function: Callable[..., Any], what: str, fast: Callable[..., Any]):
        self.function, self.what, self.fast = function, what, fast
        self.works: bool | None = None  # None: not tried yet

    def is_compiled(self) -> bool:
        """Whether it is, or will be tried."""
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
            out = self.function(*args)  # an error of the function's own is raised here
            self.works = False
            warnings.warn(
                f"{self.what} runs eagerly: compilation failed ({first_line(error)}).", SlowPath, stacklevel=2
            )
            return out
        self.works = True
        return out


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:160]
