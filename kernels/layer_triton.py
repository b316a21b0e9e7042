"""What sparse layers y = sigma(W x + bias) share on Triton: operands in lines, the gradient through bias and sigma."""

# mypy: ignore-errors
# (Triton infers the types of what is compiled)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from irgrow.kernels import gpu
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.activations_triton import chain
from irgrow.kernels.walk_plan import SLOPE_STORED

LINE = tl.constexpr(16)  # entries; kernels take a pitch as a number of lines, so that it is known to be divisible
_COLUMNS = 512


@triton.jit(do_not_specialize=("batch", "code", "kept", "lines", "row_stride", "column_stride"))
def _through_activation(
    incoming, y, slopes, dz, d_bias, batch, code, kept,
    lines: tl.int64, row_stride: tl.int64, column_stride: tl.int64,
    C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz of one row, 0 after its batch, and d_bias, its sum over the batch in a fixed order."""
    pitch = lines * LINE
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([1, C], ACC)
    for start in range(0, batch, C):
        at = (start + tl.arange(0, C)).to(tl.int64)[None, :]
        live = at < batch
        g = tl.load(incoming + row * row_stride + at * column_stride, mask=live, other=0.0).to(ACC)
        value = tl.load(y + row * pitch + at, mask=at < pitch, other=0.0).to(ACC)
        g = chain(g, value, tl.zeros([1, 1], tl.int32) + code, 1 << code)
        if kept != 0:
            g *= tl.load(slopes + row * pitch + at, mask=live, other=0.0).to(ACC)
        g = tl.where(live, g, 0.0)
        tl.store(dz + row * pitch + at, g, mask=at < pitch)
        total += g
    tl.store(d_bias + row, tl.sum(total))


def through_activation(
    incoming: Tensor, y: Tensor, slopes: Tensor | None, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """(dz [rows, pitch], zero after the batch; d_bias [rows]) for y [rows, pitch] and incoming [rows, B]."""
    dz, d_bias = torch.empty_like(y), y.new_empty(len(y))
    batch, incoming = incoming.shape[1], incoming.resolve_neg()
    constants = {"C": _COLUMNS, "ACC": accumulator(y.dtype), "num_warps": 4}
    operands = (incoming, y, y if slopes is None else slopes, dz, d_bias)
    numbers = (batch, ACTIVATIONS[activation].code, int(slopes is not None), lines_of(y), *incoming.stride())
    gpu.launch(_through_activation, (len(y),), y, *operands, *numbers, **constants)
    return dz, d_bias if needs_bias else None


def in_lines(x: Tensor) -> Tensor:
    """x [rows, pitch] with rows without gaps, starting at a multiple of 16 bytes; zero after its batch."""
    x = x.detach().resolve_neg()
    batch, pitch = x.shape[1], triton.cdiv(x.shape[1], LINE.value) * LINE.value
    if batch == pitch and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_empty(len(x), pitch)
    padded[:, :batch], padded[:, batch:] = x, 0.0
    return padded


def aligned(x: Tensor) -> Tensor:
    """x without gaps, starting at a multiple of 16 bytes."""
    x = x.detach().resolve_neg().contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def lines_of(x: Tensor) -> int:
    """The pitch of x [rows, pitch] in lines."""
    return x.shape[1] // LINE.value


def keeps_slope(activation: str) -> bool:
    return activation in SLOPE_STORED


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums over such values are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
