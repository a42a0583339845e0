"""How far the references still are from an infinitely fine one, by what refining them changes."""

from collections.abc import Sequence
from typing import Any

from .runner import Runner
from .settings import Measurement, describe

LARGE = 0.1  # of an error: a bias above it is a warning


def reference_bias(measured: Sequence[Measurement], runner: Runner) -> dict[str, dict[str, Any]]:
    """The content of reference.json: for each dynamics the "steps" of the reference, the "finest" steps compared, and
    "bias", for the smallest mean squared error compared, of "setting": the relative change that all further refinement
    of the reference would make. Measured errors differ from those to the exact solution by 1/N^2 for a reference of N
    steps, to leading order, so this is a third (1/4 + 1/16 + ...) of the change from half of the reference's grid."""
    out = {}
    for dynamics in dict.fromkeys(m.row["dynamics"] for m in measured):
        own = [m.row for m in measured if m.row["dynamics"] == dynamics]
        out[dynamics] = {"steps": runner.reference_steps[dynamics], "finest": max(row["steps"] for row in own)}
        least = min((row for row in own if row["error"]), key=lambda row: row["error"], default=None)
        if least is not None:
            bias = abs(least["error_to_half"] - least["error"]) / (3 * least["error"])
            out[dynamics] |= {"bias": bias, "setting": describe(least)}
    return out


def bias_text(found: dict[str, dict[str, Any]]) -> str:
    """One line on all references, and a warning for each large bias."""
    known = {dynamics: entry for dynamics, entry in found.items() if "bias" in entry}
    parts = [f"{dynamics} {100 * entry['bias']:.2g}% (of {entry['steps']} steps)" for dynamics, entry in known.items()]
    lines = [f"Bias of the smallest error by its reference: {', '.join(parts)}."] if parts else []
    for dynamics, entry in known.items():
        if entry["bias"] > LARGE:
            text = f"warning: the {dynamics} reference biases the error of {entry['setting']}"
            lines.append(f"{text} by {100 * entry['bias']:.2g}%: set a larger process.base_steps.")
    return "\n".join(lines)
