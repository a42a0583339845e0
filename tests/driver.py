"""Runs the scripts of [[name, arguments], ...], one after another, in this process. Two more arguments, n and a folder:
SIGKILL just before the n-th time that a file in the folder is opened for writing, renamed or removed."""

import itertools
import json
import os
import runpy
import signal
import sys
from typing import Any


def kill_at(event: int, folder: str) -> None:
    touched = itertools.count(1)

    def hook(name: str, details: tuple[Any, ...]) -> None:
        if name in ("open", "os.rename", "os.remove") and str(details[0]).startswith(folder):
            writes = name != "open" or details[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and next(touched) == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    scripts, *killed = sys.argv[1:]
    if killed:
        kill_at(int(killed[0]), killed[1])
    for script, arguments in json.loads(scripts):
        sys.argv = [f"scripts/{script}.py", *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
