"""Interpolants x = a(t) x0 + b(t) eps: the coordinates in which a network sees its images, and the time it is given.

A level's x = alpha x0 + sigma eps has alpha^2 + sigma^2 = 1, so the network's image at the same log-SNR 2 ln(a / b) is
sqrt(a^2 + b^2) times it. The velocity v = dx/dt = a' x0 + b' eps gives x0 = (b' x - b v) / (a b' - a' b): x - t v for
a rectified flow with data at t = 0, where v = eps - x0, and x + (1 - t) v with data at t = 1, where v = x0 - eps.

A flow begins at log-SNR minus infinity, where x is noise. A Process begins at a finite one: at FLOW_START t is 1 to
nine digits, so in float32 the first evaluation and the first step are those of the flow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

FLOW_START = -40.0
Pair = Callable[[Tensor], tuple[Any, Any]]


@dataclass(frozen=True)
class Interpolant:
    """x = a(t) x0 + b(t) eps. `at` returns (a, b) at t, `rate` their derivatives, `time` the t of a log-SNR [B].
    Raises UserError unless they belong together."""

    at: Pair
    rate: Pair
    time: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        logsnr, h = torch.linspace(-12, 12, 49, dtype=torch.float64), 1e-6
        t = self.time(logsnr)
        a, b = self.at(t)
        if not torch.allclose(2 * torch.log(a / b), logsnr, rtol=1e-6, atol=1e-6):
            raise UserError("Interpolant: `time` is not the t at which a(t) and b(t) have its log-SNR, 2 ln(a / b).")
        for rate, after, before in zip(self.rate(t), self.at(t + h), self.at(t - h), strict=True):
            slope = (after - before) / (2 * h)
            if not torch.allclose(rate + torch.zeros_like(t), slope, rtol=1e-4, atol=1e-4):
                raise UserError("Interpolant: `rate` is not the derivative of `at`: does its time run the other way?")

    def image(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """x0 [B, ...] from x and the velocity, for t [B, 1, ...]."""
        (a, b), (da, db) = self.at(t), self.rate(t)
        return (db * x - b * velocity) / (a * db - da * b)


def flow(data_at: int = 0, noise_scale: float = 1.0) -> Interpolant:
    """The straight line between x0 and noise_scale * eps, with the data at t = 0 (SD3, Flux, SANA) or 1 (SiT, JiT)."""
    if data_at not in (0, 1) or not noise_scale > 0:
        raise UserError("flow: data_at is 0 or 1, the t of the data, and noise_scale is positive.")
    s, log_s = noise_scale, math.log(noise_scale)
    if data_at == 0:
        return Interpolant(lambda t: (1 - t, s * t), lambda t: (-1, s), lambda u: torch.sigmoid(-0.5 * u - log_s))
    return Interpolant(lambda t: (t, s * (1 - t)), lambda t: (1, -s), lambda u: torch.sigmoid(0.5 * u + log_s))
