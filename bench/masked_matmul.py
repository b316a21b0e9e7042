"""y = W x where only some entries of W exist, beside a dense matrix with zeros."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from bench.suite import Case, Made, op
from irgrow.kernels.masked_matmul import mask as make_mask
from irgrow.kernels.masked_matmul import masked_matmul as kernel
from irgrow.kernels.masked_matmul import masked_matmul_cost

FORWARD = {0.05: 9.0, 0.1: 4.5, 0.25: 1.8}
OVER_CSR = 3.0  # on a GPU, up to 5 %
BOTH = {0.05: 10.0, 0.1: 4.0, 0.25: 1.5}


@op(
    "masked_matmul",
    cases=[
        {"n": 1024, "batch": 256, "density": density, "backward": backward}
        for backward in (False, True)
        for density in FORWARD
    ],
    tiny={"n": 48, "batch": 8},
    devices=("cpu", "cuda"),
)
def masked_matmul(*, n: int, batch: int, density: float, backward: bool, device: str) -> Made:
    """[n, n] with a random mask times [n, batch], float32: forward beside one dense product of the masked matrix.

    And beside torch's CSR product (on a GPU cuSPARSE), in a row of its own.

    Forward and backward (gradients of x and of the existing entries) beside three dense products and a mask.
    """
    draw = torch.Generator().manual_seed(0)
    row, column = (torch.rand(n, n, generator=draw) < density).nonzero(as_tuple=True)
    mask = make_mask(n, n, row, column)
    values = (torch.randn(len(row), generator=draw) / (density * n) ** 0.5).to(device)
    x, g = (torch.randn(n, batch, generator=draw).to(device) for _ in range(2))
    row, column = row.to(device), column.to(device)
    dense, zeros = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
    dense[row, column], zeros[row, column] = values, 1.0
    by_sample, g_by_sample = x.T.contiguous(), g.T.contiguous()
    flops, moved = masked_matmul_cost(mask, batch)
    full_size = n == 1024 and batch == 256 and device == "cpu"
    label = f"n={n}, B={batch}, density={density:g}, {'forward+backward' if backward else 'forward'}"
    if not backward:
        with torch.no_grad():
            yield Case(
                label,
                ours=lambda: kernel(mask, x, values),
                opponents={
                    "dense W @ X, premasked": lambda: dense @ x,
                    "dense F.linear, premasked": lambda: F.linear(by_sample, dense).T,
                },
                tolerance=1e-5,
                goal=FORWARD.get(density) if full_size else None,
                cost=(flops, moved),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # "in beta state"
                csr = dense.to_sparse_csr()
            yield Case(
                label,
                ours=lambda: kernel(mask, x, values, route="sparse"),
                opponents={"torch CSR": lambda: csr @ x},
                tolerance=1e-5,
                goal=OVER_CSR if device != "cpu" and density <= 0.05 else None,
                cost=(flops, moved),
            )
        return
    leaves = x.requires_grad_(), values.requires_grad_()

    def ours() -> tuple[torch.Tensor, ...]:
        y = kernel(mask, x, values)
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    @torch.no_grad()
    def by_feature() -> tuple[torch.Tensor, ...]:
        return dense @ x, dense.T @ g, (g @ x.T).mul_(zeros)

    @torch.no_grad()
    def by_row() -> tuple[torch.Tensor, ...]:
        return by_sample @ dense.T, g_by_sample @ dense, (g_by_sample.T @ by_sample).mul_(zeros)

    def view(name: str, result: Any) -> Any:
        if name == "ours":
            return result
        y, d_x, d_w = result
        return (y.T, d_x.T, d_w[row, column]) if name.endswith("by sample") else (y, d_x, d_w[row, column])

    yield Case(
        label,
        ours=ours,
        opponents={"3 dense products + mask": by_feature, "3 dense products + mask, by sample": by_row},
        tolerance=1e-5,
        goal=BOTH.get(density) if full_size else None,
        cost=(3 * flops, 3 * moved),
        view=view,
    )
