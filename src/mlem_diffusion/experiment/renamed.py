"""Old names in a user's configuration: one sentence that says the new one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import UserError

KEYS = {
    "compare.n": "compare.num_samples",
    "compare.n_reference": "compare.num_reference",
    "optimise.n_select": "optimise.num_select",
    "optimise.worth": "optimise.ablation",
    "sampler.drift": "sampler.estimator",
    "sampler.cost_knob": "sampler.c (of ml_em) or sampler.switch (of stitched)",
}
IN_LISTS = {"compare.ml_em": {"knobs": "c"}}  # of every entry
EXPERIMENTS = {"celeba64_tiny": "celeba32", "celeba64_short": "celeba64_sprint"}
GONE = ("demo_fast", "demo_method", "celeba16", "celeba64_tiny_four")
TARGETS = {
    "mlem_diffusion.process.": "mlem_diffusion.diffusion.process.",
    "mlem_diffusion.train.": "mlem_diffusion.training.loop.",
    "mlem_diffusion.extractors.": "mlem_diffusion.comparison.features.",
    "mlem_diffusion.analytic.": "mlem_diffusion.models.analytic.",
}


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for the first of a command line's overrides with an old name."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "experiment":
            check_experiment(value)
        for old, new in KEYS.items():
            if key == old or key.startswith(f"{old}."):
                raise UserError(f"{old} is now {new}.")


def check_experiment(name: str) -> None:
    """Raise UserError for an experiment that has another name now, or that only the history holds."""
    if name in EXPERIMENTS:
        raise UserError(f"experiment={name} is now experiment={EXPERIMENTS[name]}.")
    if name in GONE:
        raise UserError(f"experiment={name} is gone: docs/results.md says what it found and which commit holds it.")


def check_config(config: dict[str, Any]) -> None:
    """Raise UserError for the first old name in a composed configuration: that of an experiment file of one's own."""
    for old, new in KEYS.items():
        group, _, key = old.partition(".")
        if isinstance(config.get(group), dict) and key in config[group]:
            raise UserError(f"{old} is now {new}.")
    for path, names in IN_LISTS.items():
        group, _, key = path.partition(".")
        for entry in (config.get(group) or {}).get(key) or ():
            for old, new in names.items():
                if isinstance(entry, dict) and old in entry:
                    raise UserError(f"{path}: {old} is now {new}.")
    for target in _targets(config):
        for old, new in TARGETS.items():
            if target.startswith(old):
                raise UserError(f"_target_: {target} is now {new}{target.removeprefix(old)}.")


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    for value in node if isinstance(node, list) else ():
        yield from _targets(value)
