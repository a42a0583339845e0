"""The Poisson limit of ML-EM as an integrator with events instead of time steps, for the problem in problem.py."""

from collections.abc import Sequence

import numpy as np

from .problem import CHUNK, DAMPING, EVENTS, ROTATION, Replicates, Run, difference

_DECAY = complex(DAMPING, -ROTATION)  # A x is -_DECAY (x_1 + i x_2): the jump process uses complex numbers


def jump_process(replicates: Replicates, runs: Sequence[Run]) -> np.ndarray:
    """X(1) [S, d, P] of the Poisson limit of ML-EM; a run has rates lambda_k of levels 1..K.

    Level k fires after exponential waiting times of rate lambda_k and moves the path by (f^k - f^{k-1})(X, t) /
    lambda_k. Between events the path follows f^0 = A x and the Brownian motion, with the exact solution
    X(t) = e^(A t) V + s Y(t). V changes only at events. Y solves dY = A Y dt + dW and does not depend on the levels.
    """
    count, y_grid = replicates.count, linear_response(replicates)
    streams = [np.random.default_rng([*replicates.key, EVENTS, *key]) for _, key in runs]
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


def draw_events(rng: np.random.Generator, rates: Sequence[float] | np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Draw waiting times, levels, 1 / rates and complex normals of the next events, each [CHUNK, P].

    One clock has the sum of the rates; its events belong to level k with probability lambda_k / sum lambda."""
    rate = np.asarray(rates)
    wait = rng.exponential(1 / rate.sum(), (CHUNK, count))
    edges = np.cumsum(rate)[:-1] / rate.sum()
    which = np.searchsorted(edges, rng.random((CHUNK, count)), side="right")
    normal = rng.standard_normal((CHUNK, count, 2)).view(complex)[..., 0]
    return wait, which + 1, 1 / rate[which], normal


def fire(
    replicates: Replicates,
    y_grid: np.ndarray,
    state: Sequence[np.ndarray],
    replicate: np.ndarray,
    event: tuple[np.ndarray, ...],
) -> None:
    """Move each row of `state` (V, Y, t) to its next event and apply the jump; rows past t = 1 do not jump."""
    (v, y, clock), (wait, level, move, normal) = state, event
    t = clock + wait
    at = np.minimum(t, 1.0)
    turn = np.exp(-_DECAY * at)
    # Y at the event, by a Brownian bridge from the last known point in this grid cell to the end of the cell
    cell = np.minimum((at * replicates.grid).astype(int), replicates.grid - 1)
    left = np.maximum(np.minimum(clock, at), cell / replicates.grid)
    y[:] = np.where(clock > cell / replicates.grid, y, y_grid[cell, replicate])
    gap, rest = at - left, np.maximum((cell + 1) / replicates.grid - at, 0.0)
    share = gap / np.maximum(gap + rest, 1e-300)
    y += (y_grid[cell + 1, replicate] - y) * share + np.sqrt(share * rest) * normal
    z = turn * v + replicates.noise * y
    jump = difference(replicates, level, replicate, np.stack([z.real, z.imag]), at)
    v += np.where(t < 1, move, 0.0) / turn * (jump[0] + 1j * jump[1])
    clock[:] = t


def linear_response(replicates: Replicates) -> np.ndarray:
    """Complex Y [N + 1, P] on the grid: Y' = e^(A h) Y + int e^(A (h - u)) dW, expanded as dW + A I (to h^2.5)."""
    dw, area = (part[:, 0] + 1j * part[:, 1] for part in (replicates.dw, replicates.area))
    y = np.zeros((replicates.grid + 1, replicates.count), complex)
    decay = np.exp(-_DECAY / replicates.grid)
    for i, forced in enumerate(dw - _DECAY * area):
        y[i + 1] = decay * y[i] + forced
    return y
