"""Whitening and pseudo-inverse solves with a positive semi-definite matrix S, in float64.

A whitening is any W with W^T S W = I on the range of S. All of them give the same singular values of W^T N and
the same alpha = W u, whichever triangle or rotation they use, so the cheapest that is safe is taken:

    cholesky   S = L L^T, W = L^{-T}                      S well conditioned
    eigen      S = V diag(lambda) V^T, W = V lambda^{-1/2}, only lambda > rtol * max(lambda)        otherwise

Which one, and how many directions were kept, is reported. Thresholds are relative: c * S keeps the directions
that S keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irgrow.kernels.outer import Product, compiled

# A sum of float32 products has, measured, eigenvalues up to 3e-8 of the largest that are rounding noise: what is
# below cannot be told from zero, and dividing by it would make noise the largest direction.
RTOL = 1e-7
# How far below zero (relative) rounding may push an eigenvalue, and how far S and S^T may differ.
ROUNDING = 1e-6
_MARGIN = 8.0  # the estimate of the smallest eigenvalue may be this much too large
_PANEL = 96  # rows per step of the factorisation
_GROUP = 16  # columns of a triangular system that are solved together


@dataclass(frozen=True, eq=False)
class Whitening:
    """W with W^T S W = I on the kept directions; `rank` of them (rows of `apply_inverse`)."""

    route: str  # "cholesky" or "eigen"
    ranks: tuple[int, ...]  # directions kept, per matrix of a batch
    condition: float  # estimated largest / smallest kept eigenvalue (worst of a batch; inf when nothing is kept)
    note: str
    factor: Tensor  # cholesky: L [..., d, d] (entries above the diagonal are not defined); eigen: W [..., d, rank]

    @property
    def rank(self) -> int:
        return max(self.ranks, default=0)

    def apply_inverse(self, N: Tensor) -> Tensor:
        """W^T N: L^{-1} N, or lambda^{-1/2} V^T N. N [..., d, q] -> [..., rank, q]; rank = d for Cholesky.

        Matrices of a batch that keep fewer directions have zero rows at the end.
        """
        N = self._checked("N", N, self.factor.shape[-2])
        if self.route == "cholesky":
            return _solve(self.factor, N)
        return self.factor.mT @ N

    def unapply(self, U: Tensor) -> Tensor:
        """W U: L^{-T} U, or V lambda^{-1/2} U. U [..., rank, k] -> [..., d, k], in the range of S."""
        U = self._checked("U", U, self.factor.shape[-1])
        if self.route == "cholesky":
            return _solve(self.factor, U, transposed=True)
        return self.factor @ U

    def _checked(self, name: str, matrix: Tensor, rows: int) -> Tensor:
        if matrix.ndim < 2 or matrix.shape[-2] != rows:
            raise ValueError(f"whitening: {name} has shape {tuple(matrix.shape)}, expected (..., {rows}, columns)")
        return _finite(f"whitening: {name}", matrix.to(self.factor.dtype))


@dataclass(frozen=True, eq=False)
class Solution:
    """S^+ B, and how it was found."""

    solution: Tensor  # [..., d, q]
    route: str
    ranks: tuple[int, ...]
    condition: float
    note: str

    @property
    def rank(self) -> int:
        return max(self.ranks, default=0)


def whiten_reference(S: Tensor, *, rtol: float = RTOL, jitter: float = 0.0) -> Whitening:
    """`whiten` by its definition: always from the eigenvectors."""
    return _by_eigenvectors(_jittered(_checked_matrix("whiten_reference", S), jitter), rtol)


def pseudo_solve_reference(S: Tensor, B: Tensor, *, rtol: float = RTOL, jitter: float = 0.0) -> Solution:
    """`pseudo_solve` by its definition: the Moore-Penrose inverse, then a product."""
    S = _jittered(_checked_matrix("pseudo_solve_reference", S), jitter)
    solution = torch.linalg.pinv(S, rtol=rtol, hermitian=True) @ B.double()
    ranks = torch.linalg.matrix_rank(S, rtol=rtol, hermitian=True)
    return Solution(solution, "eigen", tuple(ranks.reshape(-1).tolist()), float("nan"), "reference")


@torch.no_grad()
def whiten(S: Tensor, *, rtol: float = RTOL, jitter: float = 0.0) -> Whitening:
    """W is ready with W^T S W = I: by Cholesky where S is well conditioned, else by eigenvectors. float64.

    S [..., d, d] symmetric positive semi-definite (a batch takes the eigen route as soon as one of its matrices
    needs it). Directions with an eigenvalue below `rtol` times the largest are dropped. `jitter` (relative to
    trace(S)/d) is added to the diagonal first; 0 because a matrix that needs it goes by eigenvectors, exactly.

    Raises ValueError if S is not square, not finite, not symmetric, or has an eigenvalue below zero by more than
    rounding (relative 1e-6).
    """
    S = _jittered(_checked_matrix("whiten", S), jitter)
    if S.shape[-1] > 0:
        L = _cholesky(S)
        if L is not None:
            condition = _condition(S, L)
            if condition * _MARGIN * rtol < 1.0:
                ranks = (S.shape[-1],) * max(1, S.shape[:-2].numel())
                return Whitening("cholesky", ranks, condition, f"well conditioned (about {condition:.0e})", L)
    return _by_eigenvectors(S, rtol)


@torch.no_grad()
def pseudo_solve(S: Tensor, B: Tensor, *, rtol: float = RTOL, jitter: float = 0.0) -> Solution:
    """The least-squares solution of smallest norm, S^+ B, in float64. S [..., d, d], B [..., d, q] -> [..., d, q].

    S as in `whiten`, with the same routes and errors.
    """
    whitening = whiten(S, rtol=rtol, jitter=jitter)
    if B.ndim < 2 or B.shape[-2] != S.shape[-1]:
        raise ValueError(f"pseudo_solve: B has shape {tuple(B.shape)}, expected (..., {S.shape[-1]}, columns)")
    solution = whitening.unapply(whitening.apply_inverse(B))
    return Solution(solution, whitening.route, whitening.ranks, whitening.condition, whitening.note)


def whiten_cost(d: int) -> tuple[int, int]:
    """(flops, bytes) of `whiten` on the Cholesky route; the eigen route takes about 30 times these flops."""
    return d**3 // 3, 3 * 8 * d * d


# --- the two routes -------------------------------------------------------------------------------------------


def _cholesky(S: Tensor) -> Tensor | None:
    """L with S = L L^T, or None where a pivot is not positive. Junk stays above the diagonal.

    One matrix goes in panels: what is left of a panel's rows is a triangular system with the rows before.
    """
    d, engine = S.shape[-1], _compiled(S)
    if engine is None:
        L, info = torch.linalg.cholesky_ex(S)
        return L if not bool(info.any()) else None
    U = _in_lines(S)  # L^T: its rows are what later panels multiply
    for a in range(0, d, _PANEL):
        b = min(a + _PANEL, d)
        corner = U[a:b, a:b]
        if a:
            engine.add([Product(corner, U[:a, a:b], U[:a, a:b])], scale=-1.0)
        pivot, info = torch.linalg.cholesky_ex(corner)
        if int(info):
            return None
        corner.copy_(pivot.mT)
        if b < d:
            engine.substitute(U[:b, :b].mT, U, first=a, columns=(b, d))
    return U[:, :d].mT


def _solve(L: Tensor, B: Tensor, *, transposed: bool = False) -> Tensor:
    """L^{-1} B, or L^{-T} B, for the Cholesky factor L."""
    engine = _compiled(L)
    if engine is None or B.ndim > 2:
        return torch.linalg.solve_triangular(L.mT if transposed else L, B, upper=transposed)
    X = _in_lines(B)
    engine.substitute(L.mT if transposed else L, X, first=0, columns=(0, B.shape[1]), upper=transposed)
    return X[:, : B.shape[1]]


def _in_lines(matrix: Tensor) -> Tensor:
    """A copy whose rows end after whole lines, with room for one group of columns more."""
    rows, columns = matrix.shape
    copy = matrix.new_zeros(rows, (-(-columns // _GROUP) + 1) * _GROUP)
    copy[:, :columns] = matrix
    return copy


def _compiled(matrix: Tensor) -> Any:
    """What works on this one matrix, compiled; None where LAPACK does as well."""
    if matrix.ndim > 2 or matrix.shape[-1] <= 2 * _PANEL or matrix.device.type != "cpu":
        return None
    return compiled()


def _condition(S: Tensor, L: Tensor) -> float:
    """The ratio of extreme eigenvalues, estimated from a few (inverse) power iterations: too small by a factor < 8.

    Pivots alone cannot tell: their ratio may be harmless while the matrix is singular.
    """
    norm = torch.linalg.vector_norm
    y = _probes(S)
    x = y[:, :1]
    for _ in range(3):
        x = S @ (x / norm(x, dim=-2, keepdim=True))
        y = y / norm(y, dim=-2, keepdim=True)
        y = _solve(L, y.expand(*S.shape[:-2], *y.shape[-2:]))
        y = _solve(L, y, transposed=True)
    largest, smallest_inverse = norm(x, dim=(-2, -1)), norm(y, dim=-2).amax(-1)
    diagonal = S.diagonal(dim1=-2, dim2=-1).amax(-1)  # a lower bound too: a dominant feature that the probe missed
    return float((torch.maximum(largest, diagonal) * smallest_inverse).max())


def _by_eigenvectors(S: Tensor, rtol: float) -> Whitening:
    batch, d = S.shape[:-2], S.shape[-1]
    if d == 0:
        return Whitening("eigen", (0,) * max(1, batch.numel()), float("inf"), "S is empty", S)
    values, vectors = torch.linalg.eigh(S)
    values, vectors = values.flip(-1), vectors.flip(-1)
    size = values.abs().amax(-1, keepdim=True)
    if bool((values[..., -1:] < -ROUNDING * size).any()):
        raise ValueError(
            f"whiten: S has the eigenvalue {float(values.min()):.3g} (largest {float(values.max()):.3g}), "
            "expected a positive semi-definite matrix"
        )
    kept = (values > rtol * size) & (values > 0)
    ranks = tuple(int(r) for r in kept.sum(-1).reshape(-1).tolist())
    rank = max(ranks, default=0)
    kept, values = kept[..., :rank], values[..., :rank]
    scale = torch.where(kept, values, 1.0).rsqrt() * kept
    smallest = torch.where(kept, values, float("inf")).amin(-1) if rank else torch.zeros(())
    condition = float((size.squeeze(-1) / smallest).max()) if rank else float("inf")
    note = f"{min(ranks)} of {d} directions have an eigenvalue above {rtol:.0e} of the largest; the others are dropped"
    if len(ranks) > 1:
        note += " (the smallest number in the batch)"
    return Whitening("eigen", ranks, condition, note, vectors[..., :rank] * scale.unsqueeze(-2))


# --- what callers may get wrong -------------------------------------------------------------------------------


def _finite(who: str, matrix: Tensor) -> Tensor:
    if matrix.numel():
        low, high = torch.aminmax(matrix)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = int((~torch.isfinite(matrix)).sum())
            raise ValueError(f"{who} has {bad} entries that are NaN or infinite, expected finite ones")
    return matrix


def _checked_matrix(who: str, S: Tensor) -> Tensor:
    if S.ndim < 2 or S.shape[-1] != S.shape[-2]:
        raise ValueError(f"{who}: S has shape {tuple(S.shape)}, expected (..., d, d)")
    if not S.is_floating_point():
        raise TypeError(f"{who}: S is {S.dtype}, expected a floating type")
    S = _finite(f"{who}: S", S.detach().double())
    if S.numel():
        # S x = S^T x for a random x only if S = S^T; ten times cheaper than reading S across its rows.
        x = _probes(S)[:, :1]
        error = (S @ x - S.mT @ x).abs().amax((-2, -1))
        if bool((error > ROUNDING * torch.maximum(S.amax((-2, -1)), -S.amin((-2, -1)))).any()):
            worst = float((S - S.mT).abs().max())
            raise ValueError(f"{who}: S differs from its transpose by {worst:.3g}, expected a symmetric matrix")
    return S


def _jittered(S: Tensor, jitter: float) -> Tensor:
    if jitter < 0:
        raise ValueError(f"jitter is {jitter}, expected at least 0")
    if jitter == 0 or S.shape[-1] == 0:
        return S
    S = S.clone()
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    diagonal += jitter * diagonal.mean(-1, keepdim=True)
    return S


def _probes(S: Tensor) -> Tensor:
    """Four random vectors [d, 4], always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(S.shape[-1], 4, dtype=S.dtype, generator=generator).to(S.device)
