"""The README's Python example runs as it stands, and what the README names exists."""

from __future__ import annotations

import json
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


def measured_table() -> str:
    """The README's table of results, from the committed files: `python tests/test_readme.py` prints it."""
    folders = [folder for name in ("demo", "celeba16", "celeba64_tiny") if (folder := ROOT / "results" / name).is_dir()]
    gammas = [json.loads((folder / "gamma.json").read_text()) for folder in folders]
    speedups = [json.loads((folder / "speedup.json").read_text()) for folder in folders]

    def gamma(result: dict, name: str) -> str:
        estimate = result["estimates"][name]
        low, high = estimate["interval"]
        value = "no finite value" if estimate["gamma"] is None else f"{estimate['gamma']:.1f}"
        return f"{value} [{low:.1f}, {'unbounded' if high is None else f'{high:.1f}'}]"

    def speedup(result: dict, dynamics: str, kind: str, measure: str, cost: str) -> str:
        entry = result[dynamics][kind][measure][cost]
        return "not reached" if entry["max"] is None else f"{entry['max']:.2f} (>= {entry['lower95']:.2f})"

    def ratio(result: dict, dynamics: str, kind: str) -> str:
        entry = result[dynamics][kind]["error"]["flops"]["error_ratio_at_equal_cost"]
        return "none" if entry["max"] is None else f"{entry['max']:.2f} (>= {entry['lower95']:.2f})"

    rows = [("measured (95% intervals and lower bounds)", *(f"`{folder.name}`" for folder in folders))]
    rows.append(("---",) * len(rows[0]))
    for name, words in (
        ("loss_fit", "gamma, loss fit"),
        ("differences", "gamma, neighbouring levels"),
        ("to_largest", "gamma, against the largest"),
    ):
        rows.append((words, *(gamma(result, name) for result in gammas)))
    rows.append(("harder than Monte Carlo", *(result["htmc"] for result in gammas)))
    for dynamics in ("sde", "ode"):
        for kind in ("paper", "any"):
            label = f"{dynamics.upper()}, {kind} ML-EM"
            for measure in ("error", "distance"):
                cells = (speedup(result, dynamics, kind, measure, "flops") for result in speedups)
                rows.append((f"{label}: speed-up in FLOPs at equal {measure}", *cells))
            rows.append(
                (
                    f"{label}: speed-up in seconds at equal error",
                    *(speedup(r, dynamics, kind, "error", "seconds") for r in speedups),
                )
            )
            rows.append(
                (f"{label}: error ratio at equal FLOPs", *(ratio(result, dynamics, kind) for result in speedups))
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


METHODS = {
    "plain, constant p": "independent coins, constant p",
    "plain, measured p": "independent coins, p from measured differences",
    "plain, learned p": "independent coins, learned p",
    "plain, optimal p": "independent coins, optimal p",
    "nested, optimal p": "nested coins, optimal p",
    "systematic, constant p": "systematic coins, constant p",
    "systematic, optimal p": "systematic coins, optimal p",
    "quadrature": "quadrature",
}


def method_table() -> str:
    """The README's table of estimators, from verdicts.json of the committed runs; printed like the one above."""
    wanted = [
        ("analytic", "sde/ddpm"),
        ("analytic", "ode/dpmpp_2m"),
        ("demo_method", "sde/ddpm"),
        ("demo_method", "ode/dpmpp_2m"),
    ]
    columns = []
    for folder, rule in wanted:
        path = ROOT / "results" / folder / "verdicts.json"
        if path.is_file() and rule in (content := json.loads(path.read_text())):
            columns += [(f"{folder}, {rule}: {words}", content[rule][key]) for key, words in
                        (("against_em", "EM"), ("against_all_baselines", "all"))]  # fmt: skip
    rows = [("estimator", *(title for title, _ in columns)), ("---",) * (len(columns) + 1)]
    for key, words in METHODS.items():
        cells = []
        for _, found in columns:
            bounds = [p["lower95"] for p in found.get(key, {}).get("curve", []) if p["lower95"] is not None]
            four = next((w for w in found.get(key, {}).get("windows", []) if w["least"] == 4), None)
            window = f"; 4x over {four['factor']:.1f}" if four and four["factor"] > 1 else ""
            cells.append(f"{max(bounds):.3g}{window}" if bounds else "")
        if any(cells):
            rows.append((words, *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_table_of_estimators_is_that_of_the_committed_runs():
    assert method_table() in README, "run python tests/test_readme.py and put its second table into the README"


def test_the_results_in_the_readme_are_those_of_the_committed_runs():
    assert measured_table() in README, "run python tests/test_readme.py and put its table into the README"


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z_]+@", README)


if __name__ == "__main__":
    print(measured_table(), method_table(), sep="\n\n")
