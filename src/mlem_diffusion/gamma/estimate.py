"""Gamma with intervals from the measured errors of a family, the answer to gamma > 2, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .intervals import Interval
from .power_law import FITS, Fit

HTMC_THRESHOLD = 2.0


@dataclass(frozen=True)
class LevelErrors:
    """Squared errors of a family of denoisers, all evaluated on the same images, noise levels and noise.

    K levels (cheap to expensive), M images, S noise levels. Errors are means over channels and pixels, for images in
    [-1, 1]. Raises UserError if the shapes do not match, the FLOPs do not ascend, or a value is not finite.
    """

    widths: list[int | None]
    names: list[str]
    flops: np.ndarray  # [K] FLOPs per evaluation of one image, ascending
    images: list[int]  # images seen in training, per level
    logsnr: np.ndarray  # [S] noise levels
    weights: np.ndarray  # [S] sum 1: the sampler's weighting, used to pool over noise levels
    loss: np.ndarray  # [K, M, S] |f^k - x0|^2 per image, mean over channels and pixels
    to_previous: np.ndarray  # [K-1, M, S] |f^k - f^(k-1)|^2, k = 2..K
    to_largest: np.ndarray  # [K-1, M, S] |f^k - f^K|^2, k = 1..K-1

    def __post_init__(self) -> None:
        for name in ("flops", "logsnr", "weights", "loss", "to_previous", "to_largest"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        levels = len(self.names)
        if levels < 2 or self.loss.ndim != 3:
            raise UserError("Level errors need at least two levels and a loss of shape [levels, images, noise levels].")
        _, images, noise_levels = self.loss.shape
        shapes = {
            "flops": (levels,),
            "logsnr": (noise_levels,),
            "weights": (noise_levels,),
            "loss": (levels, images, noise_levels),
            "to_previous": (levels - 1, images, noise_levels),
            "to_largest": (levels - 1, images, noise_levels),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape:
                raise UserError(f"Level errors: {name} has shape {array.shape}, expected {shape}.")
            if not np.isfinite(array).all():
                raise UserError(f"Level errors: {name} holds values that are not finite.")
        if len(self.widths) != levels or len(self.images) != levels:
            raise UserError("Level errors: widths, names and images must have one entry per level.")
        if images < 2 or noise_levels < 1:
            raise UserError("Level errors need at least two images and one noise level.")
        if self.flops[0] <= 0 or (np.diff(self.flops) <= 0).any():
            raise UserError("Level errors: the levels' FLOPs must be positive and ascending.")
        if (self.weights < 0).any() or abs(self.weights.sum() - 1) > 1e-6:
            raise UserError("Level errors: the weights over noise levels must be non-negative and sum to 1.")
        if min(self.loss.min(), self.to_previous.min(), self.to_largest.min()) < 0:
            raise UserError("Level errors: squared errors cannot be negative.")


def estimate(
    errors: LevelErrors, *, seed: int = 0, bootstrap: int = 400, between: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The three estimates of gamma, pooled with `errors.weights` and at each noise level, ready for JSON.

    Keys: unit, estimates (loss_fit, differences, to_largest), htmc, htmc_reason, levels, points (pooled values with
    standard errors over images, for plots), per_noise_level (without bootstrap, so its intervals are profile
    intervals). Amplitudes are for T in GFLOP. between: for each estimate, the variance of a value's logarithm between
    training seeds (`training_seeds.seed_spread`); it enters the pooled intervals. Raises UserError with fewer than
    three levels.
    """
    if len(errors.names) < 3:
        raise UserError("Estimating gamma needs at least three levels; seven or more give useful intervals.")
    arrays = {"loss_fit": errors.loss, "differences": errors.to_previous, "to_largest": errors.to_largest}
    pooled = {name: array @ errors.weights for name, array in arrays.items()}  # [n, M]
    fits = {
        name: FITS[name](
            errors.flops,
            values.mean(1),
            covariance=np.cov(values) / values.shape[1],
            between=(between or {}).get(name, 0.0),
            bootstrap=bootstrap,
            seed=seed,
        )
        for name, values in pooled.items()
    }
    htmc, reason = htmc_answer(fits)
    gflop = errors.flops / 1e9
    loss_se = _standard_error(pooled["loss_fit"])
    # Images differ far more than levels do, so levels are compared by their loss minus the mean over all levels.
    contrast_se = _standard_error(pooled["loss_fit"] - pooled["loss_fit"].mean(0))
    points: dict[str, list[dict[str, Any]]] = {}
    for name, values in pooled.items():
        means, ses, fitted = values.mean(1), _standard_error(values), fits[name].fitted
        at = gflop if name == "loss_fit" else gflop[1:] if name == "differences" else gflop[:-1]
        points[name] = [
            {
                "gflop": float(at[i]),
                "value": float(means[i]),
                "se": float(ses[i]),
                "fitted": None if fitted is None else float(fitted[i]),
            }
            for i in range(len(means))
        ]
    for i, point in enumerate(points["loss_fit"]):
        point["contrast_se"] = float(contrast_se[i])
    for i, point in enumerate(points["differences"]):
        point["gflop_previous"] = float(gflop[i])
    per_noise_level = []
    for j, logsnr in enumerate(errors.logsnr):
        means_at = {name: array[:, :, j].mean(1) for name, array in arrays.items()}
        found = {name: FITS[name](errors.flops, means_at[name]) for name in FITS}
        per_noise_level.append(
            {
                "logsnr": float(logsnr),
                "weight": float(errors.weights[j]),
                "estimates": {n: {"gamma": f.gamma, "interval": list(f.interval)} for n, f in found.items()},
                "loss": means_at["loss_fit"].tolist(),
                "to_previous": means_at["differences"].tolist(),
                "to_largest": means_at["to_largest"].tolist(),
            }
        )
    return {
        "unit": "FLOPs",
        "estimates": {name: _as_json(fit) for name, fit in fits.items()},
        "htmc": htmc,
        "htmc_reason": reason,
        "levels": [
            {
                "name": errors.names[k],
                "width": errors.widths[k],
                "gflop": float(gflop[k]),
                "images": int(errors.images[k]),
                "loss": float(pooled["loss_fit"][k].mean()),
                "loss_se": float(loss_se[k]),
            }
            for k in range(len(errors.names))
        ],
        "points": points,
        "per_noise_level": per_noise_level,
    }


def htmc_answer(fits: dict[str, Fit]) -> tuple[str, str]:
    """Whether the problem is harder than Monte Carlo (HTMC, gamma > 2): "yes", "no" or "undetermined", and a reason.

    The two estimates without L_inf decide together: "yes" if both intervals are above 2, "no" if both are below. The
    loss fit is often too weak to decide, but it can veto by an interval on the other side, or by a loss that does not
    fall with FLOPs. If a deciding estimate has no finite exponent (levels that do not approach each other), the answer
    is "undetermined".
    """
    deciding = {"differences": fits["differences"], "to_largest": fits["to_largest"]}
    loss = fits["loss_fit"]
    for name, fit in deciding.items():
        if fit.gamma is None:
            return "undetermined", f"The estimate from {name} has no finite exponent. {fit.note}"
    if not loss.falls:
        return (
            "undetermined",
            "The loss does not fall measurably with FLOPs, so the levels are no hierarchy of accuracy.",
        )

    def side(fit: Fit) -> int:
        low, high = fit.interval
        return 1 if low > HTMC_THRESHOLD else -1 if high is not None and high < HTMC_THRESHOLD else 0

    intervals = "; ".join(f"{n} {_interval_text(f.interval)}" for n, f in {**deciding, "loss_fit": loss}.items())
    sides = {side(fit) for fit in deciding.values()}
    if len(sides) == 1 and 0 not in sides:
        direction = sides.pop()
        where = "above" if direction > 0 else "below"
        if side(loss) == -direction:
            return (
                "undetermined",
                f"The level differences put gamma {where} 2, the loss on the other side: {intervals}.",
            )
        return (
            "yes" if direction > 0 else "no",
            f"Both estimates from level differences lie {where} 2: {intervals}.",
        )
    return "undetermined", f"The 95% intervals do not settle on which side of 2 gamma lies: {intervals}."


def hierarchy_warnings(errors: LevelErrors) -> list[str]:
    """Sentences about neighbouring levels that do not get better or closer as assumed; empty if all do.

    Each pair has three checks, pooled and per noise level, with two standard errors over the same images (paired).
    The loss falls. E|f^k - f^(k-1)|^2 per unit of log FLOPs falls from one pair to the next (a power law is convex in
    log FLOPs). The levels are nested: E|f^k - f^(k-1)|^2 is about the drop in loss, and at most twice the drop.
    """
    found = []
    names = errors.names
    per_log = errors.to_previous / np.log(errors.flops[1:] / errors.flops[:-1])[:, None, None]
    for k in range(1, len(names)):
        low, high = names[k - 1], names[k]
        drop = errors.loss[k - 1] - errors.loss[k]
        where = _where(errors, drop, positive=False)
        if where:
            worse = _where(errors, -drop, positive=True)
            text = f"{high} is not measurably better than {low} in loss {where}"
            found.append(f"{text}, and worse {worse}." if worse else f"{text}.")
        if k >= 2:
            where = _where(errors, per_log[k - 2] - per_log[k - 1], positive=False)
            if where:
                found.append(f"{low} to {high} is not a smaller step than {names[k - 2]} to {low} {where}.")
        where = _where(errors, errors.to_previous[k - 1] - 2 * drop, positive=True)
        if where:
            found.append(f"{low} and {high} differ by more than twice the drop in loss {where}: they are not nested.")
    return found


def _where(errors: LevelErrors, values: np.ndarray, *, positive: bool) -> str:
    """The noise levels where the mean over images of values [M, S] is (not) above two standard errors, as text."""

    def hit(x: np.ndarray) -> np.ndarray:
        return (x.mean(0) > 2 * _standard_error(x.T)) == positive

    places = [f"{value:.1f}" for value in errors.logsnr[hit(values)]]
    parts = ["pooled"] if bool(hit(values @ errors.weights)) else []
    if places:
        parts.append(f"at log-SNR {', '.join(places)} ({len(places)} of {len(errors.logsnr)} noise levels)")
    return " and ".join(parts)


def _standard_error(values: np.ndarray) -> np.ndarray:
    return values.std(-1, ddof=1) / np.sqrt(values.shape[-1])


def _interval_text(interval: Interval) -> str:
    high = "unbounded" if interval[1] is None else f"{interval[1]:.2f}"
    return f"[{interval[0]:.2f}, {high}]"


def _as_json(fit: Fit) -> dict[str, Any]:
    return {
        "gamma": fit.gamma,
        "interval": list(fit.interval),
        "profile_interval": list(fit.profile_interval),
        "bootstrap_interval": None if fit.bootstrap_interval is None else list(fit.bootstrap_interval),
        "amplitude": fit.amplitude,
        "floor": fit.floor,
        "degrees_of_freedom": fit.degrees_of_freedom,
        "rms_residual": fit.rms_residual,
        "note": fit.note,
    }
