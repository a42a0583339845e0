"""Conditions of samples: labels, embeddings, masks, by name; tensors [B, ...], also nested, with one row a sample.
A level takes the ones that it names, and gets the rows of the samples on which it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UserError
from .level import Level

Conditions = Mapping[str, Any]
ConditionsOf = Conditions | Callable[[list[int]], Conditions] | None  # of given samples, or of the seeds of any


def conditions_of(given: ConditionsOf, seeds: list[int], device: torch.device) -> dict[str, Any]:
    """The conditions of the samples with these seeds, on the device; UserError unless all have one row a sample."""
    given = given(seeds) if callable(given) else {} if given is None else given
    if not isinstance(given, Mapping):
        raise UserError(f"Conditions are a mapping from names to tensors, not a {type(given).__name__}.")
    found = dict(given)
    for name, value in found.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if not tensors:
            raise UserError(f"The condition {name} has no tensor: give it as a tensor with one row a sample.")
        for tensor in tensors:
            if tensor.shape[:1] != (len(seeds),):
                rows = f"{len(tensor)} rows" if tensor.ndim else "no rows"
                raise UserError(f"The condition {name} has {rows} for {len(seeds)} samples: give it one row a sample.")
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), found)


def rows_of(conditions: Conditions, rows: Any) -> dict[str, Any]:
    """The conditions of some samples; rows: what indexes a tensor."""
    return tree_map_only(Tensor, lambda tensor: tensor[rows], dict(conditions))


def taken(level: Level, conditions: Conditions, rows: Any = None) -> dict[str, Any]:
    """The keyword arguments of a level for a batch with these conditions; UserError if it needs one that is missing."""
    if not level.conditions:
        return {}
    if missing := [name for name in level.conditions if name not in conditions]:
        where = f"BrownianPath(..., conditions={{'{missing[0]}': a tensor [B, ...]}})"
        raise UserError(f"{level.name} needs the condition {missing[0]} of each sample: {where}.")
    own = {name: conditions[name] for name in level.conditions}
    return own if rows is None else rows_of(own, rows)


def bound(levels: Sequence[Level], conditions: Conditions) -> list[Level]:
    """The levels on whole batches of the samples with these conditions, as levels that need none."""

    def one(level: Level) -> Level:
        own = partial(level.denoise, **taken(level, conditions)) if level.conditions else level.denoise
        base = level.base and one(level.base)
        return replace(level, denoise=own, base=base, conditions=())

    return [one(level) for level in levels]


def check_taken(levels: Sequence[Level], conditions: Conditions) -> None:
    """UserError for a condition that no level of a family takes."""
    known = {name for level in levels for name in (*level.conditions, *(level.base.conditions if level.base else ()))}
    if unknown := [name for name in conditions if name not in known]:
        raise UserError(f"No level takes the condition {unknown[0]}; they take {', '.join(sorted(known)) or 'none'}.")
