"""Procedural portraits: the embedded data set, drawn with numpy alone, so that nothing has to be downloaded.
Each person is a vector of uniform numbers keyed by (seed, index). Drawing evaluates signed distances on a supersampled
grid and averages it down. An image depends on neither machine nor batch, and shows the same person at every size."""

from types import SimpleNamespace

import numpy as np

from .drawing import Array, Drawing, cos_sin, ellipse, rgb, soft, step, wave

VERSION = "1"
_TRAITS = 192  # uniform numbers per person; the length is fixed, so that new traits do not shift existing ones

_SKIN = "ffe2cc f6cdac e4b28a cb9165 9b6543 68422e 462d22"
_HAIR = "161212 301e16 5c3820 964622 c48e4a e4c480 b0aca8 eceae6"
_IRIS = "3a2214 68401e 627438 427c8c 5c94ce 808c96"


def portrait(index: int, size: int, seed: int) -> Array:
    """The portrait of a seed's person as uint8 [3,size,size] (RGB)."""
    factor = max(2, -(-64 // size))  # samples per pixel and axis
    pixel = 2 / (size * factor)
    axis = ((np.arange(size * factor) + 0.5) * pixel - 1).astype(np.float32)
    p = Drawing(np.random.default_rng([seed, index]).random(_TRAITS), pixel)
    c = _character(p)
    _background(p, axis, axis[:, None])

    # Head coordinates (u, v): shifted, scaled, and turned about the neck.
    x, y = (axis - c.shift_x) / c.scale, (axis[:, None] - c.shift_y) / c.scale
    cos, sin = cos_sin(c.tilt)
    u, v = cos * x + sin * (y - 0.6), cos * (y - 0.6) - sin * x + 0.6
    narrowing = 1 - c.jaw * step((v + 0.1) / 0.9)
    head_x, head_y = u / (c.width * narrowing), v / c.height
    head = (np.sqrt(head_x**2 + head_y**2) - 1) * c.width * narrowing
    # Facial features follow the turned surface: moved by yaw and pitch, foreshortened on the far side.
    fu, fv = (u - 0.11 * c.yaw) * (1 + 0.22 * c.yaw * u), v - 0.06 * c.pitch

    hair_rgb = _hair_behind(p, c, u, v)
    _body(p, c, x, y, u, v)
    _beard(p, c, fu, fv, _head(p, c, u, v, head, head_x, head_y))
    _mouth(p, c, fu, fv)
    _nose(p, c, fu, fv)
    eye_gap = _eyes(p, c, fu, fv)
    _hair_front(p, c, v, fu, fv, head, hair_rgb)
    _glasses(p, c, fu, fv, eye_gap)
    _hat(p, c, u, v, head)

    exposure, warmth = p.traits("0.88..1.1 -0.05..0.05")
    image = np.clip(p.rgb * (exposure * np.stack([1 + warmth, np.ones_like(warmth), 1 - warmth])), 0, 1)
    total = np.float32(0)
    for row, column in np.ndindex(factor, factor):  # numpy's own mean adds in another order
        total = total + image[:, row::factor, column::factor]
    return np.floor(total * np.float32(255 / factor**2) + 0.5).astype(np.uint8)


def _character(p: Drawing) -> SimpleNamespace:
    """The traits that several parts share: they are drawn first and in a fixed order."""
    c = SimpleNamespace()
    c.light_x, c.light_y, c.light, depth = p.traits("-1..1 -0.9..0.25 0.18..0.55 0..1")
    c.skin = p.palette(_SKIN, 0.018, depth)
    # Dark skin mostly has dark hair, unless the hair is grey.
    grey, grey_tone, tone = p.traits("12% 0.8..1 0..0.76")
    c.hair = p.palette(_HAIR, 0.03, grey * grey_tone + (1 - grey) * tone * (1 - 0.8 * depth**2))
    dyed = p.trait("6%")
    c.hair = c.hair * (1 - dyed) + p.free_colour(0.3, 0.6, 0.35) * dyed
    c.shift_x, c.shift_y, c.scale, c.tilt, c.yaw, c.pitch = p.traits("0±0.16 0.04±0.12 1.16±0.2 0±0.42 0±1 0±1")
    c.width, c.height, c.jaw, c.long_hair, c.volume = p.traits("0.43..0.54 0.56..0.68 0..0.34 -0.8..1 0.02..0.17")
    c.bald, c.hat, c.strands, c.strand_phase, c.wavy = p.traits("7% 13% 3..7 0..1 0..1")
    return c


def _background(p: Drawing, x: Array, y: Array) -> None:
    """Two colours blended along a direction, out-of-focus discs, and darker corners."""
    one, two = p.free_colour(0.2, 0.9, 0.25), p.free_colour(0.15, 0.85, 0.25)
    angle, sharp = p.traits(f"0..{2 * np.pi} 0.35..1.6")
    cos, sin = cos_sin(angle)
    p.rgb = one + (two - one) * step(0.5 + 0.5 * sharp * (cos * x + sin * y))
    for _ in range(2):
        cx, cy, radius = p.traits("-1.1..1.1 -1.1..0.6 0.2..0.7")
        colour, amount = p.free_colour(0.3, 1.0, 0.3), p.trait("-0.2..0.6")
        edge = step((radius - ellipse(x - cx, y - cy, 1.0, 1.0) - 1) / 0.25)
        p.paint(edge * np.maximum(amount, 0), colour)
    p.rgb *= 1 - p.trait("0..0.14") * (x * x + y * y)


def _hair_behind(p: Drawing, c: SimpleNamespace, u: Array, v: Array) -> Array:
    """Hair of a random length behind the head, with strands along it; returns its colour [3,S,S]."""
    bend = np.minimum(v + 0.3, 0.5)
    flow = u + 0.5 * (u - 0.4 * c.light_x * u) * bend + c.wavy * 0.05 * wave(2.2 * v + c.strand_phase)
    strand = 0.6 * wave(c.strands * flow + c.strand_phase) + 0.4 * wave(2.3 * c.strands * flow - c.strand_phase)
    gloss = soft(u - 0.35 * c.light_x, v + 0.48 + 0.1 * u * u, 0.55, 0.22)
    sheen = 0.97 + 0.1 * strand + (0.3 + 0.25 * strand) * gloss - 0.2 * step(v + 0.3) + 0.2 * c.light_x * u
    hair_rgb = np.clip(c.hair * sheen, 0, 1)
    drop, flare = np.maximum(c.long_hair, 0) * 0.95, 1 + 0.25 * c.long_hair * step(v)
    below = np.where(v > -0.1, np.maximum(v + 0.1 - drop, 0), v + 0.1)
    back = ellipse(u / flare, below, c.width + c.volume, c.height - 0.1 + c.volume)
    p.paint(p.inside(back) * (1 - c.bald) * (c.long_hair > 0), hair_rgb * 0.72)
    return hair_rgb


def _body(p: Drawing, c: SimpleNamespace, x: Array, y: Array, u: Array, v: Array) -> None:
    """Neck with the shadow of the chin, shoulders, and clothes with a round or pointed opening."""
    neck = np.abs(x) - c.width * 0.52 - 0.1 * step((y - 0.62) / 0.4)
    shadow = 0.86 - 0.3 * soft(u + 0.08 * c.light_x, v - 0.52, 0.5, 0.36) + 0.1 * c.light_x * x
    p.paint(p.inside(neck, 0.2 - y, y - 1.5), c.skin, shadow)
    wide, top, opening, pointed = p.traits("0.8..1.15 0.72..0.9 0.2..0.42 50%")
    cloth, second = p.free_colour(0.1, 0.85, 0.35), p.free_colour(0.1, 0.9, 0.3)
    stripes, period = p.traits("20% 2..5")
    shoulders = ellipse(x, y - top - 0.55, wide, 0.58)
    round_cut = ellipse(x, y - top + 0.05, opening, opening * 0.75)
    vee_cut = np.abs(x) * 0.85 + (y - top - opening * 0.9) * 0.55
    p.paint(p.inside(shoulders), c.skin, 0.9 + 0.12 * c.light_x * x)
    fold = 0.88 + 0.2 * c.light_x * x + 0.08 * wave(1.3 * x + 0.5 * y)
    pattern = stripes * step(3 * wave(period * y) + 0.5)
    cut = pointed * vee_cut + (1 - pointed) * round_cut
    p.paint(p.inside(shoulders, -cut), cloth + (second - cloth) * pattern, fold)


def _head(p: Drawing, c: SimpleNamespace, u: Array, v: Array, head: Array, head_x: Array, head_y: Array) -> Array:
    """Ears and the shaded face; returns the coverage [S,S] of the face."""
    for sign in (-1, 1):
        ear = ellipse(u - sign * c.width * 0.98, v - 0.02, 0.075, 0.14)
        inner = 0.82 - 0.22 * soft(u - sign * c.width, v - 0.02, 0.05, 0.1) + 0.15 * sign * c.light_x
        p.paint(p.inside(ear), c.skin, inner)
    depth = np.sqrt(np.maximum(1 - 0.92 * (head_x**2 + head_y**2), 0.02))
    shade = 0.62 + 0.4 * depth + c.light * (0.55 * c.light_x * head_x + 0.45 * c.light_y * head_y)
    # Shaded skin is redder: the three channels darken at different rates.
    face = p.inside(head)
    p.paint(face, np.clip(c.skin * (1 + rgb([0.8, 1.0, 1.1]) * (shade - 1)), 0, 1))
    return face


def _beard(p: Drawing, c: SimpleNamespace, u: Array, v: Array, face: Array) -> None:
    amount, line, chin_only = p.traits("-2.6..1.25 0.16..0.32 35%")
    edge = step((v - line + 0.55 * (0.3 - np.abs(u) / c.width) * (1 - chin_only)) / 0.12)
    edge = edge * (1 - chin_only * step((np.abs(u) - 0.17) / 0.06))
    moustache = step(1.4 - ((u / 0.2) ** 2 + ((v - 0.235) / 0.055) ** 2))
    lips = 1 - step(1.5 - ((u / 0.17) ** 2 + ((v - 0.32) / 0.07) ** 2))
    cover = face * np.clip(amount, 0, 0.95) * np.maximum(edge * lips, moustache)
    p.paint(cover, np.clip(c.hair * (0.85 + 0.12 * wave(7 * u + 2 * v)) * 0.9, 0, 1))


def _mouth(p: Drawing, c: SimpleNamespace, u: Array, v: Array) -> None:
    """Two lips around a curved line; open smiles show teeth over a dark mouth."""
    half, smile, fullness, opening, skew = p.traits("0.12..0.22 0.35±1.1 0.022..0.062 -0.09..0.085 0±0.12")
    lipstick = p.trait("-0.6..0.8")
    natural = c.skin * rgb([0.84, 0.6, 0.6])
    lips = natural + (rgb([0.72, 0.16, 0.22]) - natural) * np.maximum(lipstick, 0)
    opening = np.maximum(opening, 0)
    half = half + 0.05 * np.maximum(smile, 0)
    across = u / half
    arch = np.maximum(1 - across * across, 0)
    line = v - 0.325 + smile * 0.07 * (across * across - 0.4) - skew * u
    bow = 1 - 0.28 * soft(u, v * 0, 0.06, 1.0)
    upper = line + fullness * 0.75 * arch * bow + 0.5 * opening * arch
    lower = line - (fullness + opening) * arch
    ends = np.abs(u) - half
    p.paint(0.4 * soft(u, line - 0.1, half, 0.05), c.skin * 0.68)  # shadow under the lower lip
    p.paint(p.inside(-upper, lower, ends), lips, 0.92 + 1.6 * (line + 0.01))
    gap = np.maximum(-(line + 0.5 * opening * arch), line - 0.95 * opening * arch) - 0.007
    p.paint(p.inside(gap, ends + 0.012), 0.35 * lips)
    p.paint(p.inside(gap, ends + 0.012, line - 0.45 * opening, ends + 0.035) * (opening > 0.012), 0.93)  # teeth


def _nose(p: Drawing, c: SimpleNamespace, u: Array, v: Array) -> None:
    """A lit bridge, a shaded side away from the light, a tip, and nostrils."""
    length, wing = p.traits("0.13..0.22 0.055..0.1")
    u = u - 0.05 * c.yaw * step((v + 0.15) / 0.3)
    side = np.where(c.light_x > 0, -1.0, 1.0).astype(np.float32)
    reach = 0.02 + wing * step((v + 0.2) / (length + 0.2))
    body = (v < length) * step((v + 0.22) / 0.1)
    shade = step(1 - np.abs(u * side - reach) / (0.5 * reach + 0.015)) * body
    p.paint(0.34 * shade, c.skin * 0.58)
    p.paint(0.3 * soft(u, v - length - 0.02, wing * 1.4, 0.04), c.skin * 0.55)
    lit = u + 0.2 * wing * side
    p.paint(0.32 * soft(lit, v - 0.5 * length + 0.03, 0.03, length), np.clip(c.skin * 1.3, 0, 1))
    p.paint(0.4 * soft(lit, v - length + 0.045, wing * 0.6, 0.04), np.clip(c.skin * 1.35, 0, 1))
    for sign in (-1, 1):
        p.paint(0.7 * p.inside(ellipse(u - sign * wing * 0.55, v - length, wing * 0.3, 0.014)), c.skin * 0.35)


def _eyes(p: Drawing, c: SimpleNamespace, u: Array, v: Array) -> Array:
    """Eyes, lids, brows and cheeks, mirrored; returns the distance [1,1] from the middle to an eye."""
    gap, half, opened = p.traits("0.165..0.215 0.075..0.105 0.3..0.62")
    slant, gaze_x, gaze_y = p.traits("0±0.28 0±0.55 0±0.35")
    iris = p.palette(_IRIS, 0.03)
    lash = p.trait("0.1..1")
    shadow = p.free_colour(0.25, 0.6, 0.25)
    made_up, brow_y, brow_arch, brow_tilt = p.traits("-1.2..0.6 0.11..0.165 0..0.06 0±0.3")
    brow_thick, brow_dark, blush = p.traits("0.012..0.034 0.5..1 0..0.35")
    height = half * opened
    radius = np.minimum(half * 0.52, height * 1.1)
    for sign in (-1, 1):
        ex, ey = sign * u - gap, v + 0.07
        p.paint(blush * soft(ex - 0.04, v - 0.17, 0.17, 0.13), c.skin * rgb([1.02, 0.66, 0.62]))
        p.paint(0.42 * soft(ex, ey + 0.02, half * 1.7, half * 1.25), c.skin * 0.62)  # socket
        p.paint(np.maximum(made_up, 0) * soft(ex, ey + 0.04, half * 1.5, half), shadow)
        ey = ey + slant * ex * 0.7
        arch = np.maximum(1 - (ex / half) ** 2, 0)
        upper = ey + height * arch
        cover = p.inside(-upper, ey - 0.75 * height * arch, np.abs(ex) - half)
        p.paint(cover, 0.8 + 0.15 * c.skin)
        gx, gy = ex - sign * gaze_x * half * 0.6, ey + gaze_y * height * 0.5
        p.paint(cover * p.inside(ellipse(gx, gy, radius, radius)), iris)
        p.paint(cover * p.inside(ellipse(gx, gy, radius * 0.5, radius * 0.5)), iris * 0.12)
        spark = ellipse(gx + sign * 0.35 * radius, gy + 0.35 * radius, radius * 0.24, radius * 0.24)
        p.paint(0.9 * cover * p.inside(spark), 1)
        lid = p.inside(np.abs(upper) - 0.008 - 0.009 * lash, np.abs(ex) - half * (1 + 0.12 * lash))
        p.paint((0.45 + 0.5 * lash) * lid, c.skin * 0.18)
        p.paint(0.4 * p.inside(np.abs(upper + 0.032) - 0.005, np.abs(ex) - half * 0.9), c.skin * 0.5)  # crease
        along = (ex - 0.01) / (half * 1.45)
        middle = v + 0.07 + brow_y + brow_arch * (1 - along**2) + brow_tilt * (ex - 0.02) * 0.7
        thick = brow_thick * (1.15 - 0.55 * np.clip(along, -1, 1))
        brow = p.inside(np.abs(middle) - thick, np.abs(along * half * 1.45) - half * 1.45)
        p.paint(brow_dark * brow, c.hair * 0.75)
    return gap


def _hair_front(p: Drawing, c: SimpleNamespace, v: Array, fu: Array, fv: Array, head: Array, hair_rgb: Array) -> None:
    """The cap of hair above a hairline with a parting; long hair also frames the cheeks."""
    line, curve, part, sweep, jag = p.traits("-0.56..-0.28 0.4..3.2 0±0.34 0±0.6 0..0.03")
    away = fu - part
    hairline = line + curve * away * away * 0.9 + sweep * away * 0.4 + jag * wave(3.3 * fu + part)
    hairline = np.minimum(hairline, 0.02 + 0.42 * np.maximum(c.long_hair, -0.3))
    p.paint(0.28 * p.inside(head, fv - hairline - 0.05) * (1 - c.bald), hair_rgb * 0.45)
    rim = 1 - 0.22 * step(1 - np.abs(fv - hairline) / 0.06) - 0.3 * step(1 - np.abs(away) / 0.03) * (v < line)
    lift = c.volume * step(0.75 - 1.1 * v)
    p.paint(p.inside(head - lift, fv - hairline) * (1 - c.bald), hair_rgb, rim)


def _glasses(p: Drawing, c: SimpleNamespace, u: Array, v: Array, gap: Array) -> None:
    worn, dark, square, radius, flat, thick = p.traits("20% 25% 50% 0.115..0.15 0.7..1 0.011..0.026")
    frame, tint = p.free_colour(0.05, 0.5, 0.3), p.free_colour(0.05, 0.25, 0.1)
    opacity = p.trait("0.6..0.95")
    across = np.abs(u)
    gx, gy = (across - gap) / radius, (v + 0.06) / (radius * flat)
    power = square * np.sqrt(np.sqrt((gx * gx) ** 2 + (gy * gy) ** 2)) + (1 - square) * np.sqrt(gx**2 + gy**2)
    lens = (power - 1) * radius * flat
    p.paint(worn * (dark * opacity + (1 - dark) * 0.06) * p.inside(lens), tint)
    p.paint(worn * dark * 0.35 * p.inside(lens) * soft(gx + 0.3, gy + 0.5, 0.7, 0.4), 1)
    bridge = np.maximum(np.abs(v + 0.085) - thick * 0.6, across - gap + radius * 0.95)
    arms = np.maximum(gap + radius * 0.95 - across, across - c.width * 1.02)
    arms = np.maximum(arms, np.abs(v + 0.09) - thick * 0.6)
    p.paint(worn * p.inside(np.minimum(np.abs(lens) - thick, np.minimum(bridge, arms))), frame)


def _hat(p: Drawing, c: SimpleNamespace, u: Array, v: Array, head: Array) -> None:
    """A knitted hat, or one with a brim."""
    line, brimmed, puff = p.traits("-0.36..-0.22 50% 0.05..0.12")
    colour, band = p.free_colour(0.15, 0.8, 0.4), p.free_colour(0.1, 0.9, 0.4)
    bend = v - line + 0.12 * u * u
    shade = 0.92 + 0.3 * c.light_x * u + 0.1 * (1 - brimmed) * wave(p.trait("4..9") * u)  # with ribs
    p.paint(c.hat * p.inside(head - puff, bend), colour, shade)
    p.paint(c.hat * p.inside(head - puff, bend, -bend - 0.13), band, shade)
    p.paint(c.hat * brimmed * p.inside(ellipse(u, bend + 0.01, 0.74, 0.055)), colour, shade * 0.75)
