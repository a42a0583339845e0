"""Old names in a user's configuration: each raises an error that gives the new name."""

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
IN_LISTS = {"compare.ml_em": {"knobs": "c"}}  # in every entry of the list
EXPERIMENTS = {"celeba64_tiny": "celeba32", "celeba64_short": "celeba64_sprint"}
GONE = ("demo_fast", "demo_method", "celeba16", "celeba64_tiny_four")
TARGETS = {
    "mlem_diffusion.process.": "mlem_diffusion.diffusion.process.",
    "mlem_diffusion.train.": "mlem_diffusion.training.loop.",
    "mlem_diffusion.extractors.": "mlem_diffusion.comparison.features.",
    "mlem_diffusion.analytic.": "mlem_diffusion.models.analytic.",
}


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for the first command-line override with an old name."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "experiment":
            check_experiment(value)
        for old, new in KEYS.items():
            if key == old or key.startswith(f"{old}."):
                raise UserError(f"{old} is now {new}.")


def check_experiment(name: str) -> None:
    """Raise UserError for an experiment that was renamed or removed."""
    if name in EXPERIMENTS:
        raise UserError(f"experiment={name} is now experiment={EXPERIMENTS[name]}.")
    if name in GONE:
        raise UserError(f"experiment={name} was removed: see docs/results.md for its results and its commit.")


def check_config(config: dict[str, Any]) -> None:
    """Raise UserError for the first old name in a composed configuration, such as in a user's own experiment file."""
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
