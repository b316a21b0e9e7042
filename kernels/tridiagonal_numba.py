"""A symmetric matrix brought to tridiagonal form by reflections, and vectors carried back: float64, on one thread.

Every step updates the matrix by the reflection before (two outer products) and multiplies it by the next one in the
same pass, so the matrix is read and written once per column, which is what this costs.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numba import njit

from irgrow.kernels import lanes
from irgrow.kernels.activations_numba import compiled
from irgrow.kernels.entry import fingerprint
from irgrow.kernels.lanes import LINE_BYTES, load, multiply_add, pointer, splat, store, total, totals

SOURCES = fingerprint(lanes, sys.modules[__name__])
LINE = LINE_BYTES // 8


@compiled
def _reduce(matrix):
    """(diagonal [n], beside it [n - 1], factors [n]): H matrix H for H = H_0 H_1 ..., H_k = 1 - factors[k] v_k v_k^T.

    matrix [n, pitch], whole lines, the first n columns symmetric; afterwards v_k stands in row k right of the diagonal.
    """
    n, pitch = matrix.shape
    diagonal, beside, factors = np.zeros(n), np.zeros(max(n - 1, 0)), np.zeros(n)
    v, w, x, p = np.zeros(pitch), np.zeros(pitch), np.zeros(pitch), np.zeros(n)  # due: matrix -= v w^T + w v^T
    m_, x_ = pointer(matrix.ctypes.data, 0.0), pointer(x.ctypes.data, 0.0)
    v_, w_ = pointer(v.ctypes.data, 0.0), pointer(w.ctypes.data, 0.0)
    for k in range(n):
        row = matrix[k]
        for j in range(k, n):
            row[j] -= v[k] * w[j] + w[k] * v[j]
        diagonal[k] = row[k]
        if k + 1 == n:
            break
        rest = 0.0
        for j in range(k + 2, n):
            rest += row[j] * row[j]
        first = row[k + 1]
        if rest == 0.0:
            beside[k] = first
            for j in range(k + 2, n):
                row[j] = 0.0
        else:
            size = np.sqrt(first * first + rest)
            beside[k] = -size if first > 0.0 else size
            factors[k] = (beside[k] - first) / beside[k]
            for j in range(k + 2, n):
                row[j] /= first - beside[k]
        row[k + 1] = 1.0
        for j in range(k + 1):
            v[j], w[j], x[j] = 0.0, 0.0, 0.0
        for j in range(k + 1, n):
            x[j] = row[j]
        begin, along = (k + 1) // LINE * LINE, 0.0
        i = k + 1
        while i < n:
            if i + 4 <= n:
                at = i * pitch
                a0, a1, a2, a3 = splat(-v[i]), splat(-v[i + 1]), splat(-v[i + 2]), splat(-v[i + 3])
                b0, b1, b2, b3 = splat(-w[i]), splat(-w[i + 1]), splat(-w[i + 2]), splat(-w[i + 3])
                s0, s1, s2, s3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
                for j in range(begin, pitch, LINE):
                    here, there, next = load(v_, j), load(w_, j), load(x_, j)
                    c0 = multiply_add(b0, here, multiply_add(a0, there, load(m_, at + j)))
                    c1 = multiply_add(b1, here, multiply_add(a1, there, load(m_, at + pitch + j)))
                    c2 = multiply_add(b2, here, multiply_add(a2, there, load(m_, at + 2 * pitch + j)))
                    c3 = multiply_add(b3, here, multiply_add(a3, there, load(m_, at + 3 * pitch + j)))
                    store(m_, at + j, c0)
                    store(m_, at + pitch + j, c1)
                    store(m_, at + 2 * pitch + j, c2)
                    store(m_, at + 3 * pitch + j, c3)
                    s0, s1 = multiply_add(c0, next, s0), multiply_add(c1, next, s1)
                    s2, s3 = multiply_add(c2, next, s2), multiply_add(c3, next, s3)
                p[i], p[i + 1], p[i + 2], p[i + 3] = totals(s0, s1, s2, s3)
                i += 4
            else:
                at, a0, b0, s0 = i * pitch, splat(-v[i]), splat(-w[i]), splat(0.0)
                for j in range(begin, pitch, LINE):
                    c0 = multiply_add(b0, load(v_, j), multiply_add(a0, load(w_, j), load(m_, at + j)))
                    store(m_, at + j, c0)
                    s0 = multiply_add(c0, load(x_, j), s0)
                p[i] = total(s0)
                i += 1
        for j in range(k + 1, n):
            p[j] *= factors[k]
            along += p[j] * x[j]
        for j in range(k + 1, n):
            v[j] = x[j]
            w[j] = p[j] - 0.5 * factors[k] * along * x[j]
    return diagonal, beside, factors


@compiled
def _carry_back(matrix, factors, vectors):
    """vectors [n, k] become H vectors, for the H of `_reduce`."""
    n, count = vectors.shape
    sums = np.zeros(count)
    for k in range(n - 2, -1, -1):
        if factors[k] == 0.0:
            continue
        sums[:] = 0.0
        for i in range(k + 1, n):
            for c in range(count):
                sums[c] += matrix[k, i] * vectors[i, c]
        for i in range(k + 1, n):
            for c in range(count):
                vectors[i, c] -= factors[k] * matrix[k, i] * sums[c]


def _entry_points(sources: int) -> tuple[Any, ...]:
    """The functions Python calls. `sources` makes a change of any source compile anew."""
    entry: Any = njit(cache=True, nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")

    @entry
    def reduce(matrix):
        found = _reduce(matrix)
        return found[0], found[1], found[2], sources

    @entry
    def carry_back(matrix, factors, vectors):
        _carry_back(matrix, factors, vectors)
        return sources

    return reduce, carry_back


reduce, carry_back = _entry_points(SOURCES)
