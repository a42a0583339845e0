"""A Brownian bridge tree over a base grid: coarse grids need few random numbers, and all grids get one path.

Base step i has one white noise z_i. A grid's standardised increment over base steps [a, b) is a weighted sum of these,
with weights sqrt(du_i / sum du) in the clock u = alpha^2/sigma^2 ("snr") or sqrt(dt_i / sum dt) in t ("time"). Summed
one by one they would take all base_steps numbers. The tree is another orthonormal basis of the same space, in which
such sums have few terms (Levy's construction of Brownian motion, for two clocks at once).

A node is a range that is split in two at one point. It carries the increment X of its range in the clock u, and the
part V of the increment Y in t that is orthogonal to it: Y = rho X + s V. The numbers of its two halves follow from its
own and two fresh ones by an orthogonal 4x4 matrix, so the law is exact, however nearly the clocks are proportional."""

from bisect import bisect, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .process import spread

_NEGLIGIBLE = 1e-9  # a coefficient that float32 does not see next to a row's norm of 1


@dataclass(frozen=True)
class BridgeTree:
    """The tree over N base points. A node is named by the point p in 1..N-2 that splits its range; arrays have N rows.
    Columns number the random numbers, 2N - 2 in all: X and V of the whole range, then two for each node, the fresh
    ones. The second changes no X of the two halves, so the clock "snr" needs it only if a half is split again."""

    log_u: np.ndarray  # [N] log-SNR
    time: np.ndarray  # [N]
    root: int  # the node of the whole range; 0 without any
    halves: np.ndarray  # [N, 2] the nodes of its halves; 0 for a single base step
    column: np.ndarray  # [N, 2] of its fresh numbers
    matrix: np.ndarray  # [N, 4, 4] (X, V, fresh, fresh) -> (X, V, X, V) of its halves
    y: np.ndarray  # [N, 2] rho and s; (1, 0) for a single base step

    def coefficients(self, index: np.ndarray, clock: str) -> tuple[np.ndarray, np.ndarray]:
        """Ascending columns [m] and float64 coefficients [n-1, m] (orthonormal rows) of the standardised increments
        between ascending base points index [n]."""
        points, terms = index.tolist(), {}

        def expand(node: int, start: int, stop: int) -> np.ndarray:
            """What the increments take of X and V of a range [n-1, 2]; fills in their terms of all it contains."""
            after = bisect(points, start)
            if after == len(points) or points[after] >= stop:  # the range is a part of one increment, or of none
                part = np.zeros((len(points) - 1, 2))
                if 0 < after < len(points):
                    spans = log_span(self, clock, np.array([start, points[after - 1]]), np.array([stop, points[after]]))
                    part[after - 1] = np.exp(0.5 * (spans[0] - spans[1])) * self.y[node if clock == "time" else 0]
                return part
            left, right = self.halves[node]
            taken = np.hstack([expand(left, start, node), expand(right, node, stop)]) @ self.matrix[node]
            terms.update(zip(self.column[node].tolist(), taken[:, 2:].T, strict=True))
            return taken[:, :2]

        terms.update(enumerate(expand(self.root, 0, len(self.time) - 1).T))
        kept = sorted(column for column, term in terms.items() if np.abs(term).max() > _NEGLIGIBLE)
        return np.array(kept), np.stack([terms[column] for column in kept], axis=1)


def log_span(tree: BridgeTree, clock: str, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Log of the clock's time between base points; a log, since u spans tens of orders of magnitude."""
    if clock == "snr":
        return tree.log_u[stop] + np.log(-np.expm1(tree.log_u[start] - tree.log_u[stop]))
    return np.log(tree.time[start] - tree.time[stop])


@lru_cache(maxsize=8)
def bridge_tree(base_logsnr: bytes, base_time: bytes) -> BridgeTree:
    """The tree over a base grid, given by the bytes of its two float64 arrays [N]; it depends on nothing else.
    Points are split off in the order of `_families`, so an increment of a grid among these has few terms."""
    log_u, time = np.frombuffer(base_logsnr), np.frombuffer(base_time)
    n = len(log_u)
    ends, halves, column = np.zeros((n, 2), int), np.zeros((n, 2), int), np.zeros((n, 2), int)
    depth, split, count = np.full(n, -1), [0, n - 1], 2
    for family in _families(n):
        new = np.setdiff1d(family, split)
        column[new] = count + np.arange(2 * len(new)).reshape(2, -1).T
        count += 2 * len(new)
        for p in new.tolist():
            place = bisect(split, p)
            left, right = ends[p] = split[place - 1], split[place]
            above = max(left, right, key=lambda end: depth[end])  # the node whose range this splits; 0 for the root
            depth[p] = depth[above] + 1
            halves[above, int(p > above)] = p
            insort(split, p)
    matrix, y = np.zeros((n, 4, 4)), np.tile([1.0, 0.0], (n, 1))
    tree = BridgeTree(log_u, time, int(halves[0, 1]), halves, column, matrix, y)
    for level in range(int(depth.max()), -1, -1):
        nodes = np.flatnonzero(depth == level)
        matrix[nodes], y[nodes] = _splits(tree, nodes, ends[nodes])
    return tree


def _families(n: int) -> list[np.ndarray]:
    """Points in the order of splitting: grids of 2, 4, 8, ... points, each followed by one more if it divides n - 1."""
    powers = [2**k for k in range(1, n.bit_length()) if 2**k < n]
    sizes = [size for power in powers for size in (power, power + 1) if size == power or (n - 1) % power == 0]
    return [spread(n, size) for size in [*sizes, n]]


def _splits(tree: BridgeTree, nodes: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matrices [m, 4, 4], and rho and s [m, 2], of nodes with ranges [m, 2] whose halves are done."""

    def shares(clock: str) -> np.ndarray:
        """Square roots of the shares of both halves in the time of the range [m, 2]."""
        left, right = log_span(tree, clock, ends[:, 0], nodes), log_span(tree, clock, nodes, ends[:, 1])
        return np.exp(0.5 * (np.stack([left, right], axis=1) - np.logaddexp(left, right)[:, None]))

    # X and Y of the range, and what splits X, by X and V of both halves; the last vector completes the basis
    in_u, vectors = shares("snr"), np.zeros((len(nodes), 4, 4))
    vectors[:, [0, 2], 0] = in_u
    vectors[:, :, 1] = (shares("time")[:, :, None] * tree.y[tree.halves[nodes]]).reshape(-1, 4)
    vectors[:, [0, 2], 2] = in_u[:, ::-1] * [1, -1]
    vectors[:, [1, 3], 3] = 1
    basis, triangle = np.linalg.qr(vectors)  # orthogonal, whatever the vectors
    sign = np.where(np.diagonal(triangle, axis1=1, axis2=2) < 0, -1.0, 1.0)[:, None]
    return basis * sign, (triangle * sign.transpose(0, 2, 1))[:, :2, 1]
