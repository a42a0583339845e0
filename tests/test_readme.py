"""The README's Python example runs as it stands, and what the README names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) <= 20
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "torch.Size([8, 3, 16, 16])" in capsys.readouterr().out


def test_named_files_and_experiments_exist():
    for name in re.findall(r"`(configs/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
    layout = README.split("## Layout")[1]
    for name in re.findall(r"\b(\w+\.py)\b", layout):
        assert (ROOT / "src" / "mlem_diffusion" / name).is_file(), name
    for name in re.findall(r"^\| `([a-z]\w+)` \|", README, flags=re.M):
        assert (ROOT / "configs" / "experiment" / f"{name}.yaml").is_file(), name
