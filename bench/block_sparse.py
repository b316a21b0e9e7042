"""y = W x where only some square blocks of W exist, beside a dense matrix with zeros and torch's blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from bench.suite import Case, Made, op
from irgrow.kernels.block_sparse import block_mask, block_sparse_matmul, block_sparse_matmul_cost

RATE = 0.9  # of the dense product's flop/s, on the blocks that exist: wanted on a GPU in bfloat16
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@op(
    "block_sparse",
    cases=[
        {"n": 4096, "batch": 512, "size": size, "density": 0.1, "dtype": dtype, "backward": backward}
        for dtype, size in (("float32", 32), ("float32", 64), ("bfloat16", 64))
        for backward in (False, True)
    ],
    tiny={"n": 256, "batch": 8, "density": 0.25},
    devices=("cpu", "cuda"),
)
def block_sparse(*, n: int, batch: int, size: int, density: float, dtype: str, backward: bool, device: str) -> Made:
    """[n, n] with a random mask of blocks times [n, batch]: beside one dense product, and torch's BSR product.

    Forward and backward (gradients of x and of the existing blocks) beside three dense products. of_roof: of the
    rate at which dense products of this dtype run, on the blocks that exist.
    """
    draw = torch.Generator().manual_seed(0)
    mask = block_mask(torch.rand(n // size, n // size, generator=draw) < density, size)
    kind = getattr(torch, dtype)
    values, x, g = (
        t.to(device, kind)
        for t in (
            torch.randn(mask.blocks, size, size, generator=draw) / (density * n) ** 0.5,
            torch.randn(n, batch, generator=draw),
            torch.randn(n, batch, generator=draw),
        )
    )
    dense = mask.matrix(values)
    flops, moved = block_sparse_matmul_cost(mask, batch, itemsize=values.element_size())
    passes = "forward+backward" if backward else "forward"
    label = f"n={n}, B={batch}, blocks of {size}, density={density:g}, {dtype}, {passes}"
    if not backward:
        with torch.no_grad():
            opponents = {"dense W @ X, premasked": lambda: dense @ x}
            if device != "cpu" or dtype == "float32":  # torch has no other BSR product on a CPU
                opponents["torch BSR"] = _bsr(dense, size, x)
            for name, opponent in opponents.items():
                wanted = device != "cpu" and dtype == "bfloat16" and name.startswith("dense")
                yield Case(
                    label,
                    ours=lambda: block_sparse_matmul(mask, x, values),
                    opponents={name: opponent},
                    tolerance=TOLERANCE[dtype],
                    goal=RATE / mask.density if wanted else None,
                    cost=(flops, moved),
                    precision=dtype,
                )
        return
    leaves = x.requires_grad_(), values.requires_grad_()

    def ours() -> tuple[torch.Tensor, ...]:
        y = block_sparse_matmul(mask, x, values)
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    @torch.no_grad()
    def products() -> tuple[torch.Tensor, ...]:
        return dense @ x, dense.T @ g, mask.values(g @ x.T)

    yield Case(
        label,
        ours=ours,
        opponents={"3 dense products + mask": products},
        tolerance=TOLERANCE[dtype],
        cost=(3 * flops, 3 * moved),
        precision=dtype,
    )


def _bsr(dense: torch.Tensor, size: int, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "in beta state"
        matrix = dense.to_sparse_bsr(size)
    return lambda: matrix @ x
