"""The k largest singular values of a matrix and their vectors, in float64, without the other ones where possible.

    subspace    a random block, multiplied by P P^T a few times: 40 times less work than a full SVD at 8 of 1,024.
                Right when the spectrum decays; how right is measured (the residual P V - U s), and where it is not
                good enough after more rounds (a flat spectrum) the next route is taken, and the note says so
    gram        the last eigenvectors of the smaller of P^T P and P P^T; the first route where that one is small,
                unless its eigenvalues span more than its digits
    svd         everything; for small matrices, many vectors, or k-th values too small for a Gram matrix

Vectors come with a free sign (and a free rotation inside equal singular values), always the same for the same P.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from irgrow.kernels.outer import accumulate_gram, mirror, row_products

TOLERANCE = 1e-3  # residual |P v - s u| relative to s; the energy that is missed goes with its square
_SMALL = 128  # a full SVD of such a side takes less than the checks
_THIN = 256  # up to this side, a Gram matrix and its last eigenvectors take less than iterating on a longer side
_ROUNDS = (3, 5, 8)  # of subspace iteration before each check
_MOST = 1024  # columns; larger Gram matrices leave the cache, and a blocked reduction takes less
_NEGLIGIBLE = 1e-12  # relative to the largest value: zero, for a residual
_GRAM_LIMIT = 1e-3  # a Gram matrix squares values: smaller ones than this lose more than half of their digits


@dataclass(frozen=True, eq=False)
class TopK:
    """P is about U diag(s) V^T: s [k] descending, U [p, k] and V [q, k] with orthonormal columns."""

    U: Tensor
    s: Tensor
    V: Tensor
    route: str  # "subspace", "gram" or "svd"
    note: str


def top_singular_reference(P: Tensor, k: int) -> TopK:
    """`top_singular` by its definition: a full SVD, cut."""
    U, s, Vh = torch.linalg.svd(P.double(), full_matrices=False)
    return TopK(U[:, :k], s[:k], Vh[:k].mT, "svd", "reference")


@torch.no_grad()
def top_singular(P: Tensor, k: int, *, seed: int = 0, tolerance: float = TOLERANCE) -> TopK:
    """The k largest singular values of P [p, q] with their vectors, float64. `seed` starts the iteration.

    Raises ValueError if k is not in 0..min(p, q), or P is not a finite matrix.
    """
    if P.ndim != 2:
        raise ValueError(f"top_singular: P has shape {tuple(P.shape)}, expected (p, q)")
    if not P.is_floating_point():
        raise TypeError(f"top_singular: P is {P.dtype}, expected a floating type")
    smaller = min(P.shape)
    if not 0 <= k <= smaller:
        raise ValueError(f"top_singular: k is {k}, expected 0..{smaller} for a {P.shape[0]}x{P.shape[1]} matrix")
    P = P.detach().double()
    largest = 0.0
    if P.numel():
        low, high = torch.aminmax(P)
        largest = max(-float(low), float(high))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = int((~torch.isfinite(P)).sum())
            raise ValueError(f"top_singular: P has {bad} entries that are NaN or infinite, expected finite ones")
    if largest and not 1e-30 < largest < 1e30:  # squares, and float32, are to stay in range
        found = top_singular(P / largest, k, seed=seed, tolerance=tolerance)
        return TopK(found.U, found.s * largest, found.V, found.route, found.note)
    width = 2 * k + 8
    if smaller <= _SMALL or 3 * width > smaller or largest == 0.0 or k == 0:
        return _by_svd(P, k, "small, or most of the spectrum wanted: full SVD")
    if smaller <= _THIN and 2 * smaller <= max(P.shape):
        thin = _by_gram(P, k, f"only {smaller} on the shorter side")
        if thin is not None:
            return thin
    found, residual = _by_iteration(P, k, width, seed, tolerance)
    if residual <= tolerance:
        return found
    why = f"subspace iteration left a residual of {residual:.1e} (a flat spectrum)"
    if (flat := _by_gram(P, k, why)) is not None:
        return flat
    return _by_svd(P, k, f"{why}, and the values span too much for a Gram matrix: full SVD")


def top_singular_cost(p: int, q: int, k: int) -> tuple[int, int]:
    """(flops, bytes) of the subspace route with the first number of rounds, half of it in float32."""
    products = 2 * _ROUNDS[0] + 3
    return 2 * p * q * (2 * k + 8) * products, p * q * (4 * 2 * _ROUNDS[0] + 8 * 3)


def _by_iteration(P: Tensor, k: int, width: int, seed: int, tolerance: float) -> tuple[TopK, float]:
    """Subspace iteration on rows (a few rows times a matrix is twice as fast as the matrix times a few columns).

    The rounds run in float32, which finds the subspace to 1e-6; the last one, and everything that is returned, in
    float64.
    """
    rough, generator = P.float(), torch.Generator().manual_seed(seed)
    right = torch.randn(width, P.shape[1], generator=generator).to(P.device)
    done = 0
    for rounds in _ROUNDS:
        for _ in range(rounds):
            left = _orthonormal(row_products(right, rough))
            right = _orthonormal(row_products(left, rough.T))
        done += rounds
        Q = _orthonormal(right.double() @ P.T)
        every, s, small = torch.linalg.svd((Q @ P).mT, full_matrices=False)  # a tall matrix: half the time
        U, s, V = small[:k] @ Q, s[:k], every.mT[:k]
        error = torch.linalg.vector_norm(V @ P.T - s[:, None] * U, dim=1)
        residual = float((error / (s + _NEGLIGIBLE * s[0] / tolerance)).max())
        if residual <= tolerance:
            break
        right = every.mT.float()
    note = f"subspace iteration: {done} rounds of {width} vectors, residual {residual:.1e}"
    return TopK(U.mT, s, V.mT, "subspace", note), residual


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT).Q.mT


def _by_gram(P: Tensor, k: int, why: str) -> TopK | None:
    """None where the k-th value is too small for a matrix of squares."""
    tall = P.shape[0] >= P.shape[1]
    P = P if tall else P.mT
    values, vectors = _last_eigenvectors(P, k)
    s, V = values.flip(0).clamp(min=0.0).sqrt(), vectors.flip(1)
    if float(s[-1]) <= _GRAM_LIMIT * float(s[0]):
        return None
    U = (P @ V) / s
    return TopK(*((U, s, V) if tall else (V, s, U)), "gram", f"{why}: eigenvectors of the Gram matrix")


def _last_eigenvectors(P: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of P^T P, ascending, and their vectors: on a CPU with numba without the other ones."""
    n, held = P.shape[1], _tridiagonal() if P.device.type == "cpu" else None
    if held is None or n > _MOST:
        values, vectors = torch.linalg.eigh(P.mT @ P)
        return values[n - k :], vectors[:, n - k :]
    gram = np.zeros((n, -(-n // held.LINE) * held.LINE))
    mirror(accumulate_gram(torch.from_numpy(gram)[:, :n], P))
    diagonal, beside, factors, _ = held.reduce(gram)
    found, small = scipy.linalg.eigh_tridiagonal(diagonal, beside, select="i", select_range=(n - k, n - 1))
    vectors = np.ascontiguousarray(small)
    held.carry_back(gram, factors, vectors)
    return torch.from_numpy(found), torch.from_numpy(vectors)


@lru_cache(1)
def _tridiagonal() -> Any:
    """The compiled reduction, or None without numba. (SciPy's wakes threads that get into the way of torch's.)"""
    try:
        from irgrow.kernels import tridiagonal_numba
    except ImportError:
        return None
    return tridiagonal_numba


def _by_svd(P: Tensor, k: int, note: str) -> TopK:
    U, s, Vh = torch.linalg.svd(P, full_matrices=False)
    return TopK(U[:, :k], s[:k], Vh[:k].mT, "svd", note)
