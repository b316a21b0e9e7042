"""Whitening with a covariance, beside its eigenvectors."""

from __future__ import annotations

from typing import Any

import torch

from bench.suite import Case, Made, op
from irgrow.kernels.whiten import whiten as kernel
from irgrow.kernels.whiten import whiten_cost


@op("whiten", cases=[{"d": 1024, "columns": 64}], tiny={"d": 24, "columns": 4}, devices=("cpu", "cuda"))
def whiten(*, d: int, columns: int, device: str) -> Made:
    """W^T N with W^T S W = I, float64, beside eigh in float64. S: covariance of 8 d samples, condition about 1e4.

    W is not unique, but N^T W W^T N is: that is compared.
    """
    draw = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1.7, d, dtype=torch.float64)
    data = torch.randn(8 * d, d, generator=draw, dtype=torch.float64) * scale
    S = (data.T @ data / len(data)).to(device)
    N = torch.randn(d, columns, generator=draw, dtype=torch.float64).to(device)

    def eigenvectors() -> torch.Tensor:
        values, vectors = torch.linalg.eigh(S)
        return (vectors * values.rsqrt()).T @ N

    def view(name: str, result: Any) -> Any:
        return result.T @ result

    flops, moved = whiten_cost(d)
    yield Case(
        f"d={d}, N [{d}, {columns}]",
        ours=lambda: kernel(S).apply_inverse(N),
        opponents={"eigh, float64": eigenvectors},
        tolerance=1e-9,
        goal=10.0 if d == 1024 and device == "cpu" else None,
        cost=(flops + d * d * columns, moved),
        precision="float64",
        view=view,
        note="",
    )
