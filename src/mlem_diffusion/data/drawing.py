"""Painting an image from signed distances, with colours and lengths from uniform numbers.
Per-pixel arithmetic is limited to + - * / sqrt min max floor, which round alike everywhere."""

from functools import reduce
from typing import Any

import numpy as np

Array = np.ndarray


class Drawing:
    """An image [3,S,S] in [0,1], and uniform numbers, used up one after another. pixel: the width of one sample."""

    def __init__(self, uniform: Array, pixel: float) -> None:
        self.numbers, self.pixel, self.rgb = iter(uniform), np.float32(pixel), np.empty(0)

    def trait(self, kind: str) -> Array:
        """A number [1,1]: `1..2` is uniform, `0±1` bell-shaped between -1 and 1, `20%` a chance (0 or 1)."""
        number = next(self.numbers)
        if kind.endswith("%"):
            number = number < float(kind[:-1]) / 100
        elif "±" in kind:
            centre, spread = map(float, kind.split("±"))
            number = centre + spread * (2 * (number + next(self.numbers) + next(self.numbers)) / 3 - 1)
        else:
            low, high = map(float, kind.split(".."))
            number = low + (high - low) * number
        return np.full((1, 1), number, np.float32)

    def traits(self, kinds: str) -> list[Array]:
        return [self.trait(kind) for kind in kinds.split()]

    def palette(self, colours: str, jitter: float, place: Array | None = None) -> Array:
        """A colour [3,1,1] on the piecewise linear path through `colours`, moved by at most `jitter`."""
        knots = np.array([list(bytes.fromhex(colour)) for colour in colours.split()]) / 255.0
        at: Any = (next(self.numbers) if place is None else place) * (len(knots) - 1)
        base = np.array([np.interp(at, np.arange(len(knots)), channel) for channel in knots.T]).reshape(3)
        return rgb(np.clip(base + jitter * (2 * np.array([next(self.numbers) for _ in range(3)]) - 1), 0, 1))

    def free_colour(self, low: float, high: float, saturation: float) -> Array:
        """A colour of any hue: a grey level between low and high, moved away from grey by up to `saturation`."""
        hue, grey, amount = (next(self.numbers) for _ in range(3))
        wheel = np.cos(2 * np.pi * (hue - np.array([0.0, 1 / 3, 2 / 3])))
        return rgb(np.clip(low + (high - low) * grey + saturation * amount * wheel, 0, 1))

    def inside(self, *distances: Array) -> Array:
        """Coverage [S,S] of the samples by the common part of shapes, from their signed distances."""
        return np.clip(0.5 - reduce(np.maximum, distances) / self.pixel, 0, 1)

    def paint(self, cover: Array, colour: Array | float, shade: Array | None = None) -> None:
        """Paint a colour [3,...], darkened or lightened by the factor shade [S,S], over the covered samples."""
        if shade is not None:
            colour = np.clip(colour * shade, 0, 1)
        self.rgb += (colour - self.rgb) * cover


def rgb(channels: Any) -> Array:
    return np.asarray(channels, np.float32).reshape(3, 1, 1)


def cos_sin(angle: Array) -> tuple[Array, Array]:
    return np.cos(angle.astype(float)).astype(np.float32), np.sin(angle.astype(float)).astype(np.float32)


def ellipse(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Approximate signed distance to an ellipse, negative inside; exact on the outline."""
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1) * np.minimum(rx, ry)


def soft(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Smooth bump: 1 at the centre, 0 on and outside the ellipse."""
    return np.maximum(1 - (x / rx) ** 2 - (y / ry) ** 2, 0) ** 2


def step(t: Array) -> Array:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def wave(t: Array) -> Array:
    """Smooth wave of period 1 and range [-1, 1] made of parabolas (no transcendental function per pixel)."""
    t = 2 * (t - np.floor(t))
    half = t - np.floor(t)
    return (1 - 2 * np.floor(t)) * (4 * half * (1 - half))
