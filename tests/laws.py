"""Exact power laws of error against FLOPs, and families of levels that follow them."""

import numpy as np

from mlem_diffusion.gamma.estimates import LevelErrors

FORMS = ("loss_fit", "differences", "to_largest")
AMPLITUDE, FLOOR = 0.02, 0.01


def flops_of(levels: int) -> np.ndarray:
    return 0.233e9 * 232 ** (np.arange(levels) / (levels - 1))


def law(flops: np.ndarray, gamma: float) -> dict[str, np.ndarray]:
    t = (flops / 1e9) ** (-2 / gamma)
    return {
        "loss_fit": FLOOR + AMPLITUDE * t,
        "differences": AMPLITUDE * (t[:-1] - t[1:]),
        "to_largest": AMPLITUDE * (t[:-1] - t[-1]),
    }


def contains(interval: tuple[float, float | None], gamma: float) -> bool:
    return interval[0] <= gamma and (interval[1] is None or gamma <= interval[1])


def level_errors(loss: np.ndarray, to_previous: np.ndarray, to_largest: np.ndarray, **changes: object) -> LevelErrors:
    """Errors [n, M, S] of levels w8, w16, ... at evenly weighted noise levels from -6 to 6."""
    k, _, s = loss.shape
    fields = {
        "widths": [8 * (i + 1) for i in range(k)],
        "names": [f"w{8 * (i + 1)}" for i in range(k)],
        "flops": flops_of(k),
        "images": [1000] * k,
        "logsnr": np.linspace(-6, 6, s),
        "weights": np.full(s, 1 / s),
        "loss": loss,
        "to_previous": to_previous,
        "to_largest": to_largest,
    }
    return LevelErrors(**{**fields, **changes})


def noisy_family(gamma: float | None, scatter: float = 0.03) -> LevelErrors:
    """Seven levels, 64 images, 6 noise levels; with gamma None all levels are equally good and equally far apart."""
    rng = np.random.default_rng(0)
    flat = {"loss_fit": np.full(7, FLOOR), "differences": np.full(6, 1e-3), "to_largest": np.full(6, 1e-3)}
    values = flat if gamma is None else law(flops_of(7), gamma)
    per_image = np.exp(0.3 * rng.standard_normal((1, 64, 1)))  # some images are harder, for every level

    def spread(form: str) -> np.ndarray:
        sd = scatter / 20 if form == "loss_fit" else scatter  # only the small excess of the loss scatters
        mean = values[form] * np.exp(sd * rng.standard_normal(len(values[form])))
        noise = np.exp(0.01 * rng.standard_normal((len(mean), 64, 6)))
        return mean[:, None, None] * np.exp(-np.linspace(-6, 6, 6) / 4) * per_image * noise

    return level_errors(*(spread(form) for form in FORMS))
