"""A process that has imported everything and forks once per command, so that a script starts in milliseconds.

It reads one JSON object per line on stdin: script, arguments, environment, out, err (files) and group (a process group
of its own). Three more keys inject a fault: kill_at (SIGKILL itself at the event of this number that touches a file),
memory (bytes that may be added to the address space) and files (that may be open at a time).
It answers with two lines: {"pid"}, then {"status", "events"}.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing.util
import os
import resource
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITING = {"os.rename", "os.remove", "os.truncate"}  # audit events; also "open", if it is for writing
SCRIPTS = (
    "prepare_data", "train_levels", "measure_gamma", "optimise", "sample_compare", "sample", "report", "publish",
    "check_precision",
)  # fmt: skip


def touches(event: str, arguments: tuple) -> bool:
    if event == "open":
        path, _, flags = arguments
        return bool(flags & (os.O_WRONLY | os.O_RDWR)) and not str(path).startswith(("/dev", "/proc"))
    return event in WRITING


def count_events(kill_at: int | None, count: list[int]) -> None:
    """Count the events that touch files, and kill this process at event number `kill_at`, like a machine failure."""

    def hook(event: str, arguments: tuple) -> None:
        if touches(event, arguments):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(order: dict, answer: int) -> None:
    for number in (1, 2):
        file = os.open(order["out" if number == 1 else "err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    if order.get("group"):
        os.setpgid(0, 0)
    os.environ.update(order.get("environment", {}))
    sys.argv = [str(ROOT / "scripts" / f"{order['script']}.py"), *order["arguments"]]
    count = [0]
    count_events(order.get("kill_at"), count)
    if order.get("memory"):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + order["memory"],) * 2)
    if order.get("files"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["files"],) * 2)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # as at the end of any script
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answer, json.dumps({"events": count[0]}).encode())
    os._exit(code)


def main() -> None:
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "src")]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in (
        "torch_fidelity",
        "jinja2",
        "scipy.linalg",
        "scipy.special",
        "matplotlib.figure",
        "PIL.Image",
        *SCRIPTS,
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(order, writing)
        os.close(writing)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(reading) as pipe:
            reply = pipe.read()
        events = json.loads(reply)["events"] if reply else None
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "events": events}), flush=True)


if __name__ == "__main__":
    main()
