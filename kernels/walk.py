"""The walk of an irregular region: one call forward, one reverse sweep for all gradients.

    values[r] = sigma_r( aggregate over edges e of row r (weights[weight[e]] * value[column[e]]) + bias_r + offset[r] )

`plan` makes the structure (walk_plan.py), `walk_reference` says what it means in plain torch, `walk` is the door:
it runs compiled code on the CPU for float32 and float64, and the reference everywhere else. Values are
feature-major: one row per neuron, the batch contiguous.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.walk_plan import MAX, SUM, Rows, WalkPlan, parts_of, plan

__all__ = [
    "MAX",
    "SUM",
    "Rows",
    "WalkPlan",
    "cost",
    "joined",
    "parts_of",
    "plan",
    "walk",
    "walk_reference",
    "walk_rows",
]

_FUNCTION = {a.code: a.function for a in ACTIVATIONS.values()}
Vector = Tensor | Sequence[Tensor]  # one flat vector, or tensors of any shape that make it up one after the other


def joined(parts: Vector, like: Tensor) -> Tensor:
    """The parts as one flat vector; an empty one like `like` if there are none."""
    if isinstance(parts, Tensor):
        return parts
    flat = [part.reshape(-1) for part in parts]
    if len(flat) == 1:
        return flat[0]
    return torch.cat(flat) if flat else like.new_zeros(0)


# --- what it means --------------------------------------------------------------------------------------------


def walk_reference(
    plan: WalkPlan, inputs: Tensor, weights: Vector, biases: Vector | None = None, offset: Tensor | None = None
) -> Tensor:
    """`walk` in plain torch, level by level: any dtype and device, differentiable any number of times, torch.func.

    Copies all earlier values once per level, so a deep region costs O(levels * rows * batch).
    """
    weights, biases = joined(weights, inputs), None if biases is None else joined(biases, inputs)
    values, computed = inputs, []
    for level in _levels(plan, inputs.device):
        parts = values.index_select(0, level.column) * weights.index_select(0, level.weight)[:, None]
        z = parts.new_zeros(level.stop - level.start, parts.shape[1])
        if level.summed is None:
            z = z.index_add(0, level.row, parts)
        else:
            z = z.index_add(0, level.row[level.summed], parts[level.summed])
            # max over a dimension sends the gradient of a tie to the first; padding is never reached
            padded = torch.cat([parts, parts.new_full((1, parts.shape[1]), -torch.inf)])
            largest = padded[level.padded_edges].max(1).values
            z = z.index_copy(0, level.max_rows, largest)
        if biases is not None and plan.biases:
            z = z.index_add(0, level.biased, biases.index_select(0, level.bias)[:, None].expand(-1, z.shape[1]))
        if offset is not None:
            z = z + offset[level.start : level.stop]
        if len(level.rows_by_code) == 1:
            y = _FUNCTION[level.rows_by_code[0][0]](z)
        else:
            y = torch.cat([_FUNCTION[code](z.index_select(0, rows)) for code, rows in level.rows_by_code])
            y = y.index_select(0, level.back_in_order)
        computed.append(y)
        values = torch.cat([values, y])
    return torch.cat(computed) if computed else inputs.new_empty(0, inputs.shape[1])


@dataclass(frozen=True)
class _Level:
    """Index tensors of computed rows start..stop, which share no edge. Rows are numbered from `start`."""

    start: int
    stop: int
    column: Tensor  # per edge
    weight: Tensor
    row: Tensor
    summed: Tensor | None  # the edges into SUM rows; None: all
    max_rows: Tensor
    padded_edges: Tensor  # [MAX rows, largest number of parents]; -1 is the padding
    biased: Tensor  # the rows with a bias
    bias: Tensor  # and which
    rows_by_code: tuple[tuple[int, Tensor], ...]
    back_in_order: Tensor


_LEVELS: WeakKeyDictionary[WalkPlan, dict[torch.device, list[_Level]]] = WeakKeyDictionary()


def _levels(plan: WalkPlan, device: torch.device) -> list[_Level]:
    on = _LEVELS.setdefault(plan, {})
    if device not in on:
        on[device] = [_level(plan, int(start), int(stop), device) for start, stop in pairwise(plan.level_pointer)]
    return on[device]


def _level(plan: WalkPlan, start: int, stop: int, device: torch.device) -> _Level:
    pointer = plan.pointer[start : stop + 1]
    edges, first = slice(pointer[0], pointer[-1]), int(pointer[0])
    degree = np.diff(pointer)
    row = np.repeat(np.arange(stop - start), degree)
    is_max = plan.aggregation[start:stop] == MAX
    max_rows = np.flatnonzero(is_max)
    widest = int(degree[max_rows].max()) if len(max_rows) else 0
    place = np.arange(widest)[None, :]
    padded = np.where(place < degree[max_rows, None], (pointer[max_rows] - first)[:, None] + place, -1)
    bias, code = plan.bias[start:stop], plan.code[start:stop]
    rows_by_code = [(int(c), np.flatnonzero(code == c)) for c in np.unique(code)]

    def index(array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.array(array, np.int64)).to(device)

    return _Level(
        start=start,
        stop=stop,
        column=index(plan.column[edges]),
        weight=index(plan.weight[edges]),
        row=index(row),
        summed=index(np.flatnonzero(~is_max[row])) if len(max_rows) else None,
        max_rows=index(max_rows),
        padded_edges=index(padded),
        biased=index(np.flatnonzero(bias >= 0)),
        bias=index(bias[bias >= 0]),
        rows_by_code=tuple((c, index(rows)) for c, rows in rows_by_code),
        back_in_order=index(np.argsort(np.concatenate([rows for _, rows in rows_by_code]))),
    )


# --- compiled, on the CPU -------------------------------------------------------------------------------------

_LINE_BYTES = 64  # lanes.py
_PANEL_BYTES = 1024  # of each row walked at a time: with more, values leave the cache before they are used again
_WORK_PER_THREAD = 6_000_000  # multiply-adds; with less, waking another thread (50 us) costs more than it saves
_LIKE = {torch.float32: np.float32(0), torch.float64: np.float64(0)}  # what the compiled code runs for
_TILE_BYTES = 256  # of each row in a tile: the fewest with which a line of sums is held four times in registers
_SPARE_BYTES = 2**24  # of memory that a plan keeps between calls, at most
Parts = tuple[Tensor, ...]


@lru_cache(1)
def _kernels() -> Any:
    """The compiled code (walk_numba), or None without numba."""
    try:
        from irgrow.kernels import walk_numba
    except ImportError:
        return None
    return walk_numba


def _forward(
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
    pitch = _pitch(batch, inputs)
    inputs = inputs.resolve_neg()
    slices = _slices(plan, pitch, inputs)
    cells = plan.rows * (pitch if rows is None or keep else min(pitch, _TILE_BYTES // size) * len(slices))
    direct = not keep and rows is not None and rows.parts is not None and _sizes(weights) == rows.parts[0]
    length = 0 if direct else _length(weights)
    total = cells + length + _length(biases)
    # What nobody will see lies in the memory of the call before, still in the cache.
    buffer = inputs.new_empty(total) if rows is None or keep else _spare(plan, total, inputs)
    start = buffer.data_ptr()
    if direct:
        table, held_weights = _table(weights, size)
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
    kernel, like = _kernels().forward, _LIKE[inputs.dtype]

    def walk_columns(first: int, last: int, k: int) -> None:
        moved, width, tile = 0, pitch, start
        if rows is not None:  # a tile: a batch of its own
            moved, width = first * size, last - first
            tile = start + plan.rows * (moved if keep else k * _TILE_BYTES)
        operands = (
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
        kernel(like, operands)

    _in_slices(walk_columns, slices, (_PANEL_BYTES if rows is None else _TILE_BYTES) // size)
    del held_weights, held_biases
    if rows is not None and not keep:
        _put_back(plan, buffer)
    return out, buffer, slopes


def _sizes(parts: Parts) -> list[int]:
    return [part.numel() for part in parts]


def _length(parts: Parts) -> int:
    """How much memory the parts need to be put together: none if there is nothing to put together."""
    return 0 if len(parts) < 2 else sum(_sizes(parts))


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
    _kernels().put_together(_LIKE[like.dtype], spot, table.buffer_info()[0], len(whole))
    return spot, whole


def _table(parts: Parts, size: int) -> tuple[Any, Parts]:
    """(the address in every part that the indices of all weights count from, what must be kept alive)."""
    whole = tuple(part if part.is_contiguous() and not part.is_neg() else _plain(part) for part in parts)
    table, before = array("q"), 0
    for part in whole:
        table.append(part.data_ptr() - before * size)
        before += part.numel()
    return table, whole


def _plain(part: Tensor) -> Tensor:
    return part.resolve_neg().contiguous()


def _spare(plan: WalkPlan, length: int, like: Tensor) -> Tensor:
    """Memory for so many numbers, from the plan's spare pieces if one is large enough."""
    try:
        found: Tensor = plan.spare.pop()
    except IndexError:
        return like.new_empty(length)
    return found if found.numel() >= length and found.dtype == like.dtype else like.new_empty(length)


def _put_back(plan: WalkPlan, memory: Tensor) -> None:
    if memory.numel() * memory.element_size() <= _SPARE_BYTES:
        plan.spare.append(memory)


def _backward(
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
    `_forward` returned."""
    incoming = _by_rows(incoming) if rows is None else incoming.t().resolve_neg()
    batch, size = incoming.shape[1], buffer.element_size()
    pitch = _pitch(batch, buffer)
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
        gradient = _spare(plan, plan.rows * min(pitch, _TILE_BYTES // size) * len(slices), buffer)
        d_inputs = buffer.new_empty((batch, plan.inputs)).t() if needs[0] else None
        d_offset = buffer.new_empty((plan.neurons, batch)) if needs[3] else None
        gradient_at = gradient.data_ptr()
    d_inputs_at = 0 if rows is None or d_inputs is None else d_inputs.data_ptr()
    d_offset_at = 0 if rows is None or d_offset is None else d_offset.data_ptr()
    d_weights = _Sums(len(slices), weights if needs[1] else None, buffer)
    d_biases = _Sums(len(slices), biases if needs[2] else None, buffer)
    incoming_at, (incoming_pitch, incoming_step) = incoming.data_ptr(), incoming.stride()
    start, slopes_at = buffer.data_ptr(), 0 if slopes is None else slopes.data_ptr()
    kernel, like = _kernels().backward, _LIKE[buffer.dtype]

    def sweep_columns(first: int, last: int, k: int) -> None:
        starts = first == slices[k][0]
        moved, width, swept = 0, pitch, gradient_at
        if rows is not None:  # a tile: a batch of its own
            moved, width = first * size, last - first
            swept = gradient_at + plan.rows * k * _TILE_BYTES
        operands = (
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
        kernel(like, operands)

    _in_slices(sweep_columns, slices, (_PANEL_BYTES if rows is None else _TILE_BYTES) // size)
    del held
    if rows is not None:
        _put_back(plan, gradient)
    return d_inputs, d_weights.total(), d_biases.total(), d_offset


class _Sums:
    """A vector as long as the parts (nothing for None) that several slices add to, each in a copy of its own."""

    def __init__(self, slices: int, parts: Parts | None, like: Tensor) -> None:
        self.length = 0 if parts is None else sum(_sizes(parts))
        self.parts = [] if parts is None else [like.new_empty(self.length) for _ in range(slices)]

    def address(self, k: int) -> int:
        return self.parts[k].data_ptr() if self.parts else 0

    def total(self) -> Tensor | None:
        if not self.parts:
            return None
        total = self.parts[0]
        for other in self.parts[1:]:  # not by torch: its threads would wake for this
            _kernels().add_onto(_LIKE[total.dtype], total.data_ptr(), other.data_ptr(), self.length)
        return total


def _pitch(batch: int, like: Tensor) -> int:
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
    threads = min(torch.get_num_threads(), plan.edges * pitch // _WORK_PER_THREAD, blocks)
    if threads <= 1:
        return [(0, pitch)]
    cuts = [blocks * k // threads * 4 * line for k in range(threads)] + [pitch]
    return list(pairwise(cuts))


def _in_slices(run: Callable[[int, int, int], None], slices: list[tuple[int, int]], panel: int) -> None:
    """run(first, last, number of the slice) for every panel of every slice, slices on threads of their own."""
    if len(slices) == 1 and slices[0][1] <= panel:
        return run(0, slices[0][1], 0)

    def one(k: int) -> None:
        begin, end = slices[k]
        for first in range(begin, end, panel):
            run(first, min(first + panel, end), k)

    others = [_threads(os.getpid()).submit(one, k) for k in range(1, len(slices))]
    one(0)
    for other in others:
        other.result()


@lru_cache(1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads that run compiled code beside the caller's. Kept per process: a fork does not inherit threads."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="irgrow-walk")


# --- the steps torch knows ------------------------------------------------------------------------------------


def _runs_compiled(like: Tensor) -> bool:
    return like.is_cpu and like.dtype in _LIKE and _kernels() is not None


def _reference_gradients(
    plan: WalkPlan,
    incoming: Tensor,
    inputs: Tensor,
    offset: Tensor | None,
    weights: Parts,
    biases: Parts | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by differentiating the reference; themselves differentiable where gradients are enabled.

    In the order inputs, offset, every weight, every bias: those that `needs` asks for.
    """
    create_graph = torch.is_grad_enabled()
    operands = (inputs, offset, *weights, *(biases or ()))
    with torch.enable_grad():
        # An alias per operand, so that one operand's own dependence on another is not counted here.
        if create_graph:
            aliases = [None if t is None else t.view_as(t) for t in operands]
        else:
            aliases = [None if t is None else t.detach() for t in operands]
        wanted = [a for a, need in zip(aliases, needs, strict=True) if need and a is not None]
        for a in wanted:
            if not a.requires_grad:
                a.requires_grad_()
        x, added, *vectors = aliases
        w, b = vectors[: len(weights)], vectors[len(weights) :]
        values = walk_reference(plan, x, w, None if biases is None else b, added)  # type: ignore[arg-type]
        found = iter(
            torch.autograd.grad(
                values, wanted, incoming, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        )
    return tuple(next(found) if need and a is not None else None for a, need in zip(aliases, needs, strict=True))


class _Walk(torch.autograd.Function):
    """`walk` and `walk_rows` with gradients, eagerly. Twice differentiable: the second time through the reference.

    `vectors` are the parts of the weights (so many) and of the biases.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: WalkPlan,
        rows: Rows | None,
        weights: int,
        inputs: Tensor,
        offset: Tensor | None,
        *vectors: Tensor,
    ) -> Tensor:
        out, buffer, slopes = _forward(plan, rows, inputs, vectors[:weights], vectors[weights:], offset, True)
        ctx.plan, ctx.rows, ctx.weights = plan, rows, weights
        ctx.save_for_backward(buffer, slopes, inputs, offset, *vectors)
        return out

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        buffer, slopes, inputs, offset, *vectors = ctx.saved_tensors
        weights, biases = tuple(vectors[: ctx.weights]), tuple(vectors[ctx.weights :])
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            if ctx.rows is not None:
                shape = ctx.plan.neurons, incoming.shape[0]
                incoming = incoming.new_zeros(shape).index_add(0, ctx.rows.tensor, incoming.t())
            given = (inputs, offset, weights, biases or None)
            return None, None, None, *_reference_gradients(ctx.plan, incoming, *given, needs)
        middle = 2 + len(weights)
        every = needs[0], any(needs[2:middle]), any(needs[middle:]), needs[1]
        found = _backward(ctx.plan, ctx.rows, incoming, buffer, slopes, weights, biases, every)
        d_inputs, d_weights, d_biases, d_offset = found
        return None, None, None, d_inputs, d_offset, *_apart(d_weights, weights), *_apart(d_biases, biases)


def _apart(whole: Tensor | None, parts: Parts) -> Sequence[Tensor | None]:
    """The gradient of each part, out of that of all of them."""
    if whole is None:
        return [None] * len(parts)
    if len(parts) == 1:
        return [whole.view(parts[0].shape)]
    cut = whole.split(_sizes(parts))
    return [piece if part.dim() == 1 else piece.view(part.shape) for piece, part in zip(cut, parts, strict=True)]


@torch.library.custom_op("irgrow::walk", mutates_args=())
def _walk_op(
    structure: Tensor,
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    offset: Tensor | None,
    neurons: int,
    slopes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, all value rows, slopes): the walk as torch.compile and torch.export see it, one opaque call."""
    plan = WalkPlan.of_structure(structure)
    if not _runs_compiled(inputs):
        values = walk_reference(plan, inputs, weights, biases, offset)
        return values.contiguous(), inputs.new_empty(0), inputs.new_empty(0)
    values, buffer, kept = _forward(plan, None, inputs, (weights,), _parts(biases), offset, True)
    kept = inputs.new_empty(0) if kept is None else kept
    return values.clone(memory_format=torch.contiguous_format), buffer, kept


@_walk_op.register_fake
def _(
    structure: Tensor,
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    offset: Tensor | None,
    neurons: int,
    slopes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = inputs.shape[1]
    values = inputs.new_empty((neurons, batch))
    if not _runs_compiled(inputs):
        return values, inputs.new_empty(0), inputs.new_empty(0)
    pitch = _pitch(batch, inputs)
    kept = inputs.new_empty(slopes * pitch)
    return values, inputs.new_empty((inputs.shape[0] + neurons) * pitch), kept


@torch.library.custom_op("irgrow::walk_backward", mutates_args=())
def _walk_backward_op(
    structure: Tensor,
    incoming: Tensor,
    buffer: Tensor,
    slopes: Tensor,
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    offset: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of inputs, weights, biases and offset; an empty tensor for the others."""
    plan = WalkPlan.of_structure(structure)
    found: Sequence[Tensor | None]
    if _runs_compiled(inputs):
        found = _backward(plan, None, incoming, buffer, slopes, (weights,), _parts(biases), needs)
    else:
        needs_x, needs_w, needs_b, needs_o = needs
        bias = () if biases is None else (biases,)
        wanted = (needs_x, needs_o, needs_w, *(needs_b for _ in bias))
        d_x, d_o, d_w, *d_b = _reference_gradients(plan, incoming, inputs, offset, (weights,), bias or None, wanted)
        found = d_x, d_w, d_b[0] if d_b else None, d_o
    return [weights.new_empty(0) if g is None else g.clone(memory_format=torch.contiguous_format) for g in found]


@_walk_backward_op.register_fake
def _(
    structure: Tensor,
    incoming: Tensor,
    buffer: Tensor,
    slopes: Tensor,
    inputs: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    offset: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [
        weights.new_empty(t.shape if need and t is not None else (0,))
        for need, t in zip(needs, (inputs, weights, biases, offset), strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    structure, *operands, _neurons, _slopes = inputs
    ctx.save_for_backward(structure, *operands, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, incoming: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    structure, inputs, weights, biases, offset, buffer, slopes = ctx.saved_tensors
    if incoming is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[1:5])
    found = _walk_backward_op(structure, incoming, buffer, slopes, inputs, weights, biases, offset, needs)
    return None, *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


_walk_op.register_autograd(_differentiate, setup_context=_save_for_backward)


# --- the door -------------------------------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def walk(
    plan: WalkPlan, inputs: Tensor, weights: Vector, biases: Vector | None = None, offset: Tensor | None = None
) -> Tensor:
    """The values of the computed rows, [neurons, B].

    inputs [plan.inputs, B] become value rows 0..plan.inputs-1; weights [>= plan.weights] and biases
    [>= plan.biases] are flat vectors that the plan's indices point into, or sequences of tensors that make them up
    one after the other; offset [neurons, B] is added to the pre-activations, after the aggregation. All share one
    dtype and device, and may lie in memory anyhow. A row of the result is contiguous; rows may be padded
    (stride(0) >= B).

    Differentiable any number of times in all; sums over edges and over the batch are accumulated in the
    dtype of the operands. float32 and float64 on the CPU run compiled; everything else, torch.func transforms
    and second derivatives run `walk_reference`. Raises ValueError or TypeError for operands that do not fit.
    """
    return _walk(plan, None, inputs, weights, biases, offset)


def walk_rows(
    plan: WalkPlan,
    rows: Rows,
    inputs: Tensor,
    weights: Vector,
    biases: Vector | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """`walk(...)[rows].t()`, [B, rows], contiguous: what is asked for, and no memory for the rest where possible."""
    if rows.last >= plan.neurons:
        raise ValueError(f"walk: rows must be below {plan.neurons}, found {rows.last}")
    return _walk(plan, rows, inputs, weights, biases, offset)


def _walk(
    plan: WalkPlan, rows: Rows | None, inputs: Tensor, weights: Vector, biases: Vector | None, offset: Tensor | None
) -> Tensor:
    weight_parts, bias_parts = _parts(weights), _parts(biases)
    _check(plan, inputs, weights, weight_parts, biases, bias_parts, offset)
    if torch.compiler.is_compiling():
        return _picked(rows, _opaque(plan, inputs, weights, biases, offset))
    if not _runs_compiled(inputs) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _picked(rows, walk_reference(plan, inputs, weights, biases, offset))
    operands = (inputs, offset, *weight_parts, *bias_parts)
    needs_gradient = False
    for operand in operands:
        if type(operand) not in _PLAIN:
            return _picked(rows, _opaque(plan, inputs, weights, biases, offset))
        needs_gradient = needs_gradient or (operand is not None and operand.requires_grad)
    if needs_gradient and torch.is_grad_enabled():
        return _Walk.apply(plan, rows, len(weight_parts), *operands)
    return _forward(plan, rows, inputs, weight_parts, bias_parts, offset, False)[0]


def _picked(rows: Rows | None, values: Tensor) -> Tensor:
    return values if rows is None else values.index_select(0, rows.tensor.to(values.device)).t().contiguous()


def _parts(vector: Vector | None) -> Parts:
    if vector is None:
        return ()
    return (vector,) if isinstance(vector, Tensor) else tuple(vector)


def _opaque(plan: WalkPlan, inputs: Tensor, weights: Vector, biases: Vector | None, offset: Tensor | None) -> Tensor:
    w, b = joined(weights, inputs), None if biases is None else joined(biases, inputs)
    return _walk_op(plan.tensor, inputs, w, b, offset, plan.neurons, plan.slopes)[0]


def _check(
    plan: WalkPlan,
    inputs: Tensor,
    weights: Vector,
    weight_parts: Parts,
    biases: Vector | None,
    bias_parts: Parts,
    offset: Tensor | None,
) -> None:
    first = weight_parts[0] if weight_parts else inputs
    dtype, device = first.dtype, first.device
    if inputs.dim() != 2 or inputs.shape[0] != plan.inputs:
        raise ValueError(f"walk: inputs must be [{plan.inputs}, batch], found {list(inputs.shape)}")
    if inputs.dtype != dtype or inputs.device != device:
        _mismatch("inputs", inputs, first)
    if not dtype.is_floating_point:
        raise TypeError(f"walk: operands must be floating point, found {dtype}")
    for name, vector, parts, needed in (
        ("weights", weights, weight_parts, plan.weights),
        ("biases", biases, bias_parts, plan.biases),
    ):
        length = 0
        for part in parts:
            length += part.numel()
            if part.dtype != dtype or part.device != device:
                _mismatch(name, part, first)
        if length < needed or (isinstance(vector, Tensor) and vector.dim() != 1):
            found = "none" if vector is None else list(vector.shape) if isinstance(vector, Tensor) else [length]
            raise ValueError(f"walk: {name} must be [{needed}] or longer, found {found}")
    if offset is not None:
        if offset.dim() != 2 or offset.shape[0] != plan.neurons or offset.shape[1] != inputs.shape[1]:
            expected = [plan.neurons, inputs.shape[1]]
            raise ValueError(f"walk: offset must be {expected}, found {list(offset.shape)}")
        if offset.dtype != dtype or offset.device != device:
            _mismatch("offset", offset, first)


def _mismatch(name: str, found: Tensor, weights: Tensor) -> None:
    error = TypeError if found.dtype != weights.dtype else ValueError
    raise error(
        f"walk: {name} must be {weights.dtype} on {weights.device} like the weights, "
        f"found {found.dtype} on {found.device}"
    )


def cost(plan: WalkPlan, batch: int, *, itemsize: int = 4, backward: bool = False) -> tuple[int, int]:
    """(flops, bytes) of a walk: what it must compute, and the least it must move between memory and cache.

    An edge is a multiply and an add per sample, a neuron two operations (bias and activation); a structure
    entry is 4 bytes; every value, weight and index moves once. The backward pass (itself, without the forward)
    does twice the arithmetic per edge, and moves values and their gradients, weights and theirs.
    """
    values = plan.rows * batch * itemsize
    index = 4 * (2 * plan.edges + 5 * plan.neurons)
    weights = itemsize * (plan.weights + plan.biases)
    if not backward:
        return 2 * batch * (plan.edges + plan.neurons), values + index + weights
    return 2 * batch * (2 * plan.edges + plan.neurons), 3 * values + 2 * (index + weights)
