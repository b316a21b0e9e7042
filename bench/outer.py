"""Sums of outer products over a data set (S, N, M), beside three addmm_ calls per batch."""

from __future__ import annotations

import torch

from bench.suite import Case, Made, op
from irgrow.kernels import outer as kernel

PAIRS = (("b", "b"), ("b", "g"), ("c", "g"))


@op(
    "outer",
    cases=[{"d": d, "samples": 8192, "batch": 1024} for d in (256, 512, 1024)],
    tiny={"d": 24, "samples": 96, "batch": 32},
    devices=("cpu", "cuda"),
)
def outer(*, d: int, samples: int, batch: int, device: str) -> Made:
    """S = sum b b^T, N = sum b g^T, M = sum c g^T over batches, float64 sums; beside three float32 addmm_ a batch.

    of_roof is against the least arithmetic: the triangle of S and the two full products. Ours adds into float64.
    """
    draw = torch.Generator().manual_seed(0)
    data = {name: torch.randn(samples, d, generator=draw).to(device) for name in "bcg"}
    batches = [{name: x[a : a + batch] for name, x in data.items()} for a in range(0, samples, batch)]

    def ours() -> list[torch.Tensor]:
        sums = kernel.OuterSums(PAIRS)
        for one in batches:
            sums.add(one)
        found = sums.sums()
        return [found[pair] for pair in PAIRS]

    def addmm() -> list[torch.Tensor]:
        out = [torch.zeros(d, d, device=device) for _ in PAIRS]
        for one in batches:
            for total, (left, right) in zip(out, PAIRS, strict=True):
                total.addmm_(one[left].T, one[right])
        return out

    flops = samples * d * (d + 1) + 2 * 2.0 * samples * d * d
    yield Case(
        f"S, N, M: d={d}, {samples} samples",
        ours=ours,
        opponents={"3 x addmm_, float32 sums": addmm},
        tolerance=1e-5,
        goal=(1.3 if d >= 256 else None) if device == "cpu" else (2.0 if d <= 256 else None),
        cost=(flops, 3 * 4.0 * samples * d + 3 * 8.0 * d * d),
    )
