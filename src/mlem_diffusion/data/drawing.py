"""Painting people: batches of images from signed distances, and the uniform numbers that decide each person's traits.

Per-pixel arithmetic is limited to + - * / sqrt min max floor, which round alike everywhere.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

Array = np.ndarray


class Drawing:
    """Images [n,3,S,S] in [0,1], and the people's uniform numbers [n, _TRAITS], which are used up one after another.

    pixel: width of one sample in the drawing's units.
    """

    def __init__(self, uniform: Array, pixel: float) -> None:
        self.uniform, self.column, self.pixel, self.rgb = uniform, 0, np.float32(pixel), np.empty(0)

    def next(self) -> Array:
        self.column += 1
        return self.uniform[:, self.column - 1]

    def between(self, low: float, high: float) -> Array:
        return _column(low + (high - low) * self.next())

    def bell(self, centre: float, spread: float) -> Array:
        """Sum of three uniforms: bell-shaped, never further than `spread` from the centre."""
        return _column(centre + spread * (2 * (self.next() + self.next() + self.next()) / 3 - 1))

    def chance(self, probability: float) -> Array:
        return _column(self.next() < probability)

    def palette(self, colours: str, jitter: float, place: Array | None = None) -> Array:
        """A colour [n,3,1,1] in [0,1] on the piecewise linear path through `colours`, moved by at most `jitter`."""
        knots = np.array([list(bytes.fromhex(colour)) for colour in colours.split()]) / 255.0
        place = (self.next() if place is None else place.reshape(-1)) * (len(knots) - 1)
        base = np.stack([np.interp(place, np.arange(len(knots)), channel) for channel in knots.T], 1)
        return _colour(base + jitter * (2 * np.stack([self.next(), self.next(), self.next()], 1) - 1))

    def free_colour(self, low: float, high: float, saturation: float) -> Array:
        """A colour of any hue: a grey level between low and high, moved away from grey by up to `saturation`."""
        hue, grey, amount = self.next(), low + (high - low) * self.next(), saturation * self.next()
        wheel = np.cos(2 * np.pi * (hue[:, None] - np.array([0.0, 1 / 3, 2 / 3])))
        return _colour(grey[:, None] + amount[:, None] * wheel)

    def inside(self, *distances: Array) -> Array:
        """Coverage [n,S,S] of the samples by the common part of shapes, from their signed distances."""
        return np.clip(0.5 - common(*distances) / self.pixel, 0, 1)

    def paint(self, cover: Array, colour: Array | float, shade: Array | None = None) -> None:
        """Paint a colour [n,3,...], darkened or lightened by the factor shade [n,S,S], over the covered samples."""
        if shade is not None:
            colour = np.clip(colour * shade[:, None], 0, 1)
        self.rgb += (colour - self.rgb) * cover[:, None]


def _column(values: Array) -> Array:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def _colour(values: Array) -> Array:
    return np.clip(values, 0, 1).astype(np.float32).reshape(-1, 3, 1, 1)


def rgb(*channels: float) -> Array:
    return np.array(channels, np.float32).reshape(1, 3, 1, 1)


def common(*distances: Array) -> Array:
    """Signed distance to the common part of shapes."""
    return reduce(np.maximum, distances)


def ellipse(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Approximate signed distance to an ellipse, negative inside; exact on the outline."""
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1) * np.minimum(rx, ry)


def soft(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Smooth bump: 1 at the centre, 0 on and outside the ellipse."""
    t = np.maximum(1 - (x / rx) ** 2 - (y / ry) ** 2, 0)
    return t * t


def step(t: Array) -> Array:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def wave(t: Array) -> Array:
    """Smooth wave of period 1 and range [-1, 1] made of parabolas (no transcendental function per pixel)."""
    t = t - np.floor(t)
    half = 2 * t - np.floor(2 * t)
    return (1 - 2 * np.floor(2 * t)) * (4 * half * (1 - half))
