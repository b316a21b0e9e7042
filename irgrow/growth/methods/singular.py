"""The largest singular triplets of a small dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def top_singular(P: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], values [k] descending, V [n, k]) with P ~ U diag(values) V^T, in float64."""
    U, values, Vh = torch.linalg.svd(P.double(), full_matrices=False)
    return U[:, :k], values[:k], Vh[:k].mT
