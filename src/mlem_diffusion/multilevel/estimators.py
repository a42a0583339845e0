"""Multilevel estimators: random telescopes of level differences (ML-EM), and fixed quadratures of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..diffusion.level import Level, check_family
from ..diffusion.sampler import Estimator
from ..errors import UserError
from .probabilities import draw_coins, evaluation_probabilities, telescope_weights


@dataclass(frozen=True)
class Multilevel(Estimator):
    """The ML-EM estimate sum_k (B_k / p_k) (f^k - f^{k-1}), unbiased for the largest level at every evaluation.

    B_k is a coin: 1 with probability p_k, else 0. f^0 = 0. Networks whose total weight is zero are not run.

    p: [K], or [n, K] with one row per network evaluation; p_1 = 1. coins: see probabilities.draw_coins. shared: one set
    of coins for all samples of a batch, keyed by its first seed.
    """

    family: tuple[Level, ...]
    p: np.ndarray
    coins: str = "independent"
    shared: bool = False

    def __post_init__(self) -> None:
        check_family(self.family)
        p = np.asarray(self.p)
        if p.shape[-1] != len(self.family):
            raise UserError(f"{p.shape[-1]} probabilities do not fit {len(self.family)} levels.")
        if not np.all((p > 0) & (p <= 1)) or np.any(p[..., 0] != 1):  # rejects NaN too
            raise UserError("Inclusion probabilities must lie in (0, 1], with p_1 = 1.")

    @property
    def levels(self) -> list[Level]:
        return list(self.family)

    def _table(self, evaluations: int) -> np.ndarray:
        return _rows(self.p, evaluations, "Probabilities")

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        p = self._table(evaluations)
        weights = telescope_weights(p, draw_coins(p, seeds[:1] if self.shared else seeds, self.coins))
        return np.broadcast_to(weights, (evaluations, len(seeds), p.shape[1]))

    def expected_evaluations(self, evaluations: int) -> np.ndarray:
        """Expected evaluations of each level [K] per image, exact; a network with weight zero is not evaluated."""
        return evaluation_probabilities(self._table(evaluations), nested=self.coins == "nested").sum(axis=0)

    def clusters(self, seeds: Sequence[int]) -> list[int]:
        return [seeds[0]] * len(seeds) if self.shared else list(seeds)


@dataclass(frozen=True)
class Quadrature(Estimator):
    """The estimate f^1 + sum_{k>1} W_k (f^k - f^{k-1}) with fixed weights W [n, K]; W_1 = 1, most others are zero.

    A difference that is evaluated at one step also stands for the neighbouring steps. The estimate is biased. table: W,
    from measured effects (options.quadrature_options).
    """

    family: tuple[Level, ...]
    table: np.ndarray

    def __post_init__(self) -> None:
        check_family(self.family)
        table = np.asarray(self.table)
        if table.ndim != 2 or table.shape[1] != len(self.family):
            raise UserError(f"A table of weights {list(table.shape)} does not fit {len(self.family)} levels.")
        if not np.isfinite(table).all() or np.any(table[:, 0] != 1):
            raise UserError("Quadrature weights must be finite, with W_1 = 1.")

    @property
    def levels(self) -> list[Level]:
        return list(self.family)

    def weights(self, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
        # sum_k W_k (f^k - f^{k-1}) = sum_k (W_k - W_{k+1}) f^k
        table = _rows(self.table, evaluations, "Weights")
        networks = table - np.concatenate([table[:, 1:], np.zeros_like(table[:, :1])], axis=1)
        return np.broadcast_to(networks[:, None], (evaluations, len(seeds), networks.shape[1]))


def _rows(values: np.ndarray, evaluations: int, what: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 2 and len(values) != evaluations:
        raise UserError(f"{what} for {len(values)} evaluations do not fit a run of {evaluations}.")
    return np.broadcast_to(values, (evaluations, values.shape[-1]))
