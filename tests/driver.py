"""Runs the scripts of [[name, arguments], ...], one after another, in this process."""

import json
import runpy
import sys

sys.path.insert(0, "scripts")
for script, arguments in json.loads(sys.argv[1]):
    sys.argv = [f"scripts/{script}.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
