"""The largest singular values and vectors, beside a full SVD."""

from __future__ import annotations

from typing import Any

import torch

from bench.suite import Case, Made, op
from irgrow.kernels.topk import top_singular

ENERGY = 1e-4  # of the energy of the best k directions, this much may be missed


@op(
    "topk",
    cases=[{"n": 1024, "k": 8, "spectrum": spectrum} for spectrum in ("decaying", "flat")],
    tiny={"n": 160, "k": 2},
    devices=("cpu", "cuda"),
)
def topk(*, n: int, k: int, spectrum: str, device: str) -> Made:
    """The top k singular triplets of [n, n], float64, beside torch.linalg.svd; energy at least 0.9999 of the best.

    decaying: singular values 1/i (what growth matrices look like); flat: a Gaussian matrix, where randomised methods
    fail and ours must notice. torch.svd_lowrank (no check) is measured where it passes the gate.
    """
    draw = torch.Generator().manual_seed(0)
    P = torch.randn(n, n, generator=draw, dtype=torch.float64)
    if spectrum == "decaying":
        left, right = torch.linalg.qr(P).Q, torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
        P = left @ torch.diag(1.0 / torch.arange(1, n + 1, dtype=torch.float64)) @ right.T
    P = P.to(device)

    def view(name: str, U: Any) -> Any:
        """How much of P lies along these left vectors."""
        return torch.linalg.vector_norm(U.double().T @ P).square()

    common: dict[str, Any] = {"ours": lambda: top_singular(P, k).U, "tolerance": ENERGY, "view": view}
    full = n == 1024 and k == 8 and device == "cpu"
    yield Case(
        f"top {k} of {n}x{n}, {spectrum}",
        opponents={"full SVD, float64": lambda: torch.linalg.svd(P, full_matrices=False).U[:, :k]},
        goal=40.0 if full and spectrum == "decaying" else None,
        **common,
    )
    if spectrum == "decaying":
        yield Case(
            f"top {k} of {n}x{n}, {spectrum}",
            opponents={
                "svd_lowrank, 4 rounds, unchecked": lambda: torch.svd_lowrank(P, q=2 * k + 8, niter=4)[0][:, :k]
            },
            **common,
        )
