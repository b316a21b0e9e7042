"""`masked_matmul` on a GPU, in Triton: compressed rows forward, their transpose backward, sampled products for dW.

One program per row and tile of the batch fetches a few parents at a time and adds them up at the end, in a fixed
order; nothing is scattered. Structure is data: sizes are not specialised, a mask that grew runs the kernels that are
there (three widths of the batch tile per dtype).
"""

# mypy: ignore-errors
# (Triton infers the types of what is compiled)

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from irgrow.kernels import gpu
from irgrow.kernels import masked_matmul as door
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.activations_triton import activate, slope_of
from irgrow.kernels.graph import compressed_rows
from irgrow.kernels.layer_triton import LINE, accumulator, aligned, in_lines, keeps_slope, lines_of, through_activation
from irgrow.kernels.shared import reference_gradients

_TILES = {16: 64, 64: 16, 256: 8}  # batch columns of a program: parents it fetches at once
_EDGES, _SUMMED = 32, 32  # edges of a program of sampled products, batch columns it sums up at once
_SHARING, _SHARED = 4, 32  # values of a program that adds up shared gradients, edges it fetches at once

_DATA = dict(do_not_specialize=("batch", "code", "has_bias", "keep", "edges", "values", "lines", "given"))


@triton.jit(**_DATA)
def _rows(
    pointer, column, index, values, x, bias, y, slopes, code, has_bias, keep, lines: tl.int64,
    E: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y[row] = sigma(sum of values[index[e]] * x[column[e]] over the edges e of the row + bias[row]), a tile of it."""
    pitch = lines * LINE
    row = tl.program_id(0)
    places = (tl.program_id(1) * C + tl.arange(0, C)).to(tl.int64)[None, :]
    live = places < pitch  # operands are zero after the batch; a bound of whole lines lets loads be wide
    lanes = tl.arange(0, E)[:, None]
    stop = tl.load(pointer + row + 1)
    acc = tl.zeros([E, C], ACC)
    for start in range(tl.load(pointer + row), stop, E):
        on = start + lanes < stop
        parent = tl.load(column + start + lanes, mask=on, other=0).to(tl.int64)
        w = tl.load(values + tl.load(index + start + lanes, mask=on, other=0), mask=on, other=0.0).to(ACC)
        acc += w * tl.load(x + parent * pitch + places, mask=on & live, other=0.0).to(ACC)
    z = tl.sum(acc, 0)[None, :]
    if has_bias != 0:
        z += tl.load(bias + row).to(ACC)
    to, codes, present = row.to(tl.int64) * pitch + places, tl.zeros([1, 1], tl.int32) + code, 1 << code
    if keep != 0:
        tl.store(slopes + to, slope_of(z, codes, present), mask=live)
    tl.store(y + to, activate(z, codes, present), mask=live)


@triton.jit(**_DATA)
def _sampled(
    row, column, dz, x, out, edges, batch, lines: tl.int64,
    E: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[e] = the sum over the batch of dz[row[e]] * x[column[e]]."""
    pitch = lines * LINE
    edge = tl.program_id(0) * E + tl.arange(0, E)[:, None]
    inside = edge < edges
    left = tl.load(row + edge, mask=inside, other=0).to(tl.int64) * pitch
    right = tl.load(column + edge, mask=inside, other=0).to(tl.int64) * pitch
    acc = tl.zeros([E, C], ACC)
    for start in range(0, batch, C):
        places = (start + tl.arange(0, C)).to(tl.int64)[None, :]
        on = inside & (places < pitch)
        g = tl.load(dz + left + places, mask=on, other=0.0).to(ACC)
        acc += g * tl.load(x + right + places, mask=on, other=0.0).to(ACC)
    tl.store(out + edge, tl.sum(acc, 1)[:, None], mask=inside)


@triton.jit(**_DATA)
def _shared(pointer, edge, d_edges, out, values, given, V: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr):
    """out[v] = the sum of d_edges over the edges with value v: 0 without edges."""
    value = tl.program_id(0) * V + tl.arange(0, V)[:, None]
    used = value < given
    start = tl.load(pointer + value, mask=used, other=0)
    stop = tl.load(pointer + value + 1, mask=used, other=0)
    acc = tl.zeros([V, E], ACC)
    for turn in range(0, tl.max(stop - start), E):
        at = start + turn + tl.arange(0, E)[None, :]
        on = at < stop
        acc += tl.load(d_edges + tl.load(edge + at, mask=on, other=0), mask=on, other=0.0)
    tl.store(out + value, tl.sum(acc, 1)[:, None], mask=value < values)


# --- launching ------------------------------------------------------------------------------------------------


def structure(mask: door.Mask, device: torch.device) -> tuple[Tensor, ...]:
    """Index arrays there, int32: by row (pointer, column, index), by column (pointer, row, index), each edge's row,
    and the edges of each value (pointer, edge). Made once."""
    key = "triton", device
    if key not in mask._made:
        pointer, column, index = (np.asarray(part, dtype=np.int64) for part in mask.compressed)
        row = np.repeat(np.arange(mask.rows), np.diff(pointer))
        down, order = compressed_rows(column, mask.columns)
        of_value, edge = compressed_rows(index, mask.values)
        parts = pointer, column, index, down, row[order], index[order], row, of_value, edge
        mask._made[key] = tuple(torch.from_numpy(np.asarray(p, dtype=np.int32)).to(device) for p in parts)
    found: tuple[Tensor, ...] = mask._made[key]
    return found


def _multiply(
    rows: int,
    csr: tuple[Tensor, ...],
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    code: int = 0,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(sigma(W x + bias), its slopes to `keep`), both [rows, pitch]."""
    y = x.new_empty(rows, x.shape[1])
    slopes = torch.empty_like(y) if keep else None
    columns = next((c for c in _TILES if x.shape[1] <= c), max(_TILES))
    constants = {"E": _TILES[columns], "C": columns, "ACC": accumulator(x.dtype), "num_warps": 4}
    operands = (*csr, values, x, values if bias is None else bias, y, y if slopes is None else slopes)
    numbers = (code, int(bias is not None), int(keep), lines_of(x))
    gpu.launch(_rows, (rows, triton.cdiv(x.shape[1], columns)), x, *operands, *numbers, **constants)
    return y, slopes


class Masked(torch.autograd.Function):
    """sigma(W x + bias) on existing entries only. Twice differentiable: the second time through the reference."""

    @staticmethod
    def forward(ctx: Any, mask: door.Mask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        lines, flat = in_lines(x), aligned(values)
        keep = keeps_slope(activation) and any(ctx.needs_input_grad)
        code, batch = ACTIVATIONS[activation].code, x.shape[1]
        csr = structure(mask, x.device)[:3]
        offset = None if bias is None else aligned(bias)
        y, slopes = _multiply(mask.rows, csr, flat, lines, offset, code, keep)
        ctx.mask, ctx.activation = mask, activation
        ctx.save_for_backward(x, values, bias, lines, y, slopes)
        return y[:, :batch]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        mask: door.Mask = ctx.mask
        x, values, bias, lines, y, slopes = ctx.saved_tensors
        needs, batch = ctx.needs_input_grad[1:4], x.shape[1]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            reference = partial(door.masked_matmul_reference, mask, activation=ctx.activation)
            return None, *reference_gradients(reference, (x, values, bias), needs, incoming), None
        _, column, index, *transposed, row, of_value, edge = structure(mask, x.device)
        dz, d_bias = through_activation(incoming, y, slopes, ctx.activation, needs[2])
        d_x, d_values = None, None
        if needs[0]:
            d_x = _multiply(mask.columns, tuple(transposed), aligned(values), dz)[0][:, :batch]
        if needs[1]:
            acc = accumulator(x.dtype)
            d_edges = values.new_empty(mask.edges, dtype=torch.promote_types(x.dtype, torch.float32))
            constants = {"E": _EDGES, "C": _SUMMED, "ACC": acc, "num_warps": 4}
            operands = (row, column, dz, lines, d_edges, mask.edges, batch, lines_of(lines))
            gpu.launch(_sampled, (triton.cdiv(mask.edges, _EDGES),), x, *operands, **constants)
            d_values = torch.empty_like(values, memory_format=torch.contiguous_format)
            constants = {"V": _SHARING, "E": _SHARED, "ACC": acc, "num_warps": 1}
            operands = (of_value, edge, d_edges, d_values, len(values), mask.values)
            gpu.launch(_shared, (triton.cdiv(len(values), _SHARING),), x, *operands, **constants)
        return None, d_x, d_values, d_bias, None
