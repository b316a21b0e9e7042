"""The density of a Hessian's eigenvalues, by stochastic Lanczos quadrature.

For a random vector v with E[v v^T] = 1, m Lanczos steps give a tridiagonal matrix T = Q diag(theta) Q^T, and
sum_i Q_1i^2 f(theta_i) is the m-point Gauss quadrature of v^T f(H) v / v^T v: exact for polynomials f up to degree
2m - 1. Its mean over vectors estimates trace f(H) / P. Source: Golub & Welsch 1969; Ghorbani et al., arXiv:1901.10159.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from irgrow.analysis.hessian import Hessian, Product
from irgrow.ir.errors import UnknownName


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues with weights: per random vector (row) the Gauss nodes and weights; a row's weights sum to 1."""

    nodes: tuple[NDArray[np.float64], ...]
    weights: tuple[NDArray[np.float64], ...]

    def moment(self, power: int) -> float:
        """The estimate of trace(H^power) / P."""
        return float(np.mean([w @ t**power for t, w in zip(self.nodes, self.weights, strict=True)]))

    def density(self, points: int = 400, width: float | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(eigenvalue, density) on a grid: the nodes as Gaussians of standard deviation `width`.

        Default width: 1 % of the range. The density integrates to 1.
        """
        nodes, weights = np.concatenate(self.nodes), np.concatenate(self.weights) / len(self.nodes)
        low, high = float(nodes.min()), float(nodes.max())
        sigma = width or 0.01 * ((high - low) or abs(high) or 1.0)
        grid = np.linspace(low - 5 * sigma, high + 5 * sigma, points)
        bumps = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return grid, bumps @ weights


def spectrum(hessian: Hessian, *, vectors: int = 4, steps: int = 60, seed: int = 0) -> Spectrum:
    """Quadratures of `steps` nodes from `vectors` random sign vectors; vectors x steps products.

    Every new Lanczos vector is orthogonalised against all before it, in float64. Fewer nodes where the Krylov
    space is exhausted. UnknownName for less than one vector or step.
    """
    if vectors < 1 or steps < 1:
        raise UnknownName("spectrum", f"vectors={vectors}, steps={steps}", "at least one of each")
    draw = torch.Generator().manual_seed(seed)
    product = hessian._product()
    nodes, weights = [], []
    for _ in range(vectors):
        signs = torch.randint(0, 2, (hessian.size,), generator=draw, dtype=torch.float64) * 2 - 1
        diagonal, beside = _lanczos(product, signs.to(hessian.device), min(steps, hessian.size))
        values, q = eigh_tridiagonal(diagonal, beside)
        nodes.append(values)
        weights.append(q[0] ** 2)
    return Spectrum(tuple(nodes), tuple(weights))


def _lanczos(product: Product, start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of T."""
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    largest = 0.0
    for _ in range(steps):
        w = product(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        done = torch.stack(basis)
        for _ in range(2):  # once leaves what cancellation left
            w = w - done.mT @ (done @ w)
        norm = float(w.norm())
        largest = max(largest, norm, abs(diagonal[-1]))
        if len(diagonal) == steps or norm <= 1e-12 * largest:
            break
        beside.append(norm)
        basis.append(w / norm)
    return diagonal, beside
