"""`block_sparse_matmul` on a GPU, in Triton: blocks on tensor cores, forward and both gradients.

One program per block row and tile of the batch multiplies the blocks of its row in order; one program per block sums
its gradient over the batch. Nothing is scattered: results repeat bit for bit. Sums are float32; float32 operands are
split into three tf32 products, which keeps float32's precision.
"""

# mypy: ignore-errors
# (Triton infers the types of what is compiled)

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irgrow.kernels import block_sparse as door
from irgrow.kernels import gpu
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.activations_triton import activate, slope_of
from irgrow.kernels.layer_triton import LINE, aligned, in_lines, keeps_slope, lines_of, through_activation
from irgrow.kernels.shared import reference_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = 64  # batch columns of a program; 128 spill registers for blocks of 64
_SUMMED = 64  # batch columns of a product in the gradient of the values

_DATA = dict(do_not_specialize=("batch", "code", "has_bias", "keep", "lines"))


@triton.jit(**_DATA)
def _block_rows(
    pointer, block, column, values, x, bias, y, slopes, code, has_bias, keep, lines: tl.int64,
    S: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile [S, C] of y = sigma(W x + bias), or of W^T: `block` are the numbers of the blocks, column by column."""
    pitch = lines * LINE
    block_row = tl.program_id(0)
    inner = tl.arange(0, S)
    places = (tl.program_id(1) * C + tl.arange(0, C)).to(tl.int64)[None, :]
    live = places < pitch  # operands are zero after the batch; a bound of whole lines lets loads be wide
    z = tl.zeros([S, C], tl.float32)
    for at in range(tl.load(pointer + block_row), tl.load(pointer + block_row + 1)):
        number = at
        if TRANSPOSED:
            number = tl.load(block + at)
        source = (tl.load(column + number) * S + inner).to(tl.int64)[:, None]
        w = tl.load(values + number.to(tl.int64) * (S * S) + inner[:, None] * S + inner[None, :])
        v = tl.load(x + source * pitch + places, mask=live, other=0.0)
        if TRANSPOSED:
            w = tl.trans(w)
        z = tl.dot(w, v, z, input_precision="tf32x3")
    rows = block_row * S + inner[:, None]
    if has_bias != 0:
        z += tl.load(bias + rows).to(tl.float32)
    to = rows.to(tl.int64) * pitch + places
    codes, present = tl.zeros([1, 1], tl.int32) + code, 1 << code
    if keep != 0:
        tl.store(slopes + to, slope_of(z, codes, present), mask=live)
    tl.store(y + to, activate(z, codes, present), mask=live)


@triton.jit(**_DATA)
def _block_gradients(row, column, dz, x, out, batch, lines: tl.int64, S: tl.constexpr, C: tl.constexpr):
    """out[block] [S, S] = the sum over the batch of dz (its rows) times x (its columns)."""
    pitch = lines * LINE
    block = tl.program_id(0)
    inner = tl.arange(0, S)
    left = (tl.load(row + block) * S + inner).to(tl.int64)[:, None] * pitch
    right = (tl.load(column + block) * S + inner).to(tl.int64)[:, None] * pitch
    total = tl.zeros([S, S], tl.float32)
    for start in range(0, batch, C):
        places = (start + tl.arange(0, C)).to(tl.int64)[None, :]
        given = places < pitch
        g = tl.load(dz + left + places, mask=given, other=0.0)
        v = tl.load(x + right + places, mask=given, other=0.0)
        total = tl.dot(g, tl.trans(v), total, input_precision="tf32x3")
    tl.store(out + tl.cast(block, tl.int64) * (S * S) + inner[:, None] * S + inner[None, :], total)


# --- launching ------------------------------------------------------------------------------------------------


def _multiply(
    mask: door.BlockMask,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    code: int = 0,
    keep: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(sigma(W x + bias), or of W^T; its slopes to `keep`), both with the pitch of x."""
    rows = mask.columns if transposed else mask.rows
    y = x.new_empty(rows, x.shape[1])
    slopes = torch.empty_like(y) if keep else None
    csr = (mask.pointer, mask.row, mask.column)
    if transposed:
        csr = (mask.transposed_pointer, mask.transposed_block, mask.row)
    columns = _COLUMNS
    single = x.dtype == torch.float32
    warps = 2 if mask.size == 32 and not single else 4  # with 4 the assembler takes 72 registers, and spills
    constants = {"S": mask.size, "C": columns, "TRANSPOSED": transposed}
    constants |= {"num_warps": warps, "num_stages": 2 if single else 4}
    operands = (*csr, values, x, values if bias is None else bias, y, y if slopes is None else slopes)
    numbers = (code, int(bias is not None), int(keep), lines_of(x))
    grid = (rows // mask.size, triton.cdiv(x.shape[1], columns))
    gpu.launch(_block_rows, grid, x, *operands, *numbers, **constants)
    return y, slopes


class Blocks(torch.autograd.Function):
    """sigma(W x + bias) over the blocks that exist. Twice differentiable: the second time through the reference."""

    @staticmethod
    def forward(
        ctx: Any, mask: door.BlockMask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        lines, batch = in_lines(x), x.shape[1]
        keep = keeps_slope(activation) and any(ctx.needs_input_grad)
        offset = None if bias is None else aligned(bias)
        code = ACTIVATIONS[activation].code
        y, slopes = _multiply(mask.to(x.device), aligned(values), lines, offset, code, keep)
        ctx.mask, ctx.activation = mask, activation
        ctx.save_for_backward(x, values, bias, lines, y, slopes)
        return y[:, :batch]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        x, values, bias, lines, y, slopes = ctx.saved_tensors
        mask: door.BlockMask = ctx.mask.to(x.device)
        needs, batch = ctx.needs_input_grad[1:4], x.shape[1]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            reference = partial(door.block_sparse_matmul_reference, mask, activation=ctx.activation)
            return None, *reference_gradients(reference, (x, values, bias), needs, incoming), None
        dz, d_bias = through_activation(incoming, y, slopes, ctx.activation, needs[2])
        d_x, d_values = None, None
        if needs[0]:
            d_x = _multiply(mask, aligned(values), dz, transposed=True)[0][:, :batch]
        if needs[1]:
            d_values = torch.empty_like(values, memory_format=torch.contiguous_format)
            constants = {"S": mask.size, "C": _SUMMED, "num_warps": 4, "num_stages": 2}
            operands = (mask.row, mask.column, dz, lines, d_values, batch, lines_of(lines))
            gpu.launch(_block_gradients, (mask.blocks,), x, *operands, **constants)
        return None, d_x, d_values, d_bias, None
