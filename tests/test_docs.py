"""README and docs: the Python example runs, links and names exist, and tables of numbers match the committed runs."""

import re
from pathlib import Path

import pytest
from tables import README, ROOT, TABLES, between

PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_table_holds_the_numbers_of_the_committed_runs(page: Path, name: str) -> None:
    assert between(page.read_text(), name)[1].strip() == TABLES[page, name](), "run python docs/tables.py"


def test_python_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) <= 20
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "torch.Size([8, 3, 16, 16])" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`(configs/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\b([a-z]+/[a-z_]+\.py)\b", text):
        assert (ROOT / "src" / "mlem_diffusion" / name).is_file() or (ROOT / name).is_file(), name
    for name in re.findall(r"EXPERIMENT=([a-z]\w+)", text):
        assert name in ("name", "mine") or (ROOT / "configs" / "experiment" / f"{name}.yaml").is_file(), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", text)) <= targets


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 10_000
    assert max(len(line) for line in README.read_text().splitlines() if not line.startswith(("|", "$"))) <= 120
