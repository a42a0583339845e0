"""A test problem with a known drift and synthetic levels, and its solution by EM, ML-EM and a jump process.

The SDE is dX = f(X, t) dt + s dW on [0, 1] in two dimensions, with f(x, t) = A x + r(x, t), A a damped rotation and r
smooth, bounded and nonlinear; s = 0 makes it an ODE. Level k is f^k = f + 2^-k g_k with g_k smooth random functions of
(x, t), independent between levels, of root mean square 1 per component; one evaluation costs T_k = 2^(gamma k).
Level 0 is the nearly free linear part, f^0 = A x. Each replicate draws its own family, start, Brownian path and coins,
so replicates are independent. States are arrays [d, R]; a row r is one setting on one replicate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DIMENSION = 2
FEATURES = 3  # waves per level
DAMPING, ROTATION = 0.5, 1.5  # A = [[-DAMPING, -ROTATION], [ROTATION, -DAMPING]]
_DECAY = complex(DAMPING, -ROTATION)  # A x is -_DECAY (x_1 + i x_2): the jump process uses complex numbers
NOISE = {"sde": 3.0, "ode": 0.0}  # s
START = 3.0  # standard deviation of X(0)
_SPACE, _TIME = 0.3, 1.0  # standard deviations of the waves' frequencies in x and in t
# size of a level's error: 2^-k; level 0 has no random waves, its error is the missing remainder
_SCALES = np.concatenate([[0.0], 0.5 ** np.arange(1, 64)])
CHUNK = 64  # steps or events whose random numbers are drawn at a time
_FAMILY, _PATH, _COINS, _EVENTS = range(4)  # separate random streams

Run = tuple[Any, tuple[int, ...]]  # one number per level, and the key of the random numbers
Arrays = Sequence[np.ndarray]
Time = np.ndarray | float  # one, or [R]


def remainder(x: np.ndarray, t: Time) -> np.ndarray:
    """r(x, t) [d, R], the nonlinear part of the true drift."""
    return np.stack([np.sin(0.7 * x[1] + 3 * t), np.cos(0.7 * x[0] - 2 * t)])


def linear(x: np.ndarray) -> np.ndarray:
    return np.stack([-DAMPING * x[0] - ROTATION * x[1], ROTATION * x[0] - DAMPING * x[1]])


def true_drift(x: np.ndarray, t: float) -> np.ndarray:
    return linear(x) + remainder(x, t)


def waves(parameters: np.ndarray, x: np.ndarray, t: Time) -> np.ndarray:
    """g(x, t) [d, R]; parameters [2 + 2 d, FEATURES, R]: time frequency, phase, space frequencies and amplitudes."""
    phase = parameters[0] * t
    phase += parameters[1]
    for i in range(DIMENSION):
        phase += parameters[2 + i] * x[i]
    np.cos(phase, out=phase)
    return np.stack([(parameters[2 + DIMENSION + i] * phase).sum(axis=0) for i in range(DIMENSION)])


@dataclass(frozen=True)
class Replicates:
    """P replicates: families of levels 0..K, starts, Brownian paths on a grid of N steps, exact end points."""

    parameters: np.ndarray  # [2 + 2 d, FEATURES, (K + 1) P], level k of replicate j in column k P + j
    start: np.ndarray  # [d, P]
    dw: np.ndarray  # [N, d, P] increments of W
    area: np.ndarray  # [N, d, P] integrals of W_u - W_start over each step
    end: np.ndarray  # [d, P] X(1) with the true drift
    noise: float  # s
    key: tuple[int, ...]  # seeds of all streams

    @property
    def count(self) -> int:
        return self.start.shape[1]

    def columns(self, level: np.ndarray, replicate: np.ndarray) -> np.ndarray:
        """The parameters [2 + 2 d, FEATURES, R] of levels [R] of replicates [R]."""
        return np.take(self.parameters, level * self.count + replicate, axis=2)


def draw(key: Sequence[int], count: int, levels: int, grid: int, noise: float) -> Replicates:
    """Draw `count` replicates with levels 1..`levels`, a Brownian grid of `grid` steps, and s = `noise`."""
    rng = np.random.default_rng([*key, _FAMILY])
    shape = (FEATURES, (levels + 1) * count)
    time = rng.normal(0, _TIME, (1, *shape))
    phase = rng.uniform(0, 2 * np.pi, (1, *shape))
    space = rng.normal(0, _SPACE, (DIMENSION, *shape))
    amplitude = rng.normal(0, np.sqrt(2 / FEATURES), (DIMENSION, *shape))  # E cos^2 = 1/2: rms 1 per component
    rng = np.random.default_rng([*key, _PATH])
    start, h = START * rng.standard_normal((DIMENSION, count)), 1 / grid
    dw = rng.standard_normal((grid, DIMENSION, count)) * np.sqrt(h)
    area = h / 2 * dw + rng.standard_normal(dw.shape) * np.sqrt(h**3 / 12)
    parameters, end = np.concatenate([time, phase, space, amplitude]), solve(start, dw, area, noise)
    return Replicates(parameters, start, dw, area, end, noise, tuple(key))


def solve(start: np.ndarray, dw: np.ndarray, area: np.ndarray, noise: float) -> np.ndarray:
    """X(1) [d, P] with the true drift, from increments and areas [N, d, P], by the two-stage SRA1 (Roessler 2010):
    strong order 1.5 for additive noise, order 2 for the ODE."""
    x, h = start.copy(), 1 / len(dw)
    for i in range(len(dw)):
        first = true_drift(x, i * h)
        second = true_drift(x + 0.75 * h * first + 1.5 * noise / h * area[i], (i + 0.75) * h)
        x = x + h / 3 * (first + 2 * second) + noise * dw[i]
    return x


def euler(replicates: Replicates, n: int, runs: Sequence[Run]) -> np.ndarray:
    """X(1) [S, d, P] by ML-EM with n steps (a divisor of N), for S runs on the replicates' Brownian paths.
    A run has probabilities p of levels 0..K with p_0 = 1; if all are 1, it is EM with level K. One step is
    X' = X + h sum_k (B_k / p_k) (f^k - f^{k-1})(X) + s dW with f^{-1} = 0 and independent coins B_k."""
    count, h = replicates.count, 1 / n
    # the highest level k with p_0 = ... = p_k = 1; the telescope up to it equals f^k
    always = [next((k for k, value in enumerate(p) if value < 1), len(p)) - 1 for p, _ in runs]
    base, replicate = np.repeat(always, count), np.tile(np.arange(count), len(runs))
    parameters = replicates.columns(base, replicate)
    parameters[2 + DIMENSION :] *= _SCALES[base]
    nonlinear = (base > 0).astype(float)
    streams = [np.random.default_rng([*replicates.key, _COINS, n, *key]) for _, key in runs]
    coins = [(s, k, p[k]) for s, (p, _) in enumerate(runs) for k in range(always[s] + 1, len(p))]
    dw = replicates.noise * replicates.dw.reshape(n, -1, DIMENSION, count).sum(axis=1)  # over n equal steps
    x = np.tile(replicates.start, len(runs))
    for first in range(0, n, CHUNK):
        length = min(CHUNK, n - first)
        step, row, level, weight = _fires(streams, coins, length, count)
        bounds = np.searchsorted(step, np.arange(length + 1))
        for i in range(length):
            t = (first + i) * h
            drift = waves(parameters, x, t) + nonlinear * remainder(x, t) + linear(x)
            if bounds[i] < bounds[i + 1]:
                fired = slice(bounds[i], bounds[i + 1])
                rows = row[fired]
                jumps = weight[fired] * difference(replicates, level[fired], replicate[rows], x[:, rows], t)
                for j in range(DIMENSION):  # several levels may fire on one row
                    np.add.at(drift[j], rows, jumps[j])
            x += h * drift
            x.reshape(DIMENSION, -1, count)[...] += dw[first + i][:, None, :]
    return x.reshape(DIMENSION, len(runs), count).swapaxes(0, 1)


def _fires(streams: list[np.random.Generator], coins: list[tuple[int, int, float]], steps: int, count: int) -> Arrays:
    """Steps (ascending), rows, levels and weights 1 / p [fires] of the next steps; coins: run, level, probability."""
    parts = [(np.empty(0, int), np.empty(0, int), np.empty(0, int), np.empty(0))]
    for run, level, p in coins:
        cells = np.flatnonzero(streams[run].random(steps * count) < p)
        fired = np.full(len(cells), level), np.full(len(cells), 1 / p)
        parts.append((cells // count, run * count + cells % count, *fired))
    step, row, level, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(step, kind="stable")
    return step[order], row[order], level[order], weight[order]


def difference(replicates: Replicates, level: np.ndarray, replicate: np.ndarray, x: np.ndarray, t: Time) -> np.ndarray:
    """(f^k - f^{k-1})(x, t) [d, R] for levels k [R] >= 1 of replicates [R]."""

    def error(k: np.ndarray) -> np.ndarray:
        return _SCALES[k] * waves(replicates.columns(k, replicate), x, t)

    return error(level) - error(level - 1) + (level == 1) * remainder(x, t)  # f^0 lacks the remainder


def jump_process(replicates: Replicates, runs: Sequence[Run]) -> np.ndarray:
    """X(1) [S, d, P] of the Poisson limit of ML-EM; a run has rates lambda_k of levels 1..K.
    Level k fires after exponential waiting times of rate lambda_k and moves the path by (f^k - f^{k-1})(X, t) /
    lambda_k. Between events the path follows f^0 = A x and the Brownian motion, with the exact solution
    X(t) = e^(A t) V + s Y(t). V changes only at events. Y solves dY = A Y dt + dW and does not depend on the levels."""
    count, y_grid = replicates.count, linear_response(replicates)
    streams = [np.random.default_rng([*replicates.key, _EVENTS, *key]) for _, key in runs]
    v = np.tile(replicates.start[0] + 1j * replicates.start[1], (len(runs), 1))
    y, clock = np.zeros_like(v), np.zeros(v.shape)
    running = list(range(len(runs)))
    while running:
        drawn = [draw_events(streams[s], runs[s][0], count) for s in running]
        events = [np.concatenate(column, axis=1) for column in zip(*drawn, strict=True)]
        state = [part[running].ravel() for part in (v, y, clock)]
        replicate = np.tile(np.arange(count), len(running))
        for event in zip(*events, strict=True):
            fire(replicates, y_grid, state, replicate, event)
        for part, moved in zip((v, y, clock), state, strict=True):
            part[running] = moved.reshape(len(running), count)
        running = [s for s in running if clock[s].min() < 1]
    end = np.exp(-_DECAY) * v + replicates.noise * y_grid[-1]
    return np.stack([end.real, end.imag], axis=1)


def draw_events(rng: np.random.Generator, rate: np.ndarray, count: int) -> Arrays:
    """Waiting times, levels, 1 / rates and complex normals of the next events, each [CHUNK, P], for rates [K].
    One clock has the sum of the rates; its events belong to level k with probability lambda_k / sum lambda."""
    wait = rng.exponential(1 / rate.sum(), (CHUNK, count))
    which = np.searchsorted(np.cumsum(rate)[:-1] / rate.sum(), rng.random((CHUNK, count)), side="right")
    return wait, which + 1, 1 / rate[which], rng.standard_normal((CHUNK, count, 2)).view(complex)[..., 0]


def fire(replicates: Replicates, y_grid: np.ndarray, state: Arrays, replicate: np.ndarray, event: Arrays) -> None:
    """Move each row of `state` (V, Y, t) to its next event and apply the jump; rows past t = 1 do not jump."""
    (v, y, clock), (wait, level, move, normal), grid = state, event, len(replicates.dw)
    t = clock + wait
    at = np.minimum(t, 1.0)
    turn = np.exp(-_DECAY * at)
    # Y at the event, by a Brownian bridge from the last known point in this grid cell to the end of the cell
    cell = np.minimum((at * grid).astype(int), grid - 1)
    left = np.maximum(np.minimum(clock, at), cell / grid)
    y[:] = np.where(clock > cell / grid, y, y_grid[cell, replicate])
    gap, rest = at - left, np.maximum((cell + 1) / grid - at, 0.0)
    share = gap / np.maximum(gap + rest, 1e-300)
    y += (y_grid[cell + 1, replicate] - y) * share + np.sqrt(share * rest) * normal
    z = turn * v + replicates.noise * y
    jump = difference(replicates, level, replicate, np.stack([z.real, z.imag]), at)
    v += np.where(t < 1, move, 0.0) / turn * (jump[0] + 1j * jump[1])
    clock[:] = t


def linear_response(replicates: Replicates) -> np.ndarray:
    """Complex Y [N + 1, P] on the grid: Y' = e^(A h) Y + int e^(A (h - u)) dW, expanded as dW + A I (to h^2.5)."""
    dw, area = (part[:, 0] + 1j * part[:, 1] for part in (replicates.dw, replicates.area))
    y = np.zeros((len(dw) + 1, replicates.count), complex)
    decay = np.exp(-_DECAY / len(dw))
    for i, forced in enumerate(dw - _DECAY * area):
        y[i + 1] = decay * y[i] + forced
    return y
