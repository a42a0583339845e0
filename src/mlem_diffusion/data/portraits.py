"""Procedural portraits: the embedded data set, drawn with numpy alone, so that nothing has to be downloaded.

Each person is a vector of uniform numbers keyed by (seed, index). Drawing evaluates signed distances on a
supersampled grid and averages it down. Per-pixel arithmetic is limited to + - * / sqrt min max floor, which
round alike everywhere. An image therefore does not depend on the machine or the batch. It shows the same person
at every size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

VERSION = "1"
_TRAITS = 192  # uniform numbers per person; the length is fixed, so that new traits do not shift existing ones

_SKIN = [
    (255, 226, 204),
    (246, 205, 172),
    (228, 178, 138),
    (203, 145, 101),
    (155, 101, 67),
    (104, 66, 46),
    (70, 45, 34),
]
_HAIR = [
    (22, 18, 18),
    (48, 30, 22),
    (92, 56, 32),
    (150, 70, 34),
    (196, 142, 74),
    (228, 196, 128),
    (176, 172, 168),
    (236, 234, 230),
]
_IRIS = [(58, 34, 20), (104, 64, 30), (98, 116, 56), (66, 124, 140), (92, 148, 206), (128, 140, 150)]

Array = np.ndarray


class _Traits:
    """Consecutive uniform numbers of a batch of people, each as float32 [n,1,1]."""

    def __init__(self, uniform: Array) -> None:
        self.uniform, self.column = uniform, 0

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

    def palette(self, colours: Sequence[tuple[int, int, int]], jitter: float, place: Array | None = None) -> Array:
        """A colour [n,3,1,1] in [0,1] on the piecewise linear path through `colours`, moved by at most `jitter`."""
        place = (self.next() if place is None else place.reshape(-1)) * (len(colours) - 1)
        knots = np.asarray(colours) / 255.0
        base = np.stack([np.interp(place, np.arange(len(colours)), knots[:, c]) for c in range(3)], 1)
        base = base + jitter * (2 * np.stack([self.next(), self.next(), self.next()], 1) - 1)
        return _colour(base)

    def free_colour(self, low: float, high: float, saturation: float) -> Array:
        """A colour of any hue: a grey level between low and high, moved away from grey by up to `saturation`."""
        hue, grey, amount = self.next(), low + (high - low) * self.next(), saturation * self.next()
        wheel = np.cos(2 * np.pi * (hue[:, None] - np.array([0.0, 1 / 3, 2 / 3])))
        return _colour(grey[:, None] + amount[:, None] * wheel)


def _column(values: Array) -> Array:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def _colour(values: Array) -> Array:
    return np.clip(values, 0, 1).astype(np.float32).reshape(-1, 3, 1, 1)


def _ellipse(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Approximate signed distance to an ellipse, negative inside; exact on the outline."""
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1) * np.minimum(rx, ry)


def _soft(x: Array, y: Array, rx: Array | float, ry: Array | float) -> Array:
    """Smooth bump: 1 at the centre, 0 on and outside the ellipse."""
    t = np.maximum(1 - (x / rx) ** 2 - (y / ry) ** 2, 0)
    return t * t


def _step(t: Array) -> Array:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _wave(t: Array) -> Array:
    """Smooth wave of period 1 and range [-1, 1] made of parabolas (no transcendental function per pixel)."""
    t = t - np.floor(t)
    half = 2 * t - np.floor(2 * t)
    return (1 - 2 * np.floor(2 * t)) * (4 * half * (1 - half))


class _Canvas:
    """RGB image [n,3,S,S] in [0,1]; `pixel` is the width of one sample in the drawing's units."""

    def __init__(self, base: Array, pixel: float) -> None:
        self.rgb, self.pixel = base, np.float32(pixel)

    def inside(self, distance: Array) -> Array:
        return np.clip(np.float32(0.5) - distance / self.pixel, 0, 1)

    def paint(self, cover: Array, colour: Array) -> None:
        self.rgb += (colour - self.rgb) * cover[:, None]


def render(count: int, size: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """Portraits start .. start+count-1 of a seed as uint8 [count, 3, size, size] (RGB).

    Image i of a seed does not depend on the batch and shows the same person at every size.
    Raises ValueError if count, start or seed is negative or size < 4.
    """
    if count < 0 or start < 0 or seed < 0 or size < 4:
        raise ValueError("count, start and seed must not be negative, and size must be at least 4")
    factor = max(2, -(-64 // size))
    chunk = max(1, 2**16 // (size * factor) ** 2)
    images = np.empty((count, 3, size, size), np.uint8)
    for first in range(0, count, chunk):
        people = range(start + first, start + min(first + chunk, count))
        uniform = np.stack([np.random.default_rng([seed, i]).random(_TRAITS) for i in people])
        images[first : first + len(people)] = _draw(uniform, size, factor)
    return images


def _draw(uniform: Array, size: int, factor: int) -> Array:
    """Draw one batch of people (uniform numbers [n, _TRAITS]) as uint8 [n,3,size,size]."""
    side = size * factor
    axis = ((np.arange(side) + 0.5) * (2 / side) - 1).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]
    t = _Traits(uniform)

    # Several parts share these traits: they are drawn first and in a fixed order.
    light_x, light_y = t.between(-1, 1), t.between(-0.9, 0.25)
    light = t.between(0.18, 0.55)
    depth = t.between(0, 1)  # of the skin colour; dark skin mostly has dark hair, unless the hair is grey
    skin = t.palette(_SKIN, 0.018, depth)
    grey = t.chance(0.12)
    hair = t.palette(_HAIR, 0.03, grey * t.between(0.8, 1) + (1 - grey) * t.between(0, 0.76) * (1 - 0.8 * depth**2))
    dyed = t.chance(0.06)[:, None]
    hair = hair * (1 - dyed) + t.free_colour(0.3, 0.6, 0.35) * dyed
    shift_x, shift_y, scale = t.bell(0, 0.16), t.bell(0.04, 0.12), t.bell(1.16, 0.2)
    tilt, yaw, pitch = t.bell(0, 0.42), t.bell(0, 1.0), t.bell(0, 1.0)
    width, height, jaw = t.between(0.43, 0.54), t.between(0.56, 0.68), t.between(0.0, 0.34)
    long_hair, volume = t.between(-0.8, 1), t.between(0.02, 0.17)
    bald, hat = t.chance(0.07), t.chance(0.13)
    strands, strand_phase, wavy = t.between(3, 7), t.between(0, 1), t.between(0, 1)

    # Head coordinates (u, v): shifted, scaled, and turned about the neck.
    x, y = (x - shift_x) / scale, (y - shift_y) / scale
    cos, sin = np.cos(tilt.astype(float)), np.sin(tilt.astype(float))
    cos, sin = cos.astype(np.float32), sin.astype(np.float32)
    u, v = cos * x + sin * (y - 0.6), cos * (y - 0.6) - sin * x + 0.6
    canvas = _background(t, axis, side)
    narrowing = 1 - jaw * _step((v + 0.1) / 0.9)
    head_x, head_y = u / (width * narrowing), v / height
    head = (np.sqrt(head_x**2 + head_y**2) - 1) * width * narrowing

    # Hair behind the head has a random length; strands run along it.
    flow = u + 0.5 * (u - 0.4 * light_x * u) * np.minimum(v + 0.3, 0.5) + wavy * 0.05 * _wave(2.2 * v + strand_phase)
    strand = 0.6 * _wave(strands * flow + strand_phase) + 0.4 * _wave(2.3 * strands * flow - strand_phase)
    gloss = _soft(u - 0.35 * light_x, v + 0.48 + 0.1 * u * u, 0.55, 0.22)
    sheen = 0.97 + 0.1 * strand + (0.3 + 0.25 * strand) * gloss - 0.2 * _step(v + 0.3) + 0.2 * light_x * u
    hair_rgb = np.clip(hair * sheen[:, None], 0, 1)
    drop = np.maximum(long_hair, 0) * 0.95
    flare = 1 + 0.25 * long_hair * _step(v)
    back = _ellipse(
        u / flare,
        np.where(v > -0.1, np.maximum(v + 0.1 - drop, 0), v + 0.1),
        width + volume,
        height - 0.1 + volume,
    )
    back_cover = canvas.inside(back) * (1 - bald) * (long_hair > 0)
    canvas.paint(back_cover, hair_rgb * np.float32(0.72))

    _body(canvas, t, x, y, u, v, skin, light_x, width)
    face = _head(canvas, u, v, head, head_x, head_y, skin, (light_x, light_y, light), width)
    # Facial features follow the turned surface: moved by yaw and pitch, foreshortened on the far side.
    fu = (u - 0.11 * yaw) * (1 + 0.22 * yaw * u)
    fv = v - 0.06 * pitch
    _beard(canvas, t, fu, fv, hair, face, width, height)
    _mouth(canvas, t, fu, fv, skin)
    _nose(canvas, t, fu, fv, yaw, skin, light_x)
    eye_gap = _eyes(canvas, t, fu, fv, skin, hair)
    _hair_front(canvas, t, u, v, fu, fv, head, hair_rgb, volume, bald, long_hair)
    _glasses(canvas, t, fu, fv, eye_gap, width)
    _hat(canvas, t, u, v, head, hat, light_x)

    exposure, warmth = t.between(0.88, 1.1), t.between(-0.05, 0.05)
    tint = np.concatenate([1 + warmth, np.ones_like(warmth), 1 - warmth], 1)[..., None]
    rgb = np.clip(canvas.rgb * (exposure[:, None] * tint), 0, 1)
    total = np.float32(0)
    for row in range(factor):
        for column in range(factor):
            total = total + rgb[:, :, row::factor, column::factor]
    return np.floor(total * np.float32(255 / factor**2) + np.float32(0.5)).astype(np.uint8)


def _background(t: _Traits, axis: Array, side: int) -> _Canvas:
    """Two colours blended along a direction, out-of-focus discs, and darker corners."""
    x, y = axis[None, None, :], axis[None, :, None]
    one, two = t.free_colour(0.2, 0.9, 0.25), t.free_colour(0.15, 0.85, 0.25)
    angle, sharp = t.between(0, 2 * np.pi).astype(float), t.between(0.35, 1.6)
    across = np.cos(angle).astype(np.float32) * x + np.sin(angle).astype(np.float32) * y
    mix = _step(0.5 + 0.5 * sharp * across)
    canvas = _Canvas(one + (two - one) * mix[:, None], 2 / side)
    for _ in range(2):
        cx, cy, radius = t.between(-1.1, 1.1), t.between(-1.1, 0.6), t.between(0.2, 0.7)
        colour, amount = t.free_colour(0.3, 1.0, 0.3), t.between(-0.2, 0.6)
        edge = _step((radius - _ellipse(x - cx, y - cy, 1.0, 1.0) - 1) / 0.25)
        canvas.paint(edge * np.maximum(amount, 0), colour)
    corner = 1 - t.between(0, 0.14) * (x * x + y * y)
    canvas.rgb *= corner[:, None]
    return canvas


def _body(
    canvas: _Canvas,
    t: _Traits,
    x: Array,
    y: Array,
    u: Array,
    v: Array,
    skin: Array,
    light_x: Array,
    width: Array,
) -> None:
    """Neck with the shadow of the chin, shoulders, and clothes with a round or pointed opening."""
    neck = np.maximum(np.abs(x) - width * 0.52 - 0.1 * _step((y - 0.62) / 0.4), np.maximum(0.2 - y, y - 1.5))
    shadow = 0.86 - 0.3 * _soft(u + 0.08 * light_x, v - 0.52, 0.5, 0.36) + 0.1 * light_x * x
    canvas.paint(canvas.inside(neck), np.clip(skin * shadow[:, None], 0, 1))
    wide, top, opening, pointed = (
        t.between(0.8, 1.15),
        t.between(0.72, 0.9),
        t.between(0.2, 0.42),
        t.chance(0.5),
    )
    cloth, second = t.free_colour(0.1, 0.85, 0.35), t.free_colour(0.1, 0.9, 0.3)
    stripes, period = t.chance(0.2), t.between(2, 5)
    shoulders = _ellipse(x, y - top - 0.55, wide, 0.58)
    round_cut = _ellipse(x, y - top + 0.05, opening, opening * 0.75)
    vee_cut = np.abs(x) * 0.85 + (y - top - opening * 0.9) * 0.55
    cut = pointed * vee_cut + (1 - pointed) * round_cut
    skin_low = skin * (0.9 + 0.12 * light_x * x)[:, None]
    canvas.paint(canvas.inside(shoulders), np.clip(skin_low, 0, 1))
    fold = 0.88 + 0.2 * light_x * x + 0.08 * _wave(1.3 * x + 0.5 * y)
    pattern = stripes * _step(3 * _wave(period * y) + 0.5)
    cloth_rgb = (cloth + (second - cloth) * pattern[:, None]) * fold[:, None]
    canvas.paint(canvas.inside(np.maximum(shoulders, -cut)), np.clip(cloth_rgb, 0, 1))


def _head(
    canvas: _Canvas, u: Array, v: Array, head: Array, head_x: Array, head_y: Array, skin: Array,
    light: tuple[Array, Array, Array], width: Array,
) -> Array:  # fmt: skip
    """Ears and the shaded face; returns the coverage [n,S,S] of the face."""
    light_x, light_y, strength = light
    for sign in (-1, 1):
        ear = _ellipse(u - sign * width * 0.98, v - 0.02, 0.075, 0.14)
        inner = 0.82 - 0.22 * _soft(u - sign * width, v - 0.02, 0.05, 0.1) + 0.15 * sign * light_x
        canvas.paint(canvas.inside(ear), np.clip(skin * inner[:, None], 0, 1))
    depth = np.sqrt(np.maximum(1 - 0.92 * (head_x**2 + head_y**2), 0.02))
    shade = 0.62 + 0.4 * depth + strength * (0.55 * light_x * head_x + 0.45 * light_y * head_y)
    # Shaded skin is redder: the three channels darken at different rates.
    falls = np.array([0.8, 1.0, 1.1], np.float32).reshape(1, 3, 1, 1)
    face = canvas.inside(head)
    canvas.paint(face, np.clip(skin * (1 + falls * (shade[:, None] - 1)), 0, 1))
    return face


def _beard(
    canvas: _Canvas, t: _Traits, u: Array, v: Array, hair: Array, face: Array, width: Array, height: Array
) -> None:
    amount = np.clip(t.between(-2.6, 1.25), 0, 0.95)
    line, chin_only = t.between(0.16, 0.32), t.chance(0.35)
    edge = _step((v - line + 0.55 * (0.3 - np.abs(u) / width) * (1 - chin_only)) / 0.12)
    edge = edge * (1 - chin_only * _step((np.abs(u) - 0.17) / 0.06))
    moustache = _step(1.4 - ((u / 0.2) ** 2 + ((v - 0.235) / 0.055) ** 2))
    lips = 1 - _step(1.5 - ((u / 0.17) ** 2 + ((v - 0.32) / 0.07) ** 2))
    grain = 0.85 + 0.12 * _wave(7 * u + 2 * v)
    canvas.paint(face * amount * np.maximum(edge * lips, moustache), np.clip(hair * grain[:, None] * 0.9, 0, 1))


def _mouth(canvas: _Canvas, t: _Traits, u: Array, v: Array, skin: Array) -> None:
    """Two lips around a curved line; open smiles show teeth over a dark mouth."""
    half, smile = t.between(0.12, 0.22), t.bell(0.35, 1.1)
    fullness, opening, skew = t.between(0.022, 0.062), np.maximum(t.between(-0.09, 0.085), 0), t.bell(0, 0.12)
    lipstick = t.between(-0.6, 0.8)
    red = _colour(np.concatenate([np.full_like(skin[:, 0], v_) for v_ in (0.72, 0.16, 0.22)], 1)[..., 0])
    natural = skin * np.array([0.84, 0.6, 0.6], np.float32).reshape(1, 3, 1, 1)
    lips = natural + (red - natural) * np.maximum(lipstick, 0)[:, None]
    half = half + 0.05 * np.maximum(smile, 0)
    across = u / half
    arch = np.maximum(1 - across * across, 0)
    line = v - 0.325 + smile * 0.07 * (across * across - 0.4) - skew * u
    bow = 1 - 0.28 * _soft(u, v * 0, 0.06, 1.0)
    upper, lower = (
        line + fullness * 0.75 * arch * bow + 0.5 * opening * arch,
        line - (fullness + opening) * arch,
    )
    ends = np.abs(u) - half
    mouth = np.maximum(np.maximum(-upper, lower), ends)
    canvas.paint(0.4 * _soft(u, line - 0.1, half, 0.05), skin * np.float32(0.68))  # shadow under the lower lip
    lip_light = 0.92 + 1.6 * (line + 0.01)
    canvas.paint(canvas.inside(mouth), np.clip(lips * lip_light[:, None], 0, 1))
    gap = np.maximum(np.maximum(-(line + 0.5 * opening * arch), line - 0.95 * opening * arch) - 0.007, ends + 0.012)
    canvas.paint(canvas.inside(gap), np.float32(0.35) * lips)
    teeth = np.maximum(gap, np.maximum(line - 0.45 * opening, ends + 0.035))
    canvas.paint(canvas.inside(teeth) * (opening > 0.012), np.ones_like(lips) * np.float32(0.93))


def _nose(canvas: _Canvas, t: _Traits, u: Array, v: Array, yaw: Array, skin: Array, light_x: Array) -> None:
    """A lit bridge, a shaded side away from the light, a tip, and nostrils."""
    length, wing = t.between(0.13, 0.22), t.between(0.055, 0.1)
    u = u - 0.05 * yaw * _step((v + 0.15) / 0.3)
    side = np.where(light_x > 0, -1.0, 1.0).astype(np.float32)
    down = _step((v + 0.2) / (length + 0.2))
    reach = 0.02 + wing * down
    body = (v < length) * _step((v + 0.22) / 0.1)
    slope = u * side
    shade = _step(1 - np.abs(slope - reach) / (0.5 * reach + 0.015)) * body
    canvas.paint(0.34 * shade, skin * np.float32(0.58))
    canvas.paint(0.3 * _soft(u, v - length - 0.02, wing * 1.4, 0.04), skin * np.float32(0.55))
    canvas.paint(0.32 * _soft(u + 0.2 * wing * side, v - 0.5 * length + 0.03, 0.03, length), np.clip(skin * 1.3, 0, 1))
    canvas.paint(0.4 * _soft(u + 0.2 * wing * side, v - length + 0.045, wing * 0.6, 0.04), np.clip(skin * 1.35, 0, 1))
    for sign in (-1, 1):
        nostril = _ellipse(u - sign * wing * 0.55, v - length, wing * 0.3, 0.014)
        canvas.paint(0.7 * canvas.inside(nostril), skin * np.float32(0.35))


def _eyes(canvas: _Canvas, t: _Traits, u: Array, v: Array, skin: Array, hair: Array) -> Array:
    """Eyes, lids, brows and cheeks, mirrored; returns the distance [n,1,1] from the middle to an eye."""
    gap, half, opened = t.between(0.165, 0.215), t.between(0.075, 0.105), t.between(0.3, 0.62)
    slant, gaze_x, gaze_y = t.bell(0, 0.28), t.bell(0, 0.55), t.bell(0, 0.35)
    iris = t.palette(_IRIS, 0.03)
    lash, shadow = t.between(0.1, 1), t.free_colour(0.25, 0.6, 0.25)
    made_up = np.maximum(t.between(-1.2, 0.6), 0)
    brow_y, brow_arch, brow_tilt = t.between(0.11, 0.165), t.between(0.0, 0.06), t.bell(0, 0.3)
    brow_thick, brow_dark = t.between(0.012, 0.034), t.between(0.5, 1.0)
    blush = t.between(0, 0.35)
    height = half * opened
    brow_rgb = hair * np.float32(0.75)
    for sign in (-1, 1):
        ex, ey = sign * u - gap, v + 0.07
        canvas.paint(
            blush * _soft(ex - 0.04, v - 0.17, 0.17, 0.13),
            skin * np.array([1.02, 0.66, 0.62], np.float32).reshape(1, 3, 1, 1),
        )
        canvas.paint(0.42 * _soft(ex, ey + 0.02, half * 1.7, half * 1.25), skin * np.float32(0.62))  # socket
        canvas.paint(made_up * _soft(ex, ey + 0.04, half * 1.5, half), shadow)
        ey = ey + slant * ex * 0.7
        arch = np.maximum(1 - (ex / half) ** 2, 0)
        white = np.maximum(np.maximum(-(ey + height * arch), ey - 0.75 * height * arch), np.abs(ex) - half)
        cover = canvas.inside(white)
        canvas.paint(cover, np.float32(0.8) + 0.15 * skin)
        gx, gy = ex - sign * gaze_x * half * 0.6, ey + gaze_y * height * 0.5
        radius = np.minimum(half * 0.52, height * 1.1)
        canvas.paint(cover * canvas.inside(_ellipse(gx, gy, radius, radius)), iris)
        canvas.paint(cover * canvas.inside(_ellipse(gx, gy, radius * 0.5, radius * 0.5)), iris * np.float32(0.12))
        spark = _ellipse(gx + sign * 0.35 * radius, gy + 0.35 * radius, radius * 0.24, radius * 0.24)
        canvas.paint(0.9 * cover * canvas.inside(spark), np.ones_like(iris))
        lid = np.maximum(np.abs(ey + height * arch) - 0.008 - 0.009 * lash, np.abs(ex) - half * (1 + 0.12 * lash))
        canvas.paint((0.45 + 0.5 * lash) * canvas.inside(lid), skin * np.float32(0.18))
        crease = np.maximum(np.abs(ey + height * arch + 0.032) - 0.005, np.abs(ex) - half * 0.9)
        canvas.paint(0.4 * canvas.inside(crease), skin * np.float32(0.5))
        along = (ex - 0.01) / (half * 1.45)
        middle = v + 0.07 + brow_y + brow_arch * (1 - along**2) + brow_tilt * (ex - 0.02) * 0.7
        brow = np.maximum(
            np.abs(middle) - brow_thick * (1.15 - 0.55 * np.clip(along, -1, 1)),
            np.abs(along * half * 1.45) - half * 1.45,
        )
        canvas.paint(brow_dark * canvas.inside(brow), brow_rgb)
    return gap


def _hair_front(
    canvas: _Canvas, t: _Traits, u: Array, v: Array, fu: Array, fv: Array, head: Array, hair_rgb: Array,
    volume: Array, bald: Array, long_hair: Array,
) -> None:  # fmt: skip
    """The cap of hair above a hairline with a parting; long hair also frames the cheeks."""
    line, curve, part = t.between(-0.56, -0.28), t.between(0.4, 3.2), t.bell(0, 0.34)
    sweep, jag = t.bell(0, 0.6), t.between(0, 0.03)
    away = fu - part
    hairline = line + curve * away * away * 0.9 + sweep * away * 0.4 + jag * _wave(3.3 * fu + part)
    hairline = np.minimum(hairline, 0.02 + 0.42 * np.maximum(long_hair, -0.3))
    lift = volume * _step(0.75 - 1.1 * v)
    cap = np.maximum(head - lift, fv - hairline)
    shadow = np.maximum(head, fv - hairline - 0.05)
    canvas.paint(0.28 * canvas.inside(shadow) * (1 - bald), hair_rgb * np.float32(0.45))
    rim = 1 - 0.22 * _step(1 - np.abs(fv - hairline) / 0.06) - 0.3 * _step(1 - np.abs(away) / 0.03) * (v < line)
    canvas.paint(canvas.inside(cap) * (1 - bald), np.clip(hair_rgb * rim[:, None], 0, 1))


def _glasses(canvas: _Canvas, t: _Traits, u: Array, v: Array, gap: Array, width: Array) -> None:
    worn, dark, square = t.chance(0.2), t.chance(0.25), t.chance(0.5)
    radius, flat, thick = t.between(0.115, 0.15), t.between(0.7, 1.0), t.between(0.011, 0.026)
    frame, tint = t.free_colour(0.05, 0.5, 0.3), t.free_colour(0.05, 0.25, 0.1)
    opacity = dark * t.between(0.6, 0.95) + (1 - dark) * 0.06
    across = np.abs(u)
    gx, gy = (across - gap) / radius, (v + 0.06) / (radius * flat)
    power = square * np.sqrt(np.sqrt((gx * gx) ** 2 + (gy * gy) ** 2)) + (1 - square) * np.sqrt(gx**2 + gy**2)
    lens = (power - 1) * radius * flat
    canvas.paint(worn * opacity * canvas.inside(lens), tint)
    canvas.paint(worn * dark * 0.35 * canvas.inside(lens) * _soft(gx + 0.3, gy + 0.5, 0.7, 0.4), np.ones_like(tint))
    bridge = np.maximum(np.abs(v + 0.085) - thick * 0.6, across - gap + radius * 0.95)
    arms = np.maximum(np.abs(v + 0.09) - thick * 0.6, np.maximum(gap + radius * 0.95 - across, across - width * 1.02))
    canvas.paint(worn * canvas.inside(np.minimum(np.abs(lens) - thick, np.minimum(bridge, arms))), frame)


def _hat(canvas: _Canvas, t: _Traits, u: Array, v: Array, head: Array, hat: Array, light_x: Array) -> None:
    """A knitted hat, or one with a brim."""
    line, brimmed, puff = t.between(-0.36, -0.22), t.chance(0.5), t.between(0.05, 0.12)
    colour, band = t.free_colour(0.15, 0.8, 0.4), t.free_colour(0.1, 0.9, 0.4)
    ribs = t.between(4, 9)
    bend = v - line + 0.12 * u * u
    dome = np.maximum(head - puff, bend)
    shade = 0.92 + 0.3 * light_x * u + 0.1 * (1 - brimmed) * _wave(ribs * u)
    canvas.paint(hat * canvas.inside(dome), np.clip(colour * shade[:, None], 0, 1))
    canvas.paint(hat * canvas.inside(np.maximum(dome, -bend - 0.13)), np.clip(band * shade[:, None], 0, 1))
    brim = _ellipse(u, bend + 0.01, 0.74, 0.055)
    canvas.paint(hat * brimmed * canvas.inside(brim), np.clip(colour * (shade * 0.75)[:, None], 0, 1))
