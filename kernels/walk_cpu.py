"""A walk on the CPU: operands as addresses, slices of the batch on threads, memory that serves again.

Without rows to pick, the buffer of all value rows is what the caller gets, feature-major, its rows one pitch apart.
With rows, nobody sees the buffer: the batch is cut into tiles, each with a buffer of its own that fits the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from irgrow.kernels.shared import Operands, in_phases, put_back, run, spare, together, work_on
from irgrow.kernels.walk_plan import Rows, WalkPlan

_LINE_BYTES = 64  # lanes.py
_PANEL_BYTES = 1024  # of each row walked at a time: with more, values leave the cache before they are used again
_WORK_PER_THREAD = 1_000_000  # multiply-adds; with less, a thread that must be woken costs more than it saves
_EDGES_PER_LEVEL = 4096  # with fewer, threads that share a level meet too often
_COPY = 4  # a number copied takes as long as so many multiply-adds
_TILE_BYTES = 256  # of each row in a tile: the fewest with which a line of sums is held four times in registers
Parts = tuple[Tensor, ...]


@lru_cache(1)
def kernels() -> Any:
    """The compiled code (walk_numba), or None without numba."""
    try:
        from irgrow.kernels import walk_numba
    except ImportError:
        return None
    return walk_numba


def forward(
    plan: WalkPlan,
    rows: Rows | None,
    inputs: Tensor,
    weights: Parts,
    biases: Parts,
    offset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values [neurons, B], or those of `rows` as [B, rows]; all value rows; the slopes to store if `keep`).

    Behind the value rows, in the same memory, stand weights and biases put together from several parts. Nothing
    here is left to torch's own threads: waking them costs more than a small network takes.
    """
    batch, size = inputs.shape[1], inputs.element_size()
    pitch = pitch_of(batch, inputs)
    if inputs.is_neg():
        inputs = inputs.resolve_neg()
    slices = _slices(plan, pitch, inputs)
    cells = plan.rows * (pitch if rows is None or keep else min(pitch, _TILE_BYTES // size) * len(slices))
    direct = not keep and rows is not None and rows.parts is not None and sizes(weights) == rows.parts[0]
    length = 0 if direct else _length(weights)
    total = cells + length + _length(biases)
    # What nobody will see lies in the memory of the call before, still in the cache.
    buffer = inputs.new_empty(total) if rows is None or keep else spare(plan.spare, total, inputs)
    start = buffer.data_ptr()
    if direct:
        assert rows is not None
        table, held_weights = _table(weights, rows.starts, size)
        weights_at = table.buffer_info()[0]
    else:
        weights_at, held_weights = _vector(weights, start + cells * size, inputs)
    biases_at, held_biases = _vector(biases, start + (cells + length) * size, inputs)
    offset = None if offset is None else _by_rows(offset)
    slopes = inputs.new_empty(plan.slopes * pitch) if keep and plan.slopes else None
    inputs_at, offset_at = inputs.data_ptr(), 0 if offset is None else offset.data_ptr()
    slopes_at = 0 if slopes is None else slopes.data_ptr()
    if rows is None:
        out = buffer.as_strided((plan.neurons, batch), (pitch, 1), plan.inputs * pitch)
        rows_at, count, out_at, part_of_at = 0, 0, 0, 0
    else:
        rows_at, count = rows.address, rows.count
        part_of_at = rows.part_of_address if direct else 0
        out = inputs.new_empty((batch, count))
        out_at = out.data_ptr()
    input_pitch, input_step = inputs.stride()
    offset_pitch = 0 if offset is None else offset.stride(0)

    def walk_columns(first: int, last: int, k: int) -> Operands:
        moved, width, tile = 0, pitch, start
        if rows is not None:  # a tile: a batch of its own
            moved, width = first * size, last - first
            tile = start + plan.rows * (moved if keep else k * _TILE_BYTES)
        return (
            plan.address,
            tile,
            width,
            inputs_at + moved * input_step,
            input_pitch,
            input_step,
            weights_at,
            part_of_at,
            biases_at,
            offset_at + moved if offset_at else 0,
            offset_pitch,
            slopes_at + plan.slopes * moved if slopes_at else 0,
            rows_at,
            count,
            out_at + moved * count,
            batch if rows is None else batch - first,
            first if rows is None else 0,
            last if rows is None else width,
        )

    panel = (_PANEL_BYTES if rows is None else _TILE_BYTES) // size
    _run(kernels().forward, plan, inputs.dtype, _in_panels(walk_columns, slices, panel), pitch)
    del held_weights, held_biases
    if rows is not None and not keep:
        put_back(plan.spare, buffer)
    return out, buffer, slopes


def sizes(parts: Parts) -> list[int]:
    return list(map(Tensor.numel, parts))


def _length(parts: Parts) -> int:
    """How much memory the parts need to be put together: none if there is nothing to put together."""
    return sum(sizes(parts)) if len(parts) > 1 else 0


def _vector(parts: Parts, spot: int, like: Tensor) -> tuple[int, Parts]:
    """(address of the parts one after the other, what must be kept alive): where they lie, or put together at `spot`.

    The weights of a pass are found at the same place again by the backward pass.
    """
    if not parts:
        return 0, ()
    whole = tuple(part if part.is_contiguous() and not part.is_neg() else _plain(part) for part in parts)
    if len(whole) == 1:
        return whole[0].data_ptr(), whole
    table = array("q")
    for part in whole:
        table.append(part.data_ptr())
        table.append(part.numel())
    numbers = spot, table.buffer_info()[0], len(whole)
    work_on(kernels().put_together, like.dtype, numbers, len(whole), _COPY * sum(sizes(whole)))
    return spot, whole


def _table(parts: Parts, starts: Sequence[int], size: int) -> tuple[Any, Parts]:
    """(the address in every part that the indices of all weights count from, what must be kept alive)."""
    whole = parts
    if not all(map(Tensor.is_contiguous, parts)) or any(map(Tensor.is_neg, parts)):
        whole = tuple(map(_plain, parts))
    return array("q", [at - start * size for at, start in zip(map(Tensor.data_ptr, whole), starts, strict=True)]), whole


def _plain(part: Tensor) -> Tensor:
    return part.resolve_neg().contiguous()


def backward(
    plan: WalkPlan,
    rows: Rows | None,
    incoming: Tensor,
    buffer: Tensor,
    slopes: Tensor | None,
    weights: Parts,
    biases: Parts,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of inputs, weights, biases and offset, those that are needed. incoming is shaped as what
    `forward` returned."""
    incoming = _by_rows(incoming) if rows is None else incoming.t().resolve_neg()
    batch, size = incoming.shape[1], buffer.element_size()
    pitch = pitch_of(batch, buffer)
    if len(weights) > 1:
        weights_at, held = buffer.data_ptr() + plan.rows * pitch * size, weights
    else:
        weights_at, held = _vector(weights, 0, buffer)
    every_row = needs[0] or needs[1]
    slices = _slices(plan, pitch, buffer)
    d_inputs = d_offset = None
    if rows is None:  # the sweep's own memory is what the caller gets
        hidden = 0 if every_row else plan.inputs  # input rows that need not be swept have no memory
        gradient = buffer.new_empty((plan.rows - hidden, pitch))
        if needs[0]:
            d_inputs = gradient.as_strided((plan.inputs, batch), (pitch, 1))
        if needs[3]:
            d_offset = gradient.as_strided((plan.neurons, batch), (pitch, 1), (plan.inputs - hidden) * pitch)
        gradient_at = gradient.data_ptr() - hidden * pitch * size
    else:
        gradient = spare(plan.spare, plan.rows * min(pitch, _TILE_BYTES // size) * len(slices), buffer)
        d_inputs = buffer.new_empty((batch, plan.inputs)).t() if needs[0] else None
        d_offset = buffer.new_empty((plan.neurons, batch)) if needs[3] else None
        gradient_at = gradient.data_ptr()
    d_inputs_at = 0 if rows is None or d_inputs is None else d_inputs.data_ptr()
    d_offset_at = 0 if rows is None or d_offset is None else d_offset.data_ptr()
    d_weights = _Sums(len(slices), weights if needs[1] else None, buffer)
    d_biases = _Sums(len(slices), biases if needs[2] else None, buffer)
    incoming_at, (incoming_pitch, incoming_step) = incoming.data_ptr(), incoming.stride()
    start, slopes_at = buffer.data_ptr(), 0 if slopes is None else slopes.data_ptr()

    def sweep_columns(first: int, last: int, k: int) -> Operands:
        starts = first == slices[k][0]
        moved, width, swept = 0, pitch, gradient_at
        if rows is not None:  # a tile: a batch of its own
            moved, width = first * size, last - first
            swept = gradient_at + plan.rows * k * _TILE_BYTES
        return (
            plan.address,
            start + plan.rows * moved,
            width,
            weights_at,
            slopes_at + plan.slopes * moved if slopes_at else 0,
            incoming_at + moved * incoming_step,
            incoming_pitch,
            incoming_step,
            -1 if rows is None else rows.count,
            0 if rows is None else rows.address,
            swept,
            d_weights.address(k),
            d_biases.address(k),
            d_weights.length if starts else 0,
            d_biases.length if starts else 0,
            int(every_row),
            d_inputs_at + moved * plan.inputs if d_inputs_at else 0,
            d_offset_at + moved if d_offset_at else 0,
            batch,
            batch if rows is None else batch - first,
            first if rows is None else 0,
            last if rows is None else width,
        )

    panel = (_PANEL_BYTES if rows is None else _TILE_BYTES) // size
    _run(kernels().backward, plan, buffer.dtype, _in_panels(sweep_columns, slices, panel), 2 * pitch)
    del held
    if rows is not None:
        put_back(plan.spare, gradient)
    return d_inputs, d_weights.total(), d_biases.total(), d_offset


class _Sums:
    """A vector as long as the parts (nothing for None) that several slices add to, each in a copy of its own."""

    def __init__(self, slices: int, parts: Parts | None, like: Tensor) -> None:
        self.length = 0 if parts is None else sum(sizes(parts))
        self.parts = [] if parts is None else [like.new_empty(self.length) for _ in range(slices)]

    def address(self, k: int) -> int:
        return self.parts[k].data_ptr() if self.parts else 0

    def total(self) -> Tensor | None:
        if not self.parts:
            return None
        total = self.parts[0]
        for other in self.parts[1:]:  # not by torch: its threads would wake for this
            run(kernels().add_onto, total.dtype, total.data_ptr(), other.data_ptr(), self.length)
        return total


def pitch_of(batch: int, like: Tensor) -> int:
    """Batch columns, padded to whole lines; one column stays alone."""
    line = _LINE_BYTES // like.element_size()
    return batch if batch == 1 else -(-batch // line) * line


def _by_rows(x: Tensor) -> Tensor:
    """x with its batch contiguous; rows may lie apart."""
    x = x.resolve_neg()
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _slices(plan: WalkPlan, pitch: int, like: Tensor) -> list[tuple[int, int]]:
    """Ranges of batch columns to walk at the same time, of four lines or more: cores fetch lines in pairs."""
    line = _LINE_BYTES // like.element_size()
    blocks = pitch // (4 * line)
    if blocks < 2:
        return [(0, pitch)]
    parts = min(torch.get_num_threads(), plan.edges * pitch // _WORK_PER_THREAD, blocks)
    if parts <= 1:
        return [(0, pitch)]
    cuts = [blocks * k // parts * 4 * line for k in range(parts)] + [pitch]
    return list(pairwise(cuts))


def _in_panels(
    operands: Callable[[int, int, int], Operands], slices: list[tuple[int, int]], panel: int
) -> list[list[Operands]]:
    """operands(first, last, number of the slice) of every panel, slice by slice."""
    return [
        [operands(first, min(first + panel, end), k) for first in range(begin, max(end, 1), panel)]
        for k, (begin, end) in enumerate(slices)
    ]


def _run(kernel: Any, plan: WalkPlan, dtype: torch.dtype, parts: list[list[Operands]], columns: int) -> None:
    """Every part on a thread of its own; a single one by all threads, level by level, where levels are wide."""
    wide = plan.edges >= _EDGES_PER_LEVEL * plan.levels and plan.edges * columns >= 2 * _WORK_PER_THREAD
    may_share = len(parts) == 1 and columns > 2 and not plan.maxima and torch.get_num_threads() > 1
    if wide and may_share and plan.nothing_shared:
        for operands in parts[0]:
            in_phases(kernel, dtype, operands, plan.levels + 3)
        return
    together(kernel, dtype, [[(*operands, 1, 0) for operands in part] for part in parts])
