"""y = act(W x + bias) for a matrix W of which only some square blocks exist; values feature-major [n, B].

    blocks     only the blocks that exist are multiplied: forward, for the gradient of x, and for that of the values
    dense      the blocks are put into a full matrix and multiplied; its gradient is read at the blocks that exist

`choose` says which is faster, and why. Both are differentiable any number of times; second derivatives, torch.func
and torch.compile go through plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from irgrow.kernels.activations import ACTIVATIONS

SIZES = (16, 32, 64)
ROUTES = ("auto", "blocks", "dense")


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of a [rows, columns] matrix exist; values [blocks, size, size] in this order. Made by `block_mask`.

    All index tensors are int32. Blocks stand row by row: those of block row i are pointer[i]..pointer[i + 1] - 1.
    """

    rows: int
    columns: int
    size: int
    pointer: Tensor  # [rows / size + 1]
    row: Tensor  # [blocks]: the block row of each block
    column: Tensor  # [blocks]: the block column of each block
    transposed_pointer: Tensor  # [columns / size + 1]: the same, column by column
    transposed_block: Tensor  # [blocks]: the number of each block in that order
    _there: dict[torch.device, BlockMask] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.column)

    @property
    def density(self) -> float:
        return self.blocks * self.size**2 / max(1, self.rows * self.columns)

    def __repr__(self) -> str:
        return f"BlockMask({self.rows}x{self.columns}, {self.blocks} blocks of {self.size}, {self.density:.1%})"

    def to(self, device: torch.device) -> BlockMask:
        """The same structure there (kept: moved once)."""
        if self.column.device == device:
            return self
        if device not in self._there:
            names = ("pointer", "row", "column", "transposed_pointer", "transposed_block")
            moved = (getattr(self, name).to(device) for name in names)
            self._there[device] = BlockMask(self.rows, self.columns, self.size, *moved)
        return self._there[device]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        return self.row.long(), self.column.long()

    def matrix(self, values: Tensor) -> Tensor:
        """W [rows, columns], zero outside the blocks; differentiable."""
        here, b = self.to(values.device), self.size
        full = values.new_zeros(self.rows // b, self.columns // b, b, b).index_put(here._places, values)
        return full.transpose(1, 2).reshape(self.rows, self.columns)

    def values(self, matrix: Tensor) -> Tensor:
        """[blocks, size, size]: what a full matrix holds in the blocks; differentiable."""
        here, b = self.to(matrix.device), self.size
        return matrix.reshape(self.rows // b, b, self.columns // b, b).transpose(1, 2)[here._places]


def block_mask(pattern: Tensor, size: int) -> BlockMask:
    """Block (i, j) exists where `pattern[i, j]` is true: bool [rows / size, columns / size].

    Raises ValueError for a size that is not 16, 32 or 64, or a pattern that is no boolean matrix.
    """
    if size not in SIZES:
        raise ValueError(f"block_mask: size {size}, expected one of {SIZES}")
    if pattern.ndim != 2 or pattern.dtype != torch.bool:
        raise ValueError(f"block_mask: pattern is {pattern.dtype} {tuple(pattern.shape)}, expected a boolean matrix")
    pattern = pattern.detach().cpu()
    number = torch.zeros(pattern.shape, dtype=torch.int32)
    number[pattern] = torch.arange(int(pattern.sum()), dtype=torch.int32)
    row, column = (index.int() for index in pattern.nonzero(as_tuple=True))
    pointers = []
    for axis in (1, 0):
        counts = pattern.sum(axis).int()
        pointers.append(torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)]))
    transposed = number.T[pattern.T]
    rows, columns = (size * n for n in pattern.shape)
    return BlockMask(rows, columns, size, pointers[0], row, column, pointers[1], transposed)


def block_sparse_matmul_reference(
    mask: BlockMask, x: Tensor, values: Tensor, bias: Tensor | None = None, *, activation: str = "identity"
) -> Tensor:
    """`block_sparse_matmul` by its definition, in plain torch: any dtype, device and number of derivatives."""
    z = mask.matrix(values) @ x
    return ACTIVATIONS[activation](z if bias is None else z + bias[:, None])


def block_sparse_matmul(
    mask: BlockMask,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    route: str = "auto",
) -> Tensor:
    """act(W x + bias), [rows, B]. x [columns, B], values [blocks, size, size], bias [rows]; one dtype and device.

    Differentiable in x, values and bias. Raises ValueError for operands that do not fit or an unknown name, and
    RuntimeError if the route "blocks" is asked for by name where it cannot run.
    """
    _check(mask, x, values, bias, activation, route)
    return block_sparse_matmul_reference(mask, x, values, bias, activation=activation)


def block_sparse_matmul_cost(mask: BlockMask, batch: int, *, itemsize: int = 4) -> tuple[int, int]:
    """(flops, bytes) of the forward pass over the blocks; the backward pass takes twice both."""
    entries = mask.blocks * mask.size**2
    return 2 * entries * batch, itemsize * (entries + batch * (mask.rows + mask.columns)) + 4 * mask.blocks


# --- what callers may get wrong -------------------------------------------------------------------------------


def _check(mask: BlockMask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str, route: str) -> None:
    if route not in ROUTES:
        raise ValueError(f"block_sparse_matmul: route {route!r}, expected one of {ROUTES}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"block_sparse_matmul: activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "values": (values, (mask.blocks, mask.size, mask.size)),
        "bias": (bias, (mask.rows,)),
    }
    if x.ndim != 2 or len(x) != mask.columns:
        raise ValueError(f"block_sparse_matmul: x has shape {tuple(x.shape)}, expected ({mask.columns}, batch)")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"block_sparse_matmul: {name} have shape {tuple(tensor.shape)}, expected {shape}")
        if (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"block_sparse_matmul: {name} are {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}; "
                "expected the same"
            )
