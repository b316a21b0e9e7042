"""The walk on a GPU, in Triton: one program per tile of batch columns walks all levels, forward and backward.

Batch columns are independent, so programs never wait for each other. Within a program, rows of one level are
computed by different threads, which find each other's rows in global memory: a barrier stands before each level.
Nothing is sent, only fetched, and every sum has a fixed order: results repeat bit for bit.

Structure is data (walk_plan.py, walk_tiles.py): sizes and strides are not specialised, so that a region of another
size, or one that grew, runs the kernels that are there. `variants` is all there is to compile for a dtype.

Values are stored in the dtype of the operands; sums are float64 for float64 and float32 for the others.
"""

# mypy: ignore-errors
# (Triton infers the types of what is compiled)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from irgrow.kernels import gpu
from irgrow.kernels import walk as door
from irgrow.kernels.activations_triton import activate, chain, slope_of
from irgrow.kernels.walk_plan import HEADER as _HEADER
from irgrow.kernels.walk_plan import MAX as _MAX
from irgrow.kernels.walk_plan import SUM, WalkPlan, plan_of
from irgrow.kernels.walk_plan import plan as make_plan
from irgrow.kernels.walk_tiles import FIELDS as _FIELDS
from irgrow.kernels.walk_tiles import LANES, Field, tiles_of

HEADER, MAX, FIELDS = tl.constexpr(_HEADER), tl.constexpr(_MAX), tl.constexpr(_FIELDS)
FIRST, LAST, STEP = tl.constexpr(int(Field.FIRST)), tl.constexpr(int(Field.LAST)), tl.constexpr(int(Field.STEP))
TURNS, MAX_TURNS = tl.constexpr(int(Field.TURNS)), tl.constexpr(int(Field.MAX_TURNS))
CODES, OPENS = tl.constexpr(int(Field.CODES)), tl.constexpr(int(Field.OPENS))

_PADDED_TO = 16  # entries of a pitch
_COLUMNS = 8  # batch columns of a program: a whole sector of float32, and many programs for small batches
_SUMMED_AT_ONCE, _SLICE = 32, 1024  # batch columns that one program sums up: in a step, in all


# Structure is data: no kernel is compiled for the value of one of these, or for where an operand happens to lie.
_DATA = dict(
    do_not_specialize=(
        *("n_in", "neurons", "edges", "summed", "tile_count", "batch", "has_biases", "has_offset", "keep", "pitch"),
        *("inputs_row", "inputs_column", "offset_row", "offset_column", "incoming_row", "incoming_column"),
        *("first", "last", "span", "slices"),
    ),
    do_not_specialize_on_alignment=("inputs", "weights", "biases", "offset", "incoming"),
)


# --- on the device --------------------------------------------------------------------------------------------


@triton.jit
def _edge_sums(
    acc, begin, stop, step, turns, column, index, weights, source, pitch, places, live, ACC: tl.constexpr
):  # fmt: skip
    """acc [R, C] plus the sum over edges e = begin, begin + step, ... < stop of weights[index[e]] * source[column[e]].

    Four edges at a time, loads of one kind together: their latencies overlap.
    """
    for turn in range(0, turns, 4):
        e0 = begin + turn * step
        e1, e2, e3 = e0 + step, e0 + 2 * step, e0 + 3 * step
        on0, on1, on2, on3 = e0 < stop, e1 < stop, e2 < stop, e3 < stop
        c0 = tl.load(column + e0, mask=on0, other=0).to(tl.int64)
        c1 = tl.load(column + e1, mask=on1, other=0).to(tl.int64)
        c2 = tl.load(column + e2, mask=on2, other=0).to(tl.int64)
        c3 = tl.load(column + e3, mask=on3, other=0).to(tl.int64)
        i0 = tl.load(index + e0, mask=on0, other=0)
        i1 = tl.load(index + e1, mask=on1, other=0)
        i2 = tl.load(index + e2, mask=on2, other=0)
        i3 = tl.load(index + e3, mask=on3, other=0)
        v0 = tl.load(source + c0 * pitch + places, mask=on0 & live, other=0.0)
        v1 = tl.load(source + c1 * pitch + places, mask=on1 & live, other=0.0)
        v2 = tl.load(source + c2 * pitch + places, mask=on2 & live, other=0.0)
        v3 = tl.load(source + c3 * pitch + places, mask=on3 & live, other=0.0)
        w0 = tl.load(weights + i0, mask=on0, other=0.0)
        w1 = tl.load(weights + i1, mask=on1, other=0.0)
        w2 = tl.load(weights + i2, mask=on2, other=0.0)
        w3 = tl.load(weights + i3, mask=on3, other=0.0)
        acc += w0.to(ACC) * v0.to(ACC)
        acc += w1.to(ACC) * v1.to(ACC)
        acc += w2.to(ACC) * v2.to(ACC)
        acc += w3.to(ACC) * v3.to(ACC)
    return acc


@triton.jit
def _largest(begin, stop, turns, column, index, weights, source, pitch, places, live, ACC: tl.constexpr):
    """The largest weights[index[e]] * source[column[e]] [R, C], and which edge it was: the first of equals or NaNs."""
    best = tl.zeros_like(begin + places).to(ACC)
    winner = tl.zeros_like(begin + places).to(tl.int32) - 1
    for turn in range(0, turns):
        e = begin + turn
        on = e < stop
        row = tl.load(column + e, mask=on, other=0).to(tl.int64)
        w = tl.load(weights + tl.load(index + e, mask=on, other=0), mask=on, other=0.0).to(ACC)
        x = w * tl.load(source + row * pitch + places, mask=on & live, other=0.0).to(ACC)
        better = ((x > best) | (x != x)) & (best == best)
        taken = on & ((winner < 0) | better)
        best = tl.where(taken, x, best)
        winner = tl.where(taken, e, winner)
    return best, winner


@triton.jit(**_DATA)
def _walk_forward(
    structure, tiles, winner_at, inputs, weights, biases, offset, buffer, slopes, winners,
    n_in, neurons, edges, tile_count, batch, has_biases, has_offset, keep,
    pitch: tl.int64, inputs_row: tl.int64, inputs_column: tl.int64, offset_row: tl.int64, offset_column: tl.int64,
    R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns of this program in all rows of `buffer` [value rows, pitch], and, to `keep`, in slopes and winners."""
    pointer = structure + HEADER
    codes = pointer + neurons + 1
    aggregations, bias_at, slope_at = codes + neurons, codes + 2 * neurons, codes + 3 * neurons
    column = codes + 4 * neurons
    index = column + edges
    pitch = tl.multiple_of(pitch, 16)
    lanes = tl.arange(0, R)[:, None]
    places = (tl.program_id(0) * C + tl.arange(0, C)).to(tl.int64)[None, :]
    live, given = places < pitch, places < batch  # what lies between them is computed but never used

    for first in range(0, n_in, R):
        rows = (first + lanes).to(tl.int64)
        inside = rows < n_in
        x = tl.load(inputs + rows * inputs_row + places * inputs_column, mask=inside & given, other=0.0)
        tl.store(buffer + rows * pitch + places, x, mask=inside & live)

    for number in range(0, tile_count):
        tile = tiles + number * FIELDS
        first, last, step = tl.load(tile + FIRST), tl.load(tile + LAST), tl.load(tile + STEP)
        turns, max_turns, present = tl.load(tile + TURNS), tl.load(tile + MAX_TURNS), tl.load(tile + CODES)
        opens = tl.load(tile + OPENS)
        alone = step != 1
        rows = first + tl.where(alone, 0, lanes)
        inside = rows < last
        owned = inside & ((lanes == 0) | (step == 1)) & live
        to = rows.to(tl.int64)
        start = tl.load(pointer + rows, mask=inside, other=0)
        stop = tl.load(pointer + rows + 1, mask=inside, other=0)
        is_max = tl.load(aggregations + rows, mask=inside, other=0) == MAX
        code = tl.load(codes + rows, mask=inside, other=0)
        slope_slot = tl.load(slope_at + rows, mask=inside, other=-1)
        extra = tl.zeros([R, C], ACC)
        if has_biases != 0:
            bias = tl.load(bias_at + rows, mask=inside, other=-1)
            extra += tl.load(biases + bias, mask=inside & (bias >= 0), other=0.0).to(ACC)
        if has_offset != 0:
            extra += tl.load(offset + to * offset_row + places * offset_column, mask=inside & given, other=0.0).to(ACC)
        if opens != 0:
            tl.debug_barrier()  # from here on rows of earlier levels, by whichever thread, are in place

        begin = start + tl.where(alone, lanes, 0)
        z = tl.zeros([R, C], ACC)
        summed_to, pooled_to = tl.where(is_max, start, stop), tl.where(is_max, stop, start)
        z = _edge_sums(z, begin, summed_to, step, turns, column, index, weights, buffer, pitch, places, live, ACC)
        if alone:
            z = tl.zeros([R, C], ACC) + tl.sum(z, 0)[None, :]
        if max_turns > 0:
            best, winner = _largest(
                start, pooled_to, max_turns, column, index, weights, buffer, pitch, places, live, ACC
            )  # fmt: skip
            z = tl.where(is_max, best, z)
            if keep != 0:
                slot = tl.load(winner_at + rows, mask=inside, other=-1)
                tl.store(winners + slot.to(tl.int64) * pitch + places, winner, mask=owned & (slot >= 0))
        z += extra
        if keep != 0:
            slope = slope_of(z, code, present)
            tl.store(slopes + slope_slot.to(tl.int64) * pitch + places, slope, mask=owned & (slope_slot >= 0))
        tl.store(buffer + (n_in + to) * pitch + places, activate(z, code, present), mask=owned)


@triton.jit(**_DATA)
def _walk_backward(
    structure, tiles, winner_at, max_pointer, max_child, max_edge,
    incoming, weights, buffer, slopes, winners, gradient,
    n_in, neurons, edges, summed, tile_count, batch,
    pitch: tl.int64, incoming_row: tl.int64, incoming_column: tl.int64,
    R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns of this program in `gradient` [value rows, pitch]: d/dz of computed rows, d/dx of rows of inputs."""
    codes = structure + HEADER + neurons + 1
    slope_at = codes + 3 * neurons
    index = codes + 4 * neurons + edges
    child_pointer = index + edges
    rows_in_all = n_in + neurons
    child = child_pointer + rows_in_all + 1
    child_index = child + summed
    pitch = tl.multiple_of(pitch, 16)
    lanes = tl.arange(0, R)[:, None]
    places = (tl.program_id(0) * C + tl.arange(0, C)).to(tl.int64)[None, :]
    live, given = places < pitch, places < batch

    for number in range(0, tile_count):
        tile = tiles + number * FIELDS
        first, last, step = tl.load(tile + FIRST), tl.load(tile + LAST), tl.load(tile + STEP)
        turns, max_turns, present = tl.load(tile + TURNS), tl.load(tile + MAX_TURNS), tl.load(tile + CODES)
        opens = tl.load(tile + OPENS)
        alone = step != 1
        rows = first + tl.where(alone, 0, lanes)
        inside = rows < last
        share = tl.where(alone, lanes, 0)
        owned = inside & ((lanes == 0) | (step == 1)) & live
        computed = inside & (rows >= n_in)  # all rows of the tile or none
        to, from_outside = rows.to(tl.int64), (rows - n_in).to(tl.int64)
        reverse = rows_in_all - 1 - rows  # the transposed rows stand last to first
        start = tl.load(child_pointer + reverse, mask=inside, other=0)
        stop = tl.load(child_pointer + reverse + 1, mask=inside, other=0)
        code = tl.load(codes + from_outside, mask=computed, other=0)
        slot = tl.load(slope_at + from_outside, mask=computed, other=-1).to(tl.int64)
        dy = tl.load(
            incoming + from_outside * incoming_row + places * incoming_column, mask=computed & given, other=0.0
        )  # fmt: skip
        y = tl.load(buffer + to * pitch + places, mask=computed & live, other=0.0)
        kept = tl.load(slopes + slot * pitch + places, mask=(slot >= 0) & live, other=1.0)
        if opens != 0:
            tl.debug_barrier()

        g = tl.zeros([R, C], ACC)
        g = _edge_sums(
            g, start + share, stop, step, turns, child, child_index, weights, gradient, pitch, places, live, ACC
        )  # fmt: skip
        if max_turns > 0:
            begin = tl.load(max_pointer + rows, mask=inside, other=0) + share
            stop = tl.load(max_pointer + rows + 1, mask=inside, other=0)
            for turn in range(0, max_turns):
                k = begin + turn * step
                on = k < stop
                row = tl.load(max_child + k, mask=on, other=n_in)
                edge = tl.load(max_edge + k, mask=on, other=0)
                slot = tl.load(winner_at + row - n_in, mask=on, other=0).to(tl.int64)
                w = tl.load(weights + tl.load(index + edge, mask=on, other=0), mask=on, other=0.0).to(ACC)
                won = tl.load(winners + slot * pitch + places, mask=on & live, other=-1) == edge
                d = tl.load(gradient + row.to(tl.int64) * pitch + places, mask=on & live, other=0.0).to(ACC)
                g += tl.where(won, w * d, 0.0)
        if alone:
            g = tl.zeros([R, C], ACC) + tl.sum(g, 0)[None, :]

        g = chain(g + dy.to(ACC), y.to(ACC), code, present) * kept.to(ACC)
        tl.store(gradient + to * pitch + places, g, mask=owned)


@triton.jit(**_DATA)
def _batch_sums(
    row_of, column_of, winner_at, gradient, buffer, winners, sums,
    n_in, edges, first, last, batch, span,
    pitch: tl.int64,
    E: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums[slice, i - first] = the sum over a slice of the batch of gradient row times value row, summands first..last.

    Those below `edges` are edges: into a MAX row they count where they won.
    """
    i = first + tl.program_id(0) * E + tl.arange(0, E)[:, None]
    inside = i < last
    row = tl.load(row_of + i, mask=inside, other=n_in)
    column = tl.load(column_of + i, mask=inside, other=-1)
    slot = tl.load(winner_at + row - n_in, mask=inside & (i < edges), other=-1)
    d_row, v_row = row.to(tl.int64) * pitch, column.to(tl.int64) * pitch
    w_row = slot.to(tl.int64) * pitch
    acc = tl.zeros([E, C], ACC)
    begin = tl.program_id(1) * span
    for at in range(begin, tl.minimum(begin + span, batch), C):
        places = (at + tl.arange(0, C)).to(tl.int64)[None, :]
        live = inside & (places < batch)
        d = tl.load(gradient + d_row + places, mask=live, other=0.0).to(ACC)
        v = tl.load(buffer + v_row + places, mask=live & (column >= 0), other=1.0).to(ACC)
        won = tl.load(winners + w_row + places, mask=live & (slot >= 0), other=-1) == i
        acc += tl.where((slot < 0) | won, d * v, 0.0)
    to = tl.program_id(1).to(tl.int64) * (last - first) + (i - first)
    tl.store(sums + to, tl.sum(acc, 1)[:, None], mask=inside)


@triton.jit(**_DATA)
def _total(
    tiles, pointer, summand, sums, out,
    first, last, slices,
    R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[t] = the sum of sums[slice, summand[k] - first] over its k (those within first..last) and all slices."""
    tile = tiles + tl.program_id(0) * FIELDS
    lanes = tl.arange(0, R)
    step = tl.load(tile + STEP)
    alone = step != 1
    row = tl.load(tile + FIRST) + tl.where(alone, 0, lanes)
    inside = row < tl.load(tile + LAST)
    start = tl.load(pointer + row, mask=inside, other=0)
    stop = tl.load(pointer + row + 1, mask=inside, other=0)
    begin = start + tl.where(alone, lanes, 0)
    acc = tl.zeros([R], ACC)
    for turn in range(0, tl.load(tile + TURNS)):
        k = begin + turn * step
        i = tl.load(summand + k, mask=k < stop, other=-1)
        on = (i >= first) & (i < last)
        for part in range(0, slices):
            at = tl.cast(part, tl.int64) * (last - first) + (i - first)
            acc += tl.load(sums + at, mask=on, other=0.0)
    if alone:
        acc = tl.zeros([R], ACC) + tl.sum(acc, 0)
    tl.store(out + row, acc, mask=inside & ((lanes == 0) | (step == 1)))


# --- launching ------------------------------------------------------------------------------------------------

Saved = tuple[Tensor, Tensor | None, Tensor | None]


@lru_cache
def variants(dtype: torch.dtype) -> dict[Any, tuple[dict[str, Any], int]]:
    """For every kernel (constants, warps) with which it runs for operands of this dtype."""
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    tile = {"R": LANES, "C": _COLUMNS, "ACC": accumulator}
    return {
        _walk_forward: (tile, 4),
        _walk_backward: (tile, 4),
        _batch_sums: ({"E": LANES, "C": _SUMMED_AT_ONCE, "ACC": accumulator}, 4),
        _total: ({"R": LANES, "ACC": accumulator}, 1),
    }


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *operands: Any) -> None:
    constants, warps = variants(like.dtype)[kernel]
    with torch.cuda.device_of(like):
        kernel[grid](*operands, **constants, num_warps=warps, enable_fp_fusion=True)


def forward(
    plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None, offset: Tensor | None, keep: bool
) -> tuple[Tensor, Saved]:
    """(values [neurons, B], a view of the buffer of all value rows; what the backward pass needs, if `keep`)."""
    tiles, batch = tiles_of(plan, inputs.device), inputs.shape[1]
    pitch = _pitch(batch)
    inputs, weights = inputs.resolve_neg(), weights.resolve_neg().contiguous()
    biases = None if biases is None else biases.resolve_neg().contiguous()
    offset = None if offset is None else offset.resolve_neg()
    buffer = inputs.new_empty((plan.rows, pitch))
    slopes = inputs.new_empty((plan.slopes, pitch)) if keep and plan.slopes else None
    winners = tiles.structure.new_empty((plan.maxima, pitch)) if keep and plan.maxima else None
    if batch and plan.neurons:
        _launch(
            _walk_forward,
            (triton.cdiv(batch, _COLUMNS),),
            inputs,
            *(tiles.structure, tiles.forward, tiles.winner, inputs, weights),
            weights if biases is None else biases,
            inputs if offset is None else offset,
            buffer,
            buffer if slopes is None else slopes,
            tiles.structure if winners is None else winners,
            *(plan.inputs, plan.neurons, plan.edges, len(tiles.forward), batch),
            *(int(biases is not None), int(offset is not None), int(keep)),
            *(pitch, *inputs.stride(), *((0, 0) if offset is None else offset.stride())),
        )
    return buffer.as_strided((plan.neurons, batch), (pitch, 1), plan.inputs * pitch), (buffer, slopes, winners)


def backward(
    plan: WalkPlan, incoming: Tensor, saved: Saved, weights: Tensor, biases: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of inputs, weights, biases and offset, those that are needed."""
    buffer, slopes, winners = saved
    tiles, batch, pitch = tiles_of(plan, buffer.device), incoming.shape[1], buffer.shape[1]
    incoming, weights = incoming.resolve_neg(), weights.resolve_neg().contiguous()
    gradient = torch.empty_like(buffer)
    winners = tiles.structure if winners is None else winners
    tile_count = len(tiles.backward) if needs[0] else tiles.computed
    if batch and tile_count:
        _launch(
            _walk_backward,
            (triton.cdiv(batch, _COLUMNS),),
            buffer,
            *(tiles.structure, tiles.backward, tiles.winner, tiles.max_pointer, tiles.max_child, tiles.max_edge),
            *(incoming, weights, buffer, buffer if slopes is None else slopes, winners, gradient),
            *(plan.inputs, plan.neurons, plan.edges, len(plan.child), tile_count, batch),
            *(pitch, *incoming.stride()),
        )
    d_weights, d_biases = _over_the_batch(plan, buffer, gradient, winners, batch, needs[1], needs[2])
    return (
        gradient.as_strided((plan.inputs, batch), (pitch, 1)) if needs[0] else None,
        _longer(d_weights, weights) if needs[1] else None,
        _longer(d_biases, biases) if needs[2] and biases is not None else None,
        gradient.as_strided((plan.neurons, batch), (pitch, 1), plan.inputs * pitch) if needs[3] else None,
    )


def _over_the_batch(
    plan: WalkPlan, buffer: Tensor, gradient: Tensor, winners: Tensor, batch: int, weights: bool, biases: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of weights and biases, of those that are wanted."""
    tiles = tiles_of(plan, buffer.device)
    out = buffer.new_zeros(plan.weights + plan.biases)
    first = 0 if weights else plan.edges
    last = len(tiles.summand_row) if biases else plan.edges
    if last > first and batch:
        slices = triton.cdiv(batch, _SLICE)
        sums = buffer.new_empty((slices, last - first), dtype=torch.promote_types(buffer.dtype, torch.float32))
        _launch(
            _batch_sums,
            (triton.cdiv(last - first, LANES), slices),
            buffer,
            *(tiles.summand_row, tiles.summand_column, tiles.winner, gradient, buffer, winners, sums),
            *(plan.inputs, plan.edges, first, last, batch, _SLICE, buffer.shape[1]),
        )
        operands = (tiles.totals, tiles.total_pointer, tiles.total_summand, sums, out, first, last, slices)
        _launch(_total, (len(tiles.totals),), buffer, *operands)
    return out[: plan.weights], out[plan.weights :]


def _longer(gradient: Tensor, like: Tensor) -> Tensor:
    """Entries that no edge uses have no gradient."""
    return gradient if len(gradient) == len(like) else F.pad(gradient, (0, len(like) - len(gradient)))


def _pitch(batch: int) -> int:
    return -(-batch // _PADDED_TO) * _PADDED_TO


@lru_cache
def _compiled(device: torch.device, dtype: torch.dtype) -> bool:
    """Every variant has run once there: from now on nothing is compiled, whatever is walked."""
    structure = make_plan(1, [0, 1, 3], [0, 0, 1], code=0, weight=[0, 0, 1], aggregation=[SUM, _MAX], bias=0)
    weights, biases = torch.ones(2, dtype=dtype, device=device), torch.ones(1, dtype=dtype, device=device)
    values, saved = forward(structure, weights[:1, None], weights, biases, None, True)
    backward(structure, values, saved, weights, biases, (True, True, True, False))
    return True


# --- the steps torch knows ------------------------------------------------------------------------------------


class _Walk(torch.autograd.Function):
    """`walk` with gradients, eagerly. Twice differentiable: the second time through the reference."""

    @staticmethod
    def forward(
        ctx: Any, plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        values, saved = forward(plan, inputs, weights, biases, offset, True)
        ctx.plan = plan
        ctx.save_for_backward(inputs, weights, biases, offset, *saved)
        return values

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        *operands, buffer, slopes, winners = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            inputs, weights, biases, offset = operands
            parts = () if biases is None else (biases,)
            wanted = (needs[0], needs[3], needs[1], *(needs[2] for _ in parts))
            d_inputs, d_offset, d_weights, *d_biases = door._reference_gradients(
                ctx.plan, incoming, inputs, offset, (weights,), parts or None, wanted
            )
            return None, d_inputs, d_weights, d_biases[0] if d_biases else None, d_offset
        return None, *backward(ctx.plan, incoming, (buffer, slopes, winners), operands[1], operands[2], needs)


@torch.library.custom_op("irgrow::walk_triton", mutates_args=())
def _walk_op(
    structure: Tensor,
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    offset: Tensor | None,
    neurons: int,
    slopes: int,
    maxima: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, all value rows, slopes, winners): the walk as torch.compile and torch.export see it."""
    values, (buffer, kept, winners) = forward(plan_of(structure), inputs, weights, biases, offset, True)
    kept = inputs.new_empty((0, buffer.shape[1])) if kept is None else kept
    winners = inputs.new_empty((0, buffer.shape[1]), dtype=torch.int32) if winners is None else winners
    return values.clone(memory_format=torch.contiguous_format), buffer, kept, winners


@_walk_op.register_fake
def _(
    structure: Tensor,
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    offset: Tensor | None,
    neurons: int,
    slopes: int,
    maxima: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = inputs.shape[1]
    pitch = _pitch(batch)
    return (
        inputs.new_empty((neurons, batch)),
        inputs.new_empty((inputs.shape[0] + neurons, pitch)),
        inputs.new_empty((slopes, pitch)),
        inputs.new_empty((maxima, pitch), dtype=torch.int32),
    )


@torch.library.custom_op("irgrow::walk_triton_backward", mutates_args=())
def _walk_backward_op(
    structure: Tensor,
    incoming: Tensor,
    buffer: Tensor,
    slopes: Tensor,
    winners: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of inputs, weights, biases and offset; an empty tensor for the others."""
    found = backward(plan_of(structure), incoming, (buffer, slopes, winners), weights, biases, needs)
    return [weights.new_empty(0) if g is None else g.clone(memory_format=torch.contiguous_format) for g in found]


@_walk_backward_op.register_fake
def _(
    structure: Tensor,
    incoming: Tensor,
    buffer: Tensor,
    slopes: Tensor,
    winners: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    neurons, batch = incoming.shape
    shapes = (buffer.shape[0] - neurons, batch), weights.shape, (0,) if biases is None else biases.shape, incoming.shape
    return [weights.new_empty(shape if need else (0,)) for need, shape in zip(needs, shapes, strict=True)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    structure, *operands, _neurons, _slopes, _maxima = inputs
    ctx.save_for_backward(structure, *operands, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, incoming: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    structure, _inputs, weights, biases, _offset, buffer, slopes, winners = ctx.saved_tensors
    if incoming is None:
        return (None,) * 8
    needs = list(ctx.needs_input_grad[1:5])
    found = _walk_backward_op(structure, incoming, buffer, slopes, winners, weights, biases, needs)
    return None, *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None


_walk_op.register_autograd(_differentiate, setup_context=_save_for_backward)


# --- the door -------------------------------------------------------------------------------------------------


def walk(
    plan: WalkPlan,
    inputs: Tensor,
    weights: door.Vector,
    biases: door.Vector | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """`walk.walk` by these kernels, for float32, float64, bfloat16 and float16 operands on a GPU.

    Operands may lie anyhow. torch.func transforms and second derivatives run `walk_reference`. Raises RuntimeError
    where Triton cannot run, TypeError for another dtype, and what `walk.walk` raises.
    """
    door._check(plan, inputs, weights, door._parts(weights), biases, door._parts(biases), offset)
    weights, biases = door.joined(weights, inputs), None if biases is None else door.joined(biases, inputs)
    if inputs.dtype not in gpu.DTYPES:
        raise TypeError(f"walk: operands for Triton must be one of {gpu.DTYPES}, found {inputs.dtype}")
    missing = gpu.why_not_triton(inputs.device)
    if missing:
        raise RuntimeError(f"walk: Triton cannot run here: {missing}; use walk.walk")
    if torch.compiler.is_compiling():
        operands = (inputs, weights, biases, offset)
        return _walk_op(plan.tensor, *operands, plan.neurons, plan.slopes, plan.maxima)[0]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return door.walk_reference(plan, inputs, weights, biases, offset)
    if not gpu.interpreted():
        _compiled(inputs.device, inputs.dtype)
    operands = (inputs, weights, biases, offset)
    if any(type(t) not in door._PLAIN for t in operands):
        return _walk_op(plan.tensor, *operands, plan.neurons, plan.slopes, plan.maxima)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return _Walk.apply(plan, *operands)
    return forward(plan, *operands, False)[0]
