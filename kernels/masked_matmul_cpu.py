"""A masked matmul on the CPU: the order in which edges are walked, operands as addresses, parts on threads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from irgrow.kernels.graph import compressed_rows
from irgrow.kernels.shared import Operands, parts_for, put_back, spare, together

Array = np.ndarray[Any, np.dtype[Any]]
_LINE_BYTES = 64  # lanes.py
_TILE_BYTES = 256  # of each row in a tile: four lines
_PANEL = 128  # rows of x that are read meanwhile: 32 KB of a tile
_SEGMENT = 12  # edges of a row in a panel, at least, on average: a row of y is fetched and stored for them
_BAND = 1024  # rows of y that are summed meanwhile: 256 KB of a tile


@lru_cache(1)
def kernels() -> Any:
    """The compiled code (masked_matmul_numba), or None without numba."""
    try:
        from irgrow.kernels import masked_matmul_numba
    except ImportError:
        return None
    return masked_matmul_numba


@dataclass(frozen=True, eq=False)
class Panels:
    """The edges of a matrix in the order they are walked: by bands of rows, panels of columns, rows.

    A sweep is one band and panel; a segment its edges of one row. All int32.
    """

    sweeps: Array  # [sweeps, 4] first row, last row, first segment, 1 in the first sweep of a band
    segments: Array  # [segments + 1] where the edges of each begin
    edges: Array  # [2, edges] the column of each edge, and the index of its value
    in_order: bool  # the e-th edge has the e-th value

    @property
    def operands(self) -> tuple[int, ...]:
        """(sweeps, addresses of the three arrays, edges)."""
        at = (array.ctypes.data for array in (self.sweeps, self.segments, self.edges))
        return len(self.sweeps), *at, self.edges.shape[1]


def panels(rows: int, columns: int, row: Array, column: Array, index: Array) -> Panels:
    """Every edge (row, column, index of its value) has its place. Edges of a segment keep their order. O(edges)."""
    density = len(row) / max(1, rows * columns)
    height = max(_PANEL, min(columns, int(_SEGMENT / density) if density else columns), 1)
    across = max(1, -(-columns // height))
    first = np.arange(0, max(1, rows), _BAND)
    last = np.minimum(first + _BAND, rows)
    segment = (row // _BAND * across * _BAND) + (column // height) * (last - first)[row // _BAND] + row % _BAND
    pointer, order = compressed_rows(segment, rows * across)
    sweeps = np.empty((len(first), across, 4), np.int32)
    sweeps[..., 0], sweeps[..., 1] = first[:, None], last[:, None]
    sweeps[..., 2] = first[:, None] * across + np.arange(across) * (last - first)[:, None]
    sweeps[..., 3] = np.arange(across) == 0
    edges = np.stack([column[order], index[order]]).astype(np.int32)
    in_order = bool(np.array_equal(edges[1], np.arange(len(row))))
    return Panels(sweeps.reshape(-1, 4), pointer.astype(np.int32), edges, in_order)


def forward(
    of: Panels, rows: int, x: Tensor, values: Tensor, bias: Tensor | None, code: int, slopes: Tensor | None, pieces: Any
) -> Tensor:
    """act(W x + bias), [rows, B] contiguous; `slopes` [rows, B] has received sigma'(z)."""
    columns, batch = x.shape
    out = x.new_empty(rows, batch)
    x, values, bias = _strided(x), _vector(values), None if bias is None else _vector(bias)
    parts, width = _parts(of.edges.shape[1], rows, batch, x, may_cut_rows=True)
    cells = (columns + rows) * width
    memory = spare(pieces, cells * len(parts), x)
    fixed = (*of.operands, int(of.in_order), columns, x.data_ptr(), *x.stride(), values.data_ptr())
    fixed = (*fixed, _address(bias), code, _address(slopes), out.data_ptr(), batch)
    scratch, size = memory.data_ptr(), cells * x.element_size()
    together(kernels().forward, x.dtype, [[(*fixed, scratch + k * size, *part)] for k, part in enumerate(parts)])
    put_back(pieces, memory)
    return out


def backward(
    of: Panels,
    rows: int,
    incoming: Tensor,
    x: Tensor,
    values: Tensor,
    y: Tensor,
    slopes: Tensor | None,
    code: int,
    needs: tuple[bool, bool, bool],
    shared: bool,
    pieces: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, values and bias, those that are needed. `of` holds the edges of the transpose.

    `shared`: several edges may have one value.
    """
    columns, batch = x.shape
    incoming, x, values = _strided(incoming), _strided(x), _vector(values)
    parts, width = _parts(2 * of.edges.shape[1], columns, batch, x, may_cut_rows=not shared)
    cells = (rows + 2 * columns) * width
    memory = spare(pieces, cells * len(parts), x)
    d_x = x.new_empty(columns, batch) if needs[0] else None
    slices = len({part[:2] for part in parts})  # each adds to a copy of its own; parts of columns have their own edges
    d_values = values.new_zeros(slices, len(values)) if needs[1] else None
    d_bias = x.new_zeros(slices, rows) if needs[2] else None
    fixed = (*of.operands, rows, columns, incoming.data_ptr(), *incoming.stride(), values.data_ptr(), code)
    fixed = (*fixed, _address(slopes), y.data_ptr(), x.data_ptr(), *x.stride(), _address(d_x))
    scratch, size = memory.data_ptr(), cells * x.element_size()
    rows_of_operands: list[list[Operands]] = []
    for k, part in enumerate(parts):
        piece = k if slices > 1 else 0
        sums = _address(d_values, piece), _address(d_bias, piece) if part[2] == 0 else 0
        rows_of_operands.append([(*fixed, *sums, batch, scratch + k * size, *part)])
    together(kernels().backward, x.dtype, rows_of_operands)
    put_back(pieces, memory)
    return d_x, _total(d_values), _total(d_bias)


def _parts(
    edges: int, rows: int, batch: int, like: Tensor, *, may_cut_rows: bool
) -> tuple[list[tuple[int, int, int, int]], int]:
    """(first and last sample, first and last row) of each thread's part, and the samples of a tile.

    The batch is cut if every part gets a whole tile, else the rows.
    """
    line, tile = _LINE_BYTES // like.element_size(), _TILE_BYTES // like.element_size()
    pitch = batch if batch == 1 else -(-batch // line) * line
    count = parts_for(max(pitch // tile, rows // 64 if may_cut_rows else 1), edges * pitch)
    if pitch >= count * tile or not may_cut_rows:
        cuts = [pitch // tile * k // count * tile for k in range(count)] + [pitch]
        parts = [(cuts[k], cuts[k + 1], 0, rows) for k in range(count)]
    else:
        parts = [(0, pitch, rows * k // count, rows * (k + 1) // count) for k in range(count)]
    return parts, min(tile, pitch)


def _strided(x: Tensor) -> Tensor:
    """x as it lies, if its rows or its columns lie next to each other."""
    x = x.resolve_neg()
    return x if 1 in x.stride() else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous()


def _address(tensor: Tensor | None, row: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


def _total(parts: Tensor | None) -> Tensor | None:
    """The sum of the rows, one after the other."""
    if parts is None:
        return None
    total = parts[0]
    for other in parts[1:]:
        total = total.add_(other)
    return total
