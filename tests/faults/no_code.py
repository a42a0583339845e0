"""Find calls in Python source that can run code from data, without running them; and a command such calls could run."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

PICKLES = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop")
NEVER = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec",
    "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.utils.cpp_extension.load",
    "numpy.lib.format.read_array", "pandas.read_pickle", "hydra.utils.get_object", "hydra.utils.get_class",
    "hydra.utils.get_method", "importlib.import_module", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
INSTANTIATES = "src/mlem_diffusion/experiment/stage.py"  # the only file that may build objects from a configuration


def run(command: str) -> int:
    """The harmful function that attacking configurations name as their target."""
    return os.system(command)


def full_names(tree: ast.AST) -> dict[str, str]:
    """The imported name of each local name."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """A function's full name; empty if the expression is not a name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def is_literally(value: ast.expr | None, wanted: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def of_call(name: str, given: dict[str | None, ast.expr], file: str) -> str:
    """Why a call is forbidden; empty if it is allowed."""
    if name in NEVER or name.split(".")[0] in PICKLES:
        return f"calls {name}"
    if name == "torch.load" and not is_literally(given.get("weights_only"), True):
        return "calls torch.load without weights_only=True"
    if "allow_pickle" in given and not is_literally(given["allow_pickle"], False):
        return f"calls {name or 'something'} with allow_pickle"
    if "shell" in given and not is_literally(given["shell"], False):
        return f"calls {name or 'something'} with shell"
    if name in ("hydra.utils.instantiate", "hydra.utils.call", "instantiate") and file != INSTANTIATES:
        return f"calls {name}, which {INSTANTIATES} alone may"
    return ""


def violations(source: str, file: str) -> Iterator[str]:
    """The forbidden calls and imports of a file, whose name is relative to the repository's root."""
    tree = ast.parse(source)
    names = full_names(tree)
    for local, name in names.items():
        if name.split(".")[0] in PICKLES:
            yield f"{file} imports {name}"
        if name.startswith("hydra.utils.") and local != name.split(".")[-1]:
            yield f"{file} imports {name} under another name"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if found := of_call(dotted(node.func, names), given, file):
                yield f"{file}, line {node.lineno} {found}"


def sources(root: Path) -> list[Path]:
    return sorted(p for folder in ("src", "scripts") for p in (root / folder).rglob("*.py"))
