"""Gamma with intervals from the measured errors of a family, and the answer to gamma > 2."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .power_law import Fit, Interval, fit


@dataclass(frozen=True)
class LevelErrors:
    """Squared errors of K levels (cheap to expensive) on the same M images, S noise levels and noise; means over
    channels and pixels, for images in [-1, 1]."""

    widths: list[int]
    names: list[str]
    flops: np.ndarray  # [K] FLOPs per evaluation of one image, ascending
    images: list[int]  # images seen in training, per level
    logsnr: np.ndarray  # [S] noise levels
    weights: np.ndarray  # [S] sum 1, used to pool over noise levels
    loss: np.ndarray  # [K, M, S] |f^k - x0|^2 per image
    to_previous: np.ndarray  # [K-1, M, S] |f^k - f^(k-1)|^2, k = 2..K
    to_largest: np.ndarray  # [K-1, M, S] |f^k - f^K|^2, k = 1..K-1

    @property
    def by_form(self) -> dict[str, np.ndarray]:
        """The squared errors [n, M, S] that each law is fitted to."""
        return {"loss_fit": self.loss, "differences": self.to_previous, "to_largest": self.to_largest}


def estimate(errors: LevelErrors, seed: int, bootstrap: int, between: Mapping[str, float] | None = None) -> dict:
    """The estimates of gamma by all laws, pooled over noise levels and at each noise level, ready for JSON.

    Amplitudes are for T in GFLOP. per_noise_level has no bootstrap, only profile intervals. between: the variances of
    `seed_variances`, for the pooled intervals."""
    fits, points = {}, {}
    for form, values in errors.by_form.items():
        pooled = values @ errors.weights  # [n, M]
        covariance = np.cov(pooled) / pooled.shape[1]
        variance = (between or {}).get(form, 0.0)
        fits[form] = fit(form, errors.flops, pooled.mean(1), covariance, variance, bootstrap, seed)
        points[form] = _points(errors.flops / 1e9, form, pooled)
    htmc, reason = htmc_answer(fits)
    levels = {"name": errors.names, "width": errors.widths, "gflop": errors.flops / 1e9, "images": errors.images}
    levels["loss"] = (errors.loss @ errors.weights).mean(1)
    return {
        "estimates": {form: {k: v for k, v in vars(f).items() if k != "falls"} for form, f in fits.items()},
        "htmc": htmc,
        "htmc_reason": reason,
        "levels": pd.DataFrame(levels).to_dict("records"),
        "points": points,
        "per_noise_level": [
            {"logsnr": float(value), "estimates": _at_noise_level(errors, j)} for j, value in enumerate(errors.logsnr)
        ],
    }


def _points(gflop: np.ndarray, form: str, values: np.ndarray) -> list[dict]:
    """The pooled values [n, M] of a law as points of a plot."""
    columns = {"gflop": gflop[: len(values)], "value": values.mean(1), "se": standard_errors(values)}
    if form == "loss_fit":
        # images differ far more than levels do, so levels are compared by their loss minus the mean over all levels
        columns["contrast_se"] = standard_errors(values - values.mean(0))
    if form == "differences":
        columns |= {"gflop": gflop[1:], "gflop_previous": gflop[:-1]}
    return pd.DataFrame(columns).to_dict("records")


def _at_noise_level(errors: LevelErrors, j: int) -> dict[str, Any]:
    fits = {form: fit(form, errors.flops, values[:, :, j].mean(1)) for form, values in errors.by_form.items()}
    return {form: {"gamma": f.gamma, "interval": f.interval} for form, f in fits.items()}


def seed_variances(groups: Sequence[tuple[str, Sequence[np.ndarray]]], weights: np.ndarray) -> dict[str, float]:
    """The variance of a value's logarithm between training seeds, by law; it excludes what they share (data, recipe).

    Each group holds one value of a law per seed, as squared errors [M, S], for a level that was trained again. Usually
    these are the cheapest levels, and their spread stands for that of all. Two separately trained levels enter a value
    of `differences`, so its variance is twice that of retraining one of them."""
    squares, dof = {}, {}
    for form, values in groups:
        logs = np.log([float((value @ weights).mean()) for value in values])
        squares[form] = squares.get(form, 0.0) + float(((logs - logs.mean()) ** 2).sum())
        dof[form] = dof.get(form, 0) + len(logs) - 1
    return {form: (2 if form == "differences" else 1) * squares[form] / dof[form] for form in dof}


def htmc_answer(fits: Mapping[str, Fit]) -> tuple[str, str]:
    """Whether the problem is harder than Monte Carlo (gamma > 2): "yes", "no" or "undetermined", and a reason.

    The two estimates without L_inf decide together. The loss fit is often too weak to decide, but it can veto: by an
    interval on the other side, or by a loss that does not fall with FLOPs."""
    loss, deciding = fits["loss_fit"], {name: fits[name] for name in ("differences", "to_largest")}
    for name, found in deciding.items():
        if found.gamma is None:
            return "undetermined", f"The estimate from {name} has no finite exponent. {found.note}"
    if not loss.falls:
        reason = "The loss does not fall measurably with FLOPs, so the levels are no hierarchy of accuracy."
        return "undetermined", reason
    intervals = "; ".join(f"{n} {interval_text(f.interval)}" for n, f in {**deciding, "loss_fit": loss}.items())
    side, other = (_side(found) for found in deciding.values())
    if side != other or side == 0:
        return "undetermined", f"The 95% intervals do not settle on which side of 2 gamma lies: {intervals}."
    where = "above" if side > 0 else "below"
    if _side(loss) == -side:
        reason = f"The level differences put gamma {where} 2, the loss on the other side: {intervals}."
        return "undetermined", reason
    return "yes" if side > 0 else "no", f"Both estimates from level differences lie {where} 2: {intervals}."


def _side(found: Fit) -> int:
    """1 if the interval is above 2, -1 if below, 0 if it contains 2."""
    low, high = found.interval
    return 1 if low > 2 else -1 if high is not None and high < 2 else 0


def interval_text(interval: Interval) -> str:
    high = "unbounded" if interval[1] is None else f"{interval[1]:.2f}"
    return f"[{interval[0]:.2f}, {high}]"


def standard_errors(values: np.ndarray) -> np.ndarray:
    """Standard errors [...] of the means of values [..., M]."""
    return values.std(-1, ddof=1) / np.sqrt(values.shape[-1])
