"""Estimates of gamma from the squared errors of a family, pooled over noise levels and at each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import sem

from ..diffusion.process import alpha2_weights
from .drops import fit_drops
from .power_law import fit
from .verdict import BY_LOSS, htmc_answer, nestedness


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
        """The squared errors [n, M, S], or drops in loss, that each law is fitted to."""
        drops = -np.diff(self.loss, axis=0)
        return {"loss_fit": self.loss, "drops": drops, "differences": self.to_previous, "to_largest": self.to_largest}


def pooled(errors: LevelErrors, seed: int, bootstrap: int, between: Mapping[str, float] | None = None) -> dict:
    """The estimates of gamma by all laws, pooled over noise levels, the answer, the pooled losses and the nestedness.
    Amplitudes are for T in GFLOP. between: the variances of `seed_variances`."""
    fits, between, flops = {}, between or {}, errors.flops
    scatter, loss = 0.0, errors.loss @ errors.weights  # [K, M]
    for form, of_form in errors.by_form.items():
        if form == "drops":
            covariance = np.cov(loss) / loss.shape[1]
            fits[form], scatter = fit_drops(flops, loss.mean(1), covariance, between.get("loss_fit", 0.0))
            continue
        values = of_form @ errors.weights  # [n, M]
        covariance = np.cov(values) / values.shape[1]
        fits[form] = fit(form, flops, values.mean(1), covariance, between.get(form, 0.0), bootstrap, seed)
    pairs = nestedness(errors.names, loss, errors.to_previous @ errors.weights, scatter)
    nested = all(pair["nested"] for pair in pairs)
    htmc, reason = htmc_answer(fits, nested)
    estimates = {form: {k: v for k, v in vars(f).items() if k != "falls"} for form, f in fits.items()}
    for form, own in estimates.items():
        own["applicable"] = nested or form in BY_LOSS
    found = {"estimates": estimates, "htmc": htmc, "htmc_reason": reason, "nestedness": pairs}
    return {**found, "levels": loss.mean(1).tolist()}


def estimate(errors: LevelErrors, seed: int, bootstrap: int, between: Mapping[str, float] | None = None) -> dict:
    """The content of `pooled`, with tables of levels and points, and the estimates at each noise level; ready for JSON.
    per_noise_level has no bootstrap, only profile intervals."""
    points = {form: _points(errors.flops / 1e9, form, v @ errors.weights) for form, v in errors.by_form.items()}
    per_noise_level = []
    for j, value in enumerate(errors.logsnr):
        means = {form: values[:, :, j].mean(1) for form, values in errors.by_form.items()}
        found = {form: fit(form, errors.flops, v) for form, v in means.items() if form != "drops"}
        found["drops"] = fit_drops(errors.flops, means["loss_fit"])[0]
        own = {form: {"gamma": found[form].gamma, "interval": found[form].interval} for form in means}
        raw = {"loss": "loss_fit", "to_previous": "differences", "to_largest": "to_largest"}
        lists = {name: means[form].tolist() for name, form in raw.items()}
        weight = float(errors.weights[j])
        per_noise_level.append({"logsnr": float(value), "weight": weight, "estimates": own, **lists})
    levels = {"name": errors.names, "width": errors.widths, "gflop": errors.flops / 1e9, "images": errors.images}
    loss = errors.loss @ errors.weights
    levels |= {"loss": loss.mean(1), "loss_se": sem(loss, axis=1)}
    usual = alpha2_weights(errors.logsnr)  # the pooling of earlier results, to compare them
    levels["loss_alpha2"] = (errors.loss @ usual).mean(1)
    levels["to_largest_alpha2"] = np.append((errors.to_largest @ usual).mean(1), 0.0)
    table = pd.DataFrame(levels).to_dict("records")
    found = pooled(errors, seed, bootstrap, between)
    return {**found, "levels": table, "points": points, "per_noise_level": per_noise_level}


def _points(gflop: np.ndarray, form: str, values: np.ndarray) -> list[dict[str, Any]]:
    """The pooled values [n, M] of a law as points of a plot."""
    columns = {"gflop": gflop[: len(values)], "value": values.mean(1), "se": sem(values, axis=1)}
    if form == "loss_fit":
        # images differ far more than levels do, so levels are compared by their loss minus the mean over all levels
        columns["contrast_se"] = sem(values - values.mean(0), axis=1)
    if form in ("drops", "differences"):
        columns |= {"gflop": gflop[1:], "gflop_previous": gflop[:-1]}
    return pd.DataFrame(columns).to_dict("records")
