"""Levels: denoisers of increasing accuracy and cost. The FLOPs of a network, and the ledger of what a run has cost."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UserError


@dataclass(frozen=True)
class Level:
    """One denoiser f^k, of any callable; a family is a list of levels.

    denoise maps (x [B,C,H,W], logsnr) to the denoised image [B,C,H,W], for x = alpha x0 + sigma eps with
    alpha^2 = sigmoid(logsnr). logsnr is 0-dimensional if all samples share it, else [B]. flops is the cost of one
    evaluation of one image, in FLOPs or another common unit.

    base: a cheap level from whose output this one starts. `denoise` then takes that output as a third argument too, so
    that levels which run on the same estimate share it; without it, it evaluates the base itself. flops includes it.

    teacher: the name of the level on whose outputs this one was trained, if it was not trained on data alone.

    conditions: the names of the sample's conditions that `denoise` takes as keyword arguments, with one row a sample
    (conditions.py), such as labels; it is never given others.

    guidance: intervals (lowest log-SNR, highest, scale) of the guidance in this level (models/guidance.py). A base then
    is the guide, which runs only within them: elsewhere `denoise` gets None for its output.

    space: the shape of what it denoises and the scaling of latents, such as ("4x32x32", "scale 0.18215, shift 0"); each
    is empty if it is not known."""

    name: str
    denoise: Callable[..., Tensor]
    flops: float
    base: "Level | None" = None
    teacher: str | None = None
    conditions: tuple[str, ...] = ()
    guidance: tuple[tuple[float, float, float], ...] = ()
    space: tuple[str, str] = ("", "")


def base_of(levels: Sequence[Level]) -> Level | None:
    """The base that all levels with a base share; UserError if there are several."""
    bases = {level.base.name: level.base for level in levels if level.base is not None}
    if len(bases) > 1:
        raise UserError(f"Levels can share one base, not {', '.join(bases)}.")
    return next(iter(bases.values()), None)


def runs_base(levels: Sequence[Level], logsnr: float) -> bool:
    """Whether the base that the levels share runs at this log-SNR: a guide does within the intervals of guidance."""
    intervals = next((level.guidance for level in levels if level.base is not None), ())
    at = np.float32(logsnr)  # as levels are given it
    return not intervals or any(low <= at <= high for low, high, _ in intervals)


def base_evaluations(levels: Sequence[Level], logsnr: Iterable[float]) -> int:
    """How often the shared base runs in the estimates at these log-SNRs."""
    return sum(runs_base(levels, float(value)) for value in logsnr)


def with_base(levels: Sequence[Level]) -> list[Level]:
    """The levels, with their base if it is not among them."""
    base = base_of(levels)
    known = base is None or any(level.name == base.name for level in levels)
    return [*levels] if known else [base, *levels]  # type: ignore[list-item]


def shared_costs(levels: Sequence[Level]) -> tuple[np.ndarray, float]:
    """The costs [K] of one more evaluation of each level where the base is known, and that of the base (0 without one).
    The weights of an estimate add up to one, so some level runs and the base runs once: as a level it is free."""
    base, costs = base_of(levels), np.array([level.flops for level in levels])
    if base is None:
        return costs, 0.0
    return costs - [base.flops if level.base or level.name == base.name else 0.0 for level in levels], base.flops


def check_family(levels: Sequence[Level]) -> None:
    """Raise UserError unless the levels have distinct names, strictly increasing, positive cost, one guidance and one
    space of images or latents."""
    if not levels:
        raise UserError("A family needs at least one level.")
    if len({level.name for level in levels}) < len(levels):
        raise UserError(f"Levels need distinct names, not {', '.join(level.name for level in levels)}.")
    costs = [level.flops for level in levels]
    if not costs[0] > 0 or not all(b > a for a, b in pairwise(costs)):  # NaN is refused too
        raise UserError("The levels of a family must be ordered by cost, from cheap to expensive, all above zero.")
    base = base_of(levels)
    own = [level for level in levels if base is None or level.name != base.name]
    for level in own[1:]:
        guided = level.guidance or own[0].guidance
        if guided and (level.guidance, level.base) != (own[0].guidance, own[0].base):  # of other networks, too
            text = "a family has one guidance, and with common=True one guide, the same object for all"
            raise UserError(f"{own[0].name} and {level.name} are guided differently: {text}.")
    if base is not None and len(own) < len(levels) and not runs_base(levels, -np.inf):
        raise UserError(f"{base.name} guides the other levels at some noise levels only, so it cannot be a level too.")
    for one, other in combinations(levels, 2):
        check_space(one, other, "the levels of a family denoise the same images or latents")


def check_space(one: Level, other: Level, why: str) -> None:
    """UserError if it is known that two levels denoise different images or latents."""
    for own, its in zip(one.space, other.space, strict=True):
        if own and its and own != its:
            raise UserError(f"{one.name} denoises {own}, and {other.name} {its}: {why}.")


def weight_type(network: Any) -> torch.dtype | None:
    """The type of a module's first floating-point parameter; None for other callables."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


def flops_per_evaluation(
    network: nn.Module, shape: Sequence[int], time: Tensor | None = None, /, **conditioning: Any
) -> float:
    """FLOPs of network(x [1, *shape], time, **conditioning), on the meta device, where fused attention counts too.
    A multiply-add counts 2; norms and activations 0. time: by default a float [1]. conditioning: on the meta device."""
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    kept = [(module, dict(vars(module))) for module in network.modules()]
    x = torch.empty(1, *shape, device="meta", dtype=weight_type(network))
    time = torch.empty(1, device="meta") if time is None else time.to("meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(network, meta, (x, time), conditioning)
    finally:
        for module, attributes in kept:  # some networks keep tensors of their forward pass
            vars(module).clear()
            vars(module).update(attributes)
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Ledger:
    """Evaluations of each level for each image, counted as they happened."""

    flops: list[float]  # FLOPs per evaluation of one image, per level, beyond a shared base
    per_sample: np.ndarray  # [images, K] evaluations, images in the order of their batches
    seconds: float  # wall-clock seconds of sampling
    base_flops: float = 0.0  # per image, spent on the base that the levels share

    @property
    def evaluations(self) -> list[int]:
        """Evaluations of each level, summed over the images."""
        return self.per_sample.sum(axis=0).tolist()

    @property
    def flops_per_image(self) -> float:
        own = sum(n * t for n, t in zip(self.evaluations, self.flops, strict=True))
        return own / len(self.per_sample) + self.base_flops


def joined(ledgers: Sequence[Ledger]) -> Ledger:
    """The ledger of several batches with the same levels."""
    per_sample = np.concatenate([ledger.per_sample for ledger in ledgers])
    return Ledger(ledgers[0].flops, per_sample, sum(ledger.seconds for ledger in ledgers), ledgers[0].base_flops)
