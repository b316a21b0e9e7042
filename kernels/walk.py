"""The walk of an irregular region: one call forward, one reverse sweep for all gradients.

    values[r] = sigma_r( aggregate over edges e of row r (weights[weight[e]] * value[column[e]]) + bias_r + offset[r] )

`plan` makes the structure (walk_plan.py), `walk_reference` says what it means in plain torch, `walk` is the door:
it runs compiled code on the CPU for float32 and float64, Triton on a GPU, and the reference everywhere else.
Values are feature-major: one row per neuron, the batch contiguous.
"""

from __future__ import annotations

import os
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

from irgrow.kernels import gpu
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.walk_plan import MAX, SUM, WalkPlan, plan

__all__ = ["MAX", "SUM", "WalkPlan", "cost", "plan", "walk", "walk_reference"]

_FUNCTION = {a.code: a.function for a in ACTIVATIONS.values()}


# --- what it means --------------------------------------------------------------------------------------------


def walk_reference(
    plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """`walk` in plain torch, level by level: any dtype and device, differentiable any number of times, torch.func.

    Copies all earlier values once per level, so a deep region costs O(levels * rows * batch).
    """
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


@lru_cache(1)
def _kernels() -> Any:
    """The compiled code (walk_numba), or None without numba."""
    try:
        from irgrow.kernels import walk_numba
    except ImportError:
        return None
    return walk_numba


def _forward(
    plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None, offset: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values [neurons, B], the buffer of all value rows they are a view of, the slopes to store if `keep`)."""
    batch = inputs.shape[1]
    pitch = _pitch(batch, inputs)
    inputs, weights = _by_rows(inputs), weights.resolve_neg().contiguous()
    biases = None if biases is None else biases.resolve_neg().contiguous()
    offset = None if offset is None else _by_rows(offset)
    buffer = inputs.new_empty((plan.rows, pitch))
    slopes = inputs.new_empty((plan.slopes, pitch)) if keep and plan.slopes else None
    kernel, like = _kernels().forward, _LIKE[inputs.dtype]

    def walk_columns(first: int, last: int, _: int) -> None:
        operands = (
            plan.address,
            buffer.data_ptr(),
            pitch,
            inputs.data_ptr(),
            inputs.stride(0),
            weights.data_ptr(),
            0 if biases is None else biases.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            0 if offset is None else offset.stride(0),
            0 if slopes is None else slopes.data_ptr(),
            batch,
            first,
            last,
        )
        kernel(like, operands)

    _in_slices(walk_columns, _slices(plan, pitch, inputs), _PANEL_BYTES // inputs.element_size())
    return buffer.as_strided((plan.neurons, batch), (pitch, 1), plan.inputs * pitch), buffer, slopes


def _backward(
    plan: WalkPlan,
    incoming: Tensor,
    buffer: Tensor,
    slopes: Tensor | None,
    weights: Tensor,
    biases: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of inputs, weights, biases and offset, those that are needed."""
    batch, pitch, size = incoming.shape[1], buffer.shape[1], buffer.element_size()
    incoming, weights = _by_rows(incoming), weights.resolve_neg().contiguous()
    every_row = needs[0] or needs[1]
    hidden = 0 if every_row else plan.inputs  # input rows that need not be swept have no memory
    gradient = buffer.new_empty((plan.rows - hidden, pitch))
    slices = _slices(plan, pitch, buffer)
    d_weights = _Sums(len(slices), weights if needs[1] else None)
    d_biases = _Sums(len(slices), biases if needs[2] else None)
    kernel, like = _kernels().backward, _LIKE[buffer.dtype]

    def sweep_columns(first: int, last: int, k: int) -> None:
        starts = first == slices[k][0]
        operands = (
            plan.address,
            buffer.data_ptr(),
            pitch,
            weights.data_ptr(),
            0 if slopes is None else slopes.data_ptr(),
            incoming.data_ptr(),
            incoming.stride(0),
            gradient.data_ptr() - hidden * pitch * size,
            d_weights.address(k),
            d_biases.address(k),
            d_weights.length if starts else 0,
            d_biases.length if starts else 0,
            int(every_row),
            batch,
            first,
            last,
        )
        kernel(like, operands)

    _in_slices(sweep_columns, slices, _PANEL_BYTES // size)
    computed = (plan.inputs - hidden) * pitch
    return (
        gradient.as_strided((plan.inputs, batch), (pitch, 1)) if needs[0] else None,
        d_weights.total(),
        d_biases.total(),
        gradient.as_strided((plan.neurons, batch), (pitch, 1), computed) if needs[3] else None,
    )


class _Sums:
    """A vector like `like` (nothing for None) that several slices add to, each in a copy of its own."""

    def __init__(self, slices: int, like: Tensor | None) -> None:
        self.length = 0 if like is None else len(like)
        self.parts = [] if like is None else [like.new_empty(len(like)) for _ in range(slices)]

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
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by differentiating the reference; themselves differentiable where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
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
        values = walk_reference(plan, *aliases)  # type: ignore[arg-type]
        found = iter(
            torch.autograd.grad(
                values, wanted, incoming, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        )
    return tuple(next(found) if need and a is not None else None for a, need in zip(aliases, needs, strict=True))


class _Walk(torch.autograd.Function):
    """`walk` with gradients, eagerly. Twice differentiable: the second time through the reference."""

    @staticmethod
    def forward(
        ctx: Any, plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        values, buffer, slopes = _forward(plan, inputs, weights, biases, offset, True)
        ctx.plan = plan
        ctx.save_for_backward(inputs, weights, biases, offset, buffer, slopes)
        return values

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        *operands, buffer, slopes = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            return None, *_reference_gradients(ctx.plan, incoming, tuple(operands), needs)
        return None, *_backward(ctx.plan, incoming, buffer, slopes, operands[1], operands[2], needs)


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
        return values.contiguous(), inputs.new_empty((0, 0)), inputs.new_empty((0, 0))
    values, buffer, kept = _forward(plan, inputs, weights, biases, offset, True)
    kept = inputs.new_empty((0, 0)) if kept is None else kept
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
        return values, inputs.new_empty((0, 0)), inputs.new_empty((0, 0))
    pitch = _pitch(batch, inputs)
    kept = inputs.new_empty((slopes, pitch) if slopes else (0, 0))
    return values, inputs.new_empty((inputs.shape[0] + neurons, pitch)), kept


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
    found: tuple[Tensor | None, ...]
    if _runs_compiled(inputs):
        found = _backward(plan, incoming, buffer, slopes, weights, biases, needs)
    else:
        found = _reference_gradients(plan, incoming, (inputs, weights, biases, offset), needs)
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
    plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """The values of the computed rows, [neurons, B].

    inputs [plan.inputs, B] become value rows 0..plan.inputs-1; weights [>= plan.weights] and biases
    [>= plan.biases] are flat vectors that the plan's indices point into; offset [neurons, B] is added to the
    pre-activations, after the aggregation. All share one dtype and device. A row of the result is contiguous;
    rows may be padded (stride(0) >= B).

    Differentiable any number of times in all four; sums over edges and over the batch are accumulated in the
    dtype of the operands. float32 and float64 on the CPU run compiled, floats on a GPU by Triton
    (walk_triton.py); everything else, torch.func transforms and second derivatives run `walk_reference`.
    Raises ValueError or TypeError for operands that do not fit.
    """
    _check(plan, inputs, weights, biases, offset)
    if not inputs.is_cpu and gpu.runs_triton(inputs.device, inputs.dtype):
        from irgrow.kernels import walk_triton

        return walk_triton.walk(plan, inputs, weights, biases, offset)
    if torch.compiler.is_compiling():
        return _walk_op(plan.tensor, inputs, weights, biases, offset, plan.neurons, plan.slopes)[0]
    if not _runs_compiled(inputs) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return walk_reference(plan, inputs, weights, biases, offset)
    if not (type(inputs) in _PLAIN and type(weights) in _PLAIN and type(biases) in _PLAIN and type(offset) in _PLAIN):
        return _walk_op(plan.tensor, inputs, weights, biases, offset, plan.neurons, plan.slopes)[0]
    if torch.is_grad_enabled() and (
        inputs.requires_grad
        or weights.requires_grad
        or (biases is not None and biases.requires_grad)
        or (offset is not None and offset.requires_grad)
    ):
        return _Walk.apply(plan, inputs, weights, biases, offset)
    return _forward(plan, inputs, weights, biases, offset, False)[0]


def walked_by(device: torch.device, dtype: torch.dtype) -> str:
    """What runs `walk` there: numba, Triton or plain torch."""
    if device.type == "cpu":
        return "numba" if dtype in _LIKE and _kernels() is not None else "plain torch"
    return "Triton" if gpu.runs_triton(device, dtype) else "plain torch"


def _check(plan: WalkPlan, inputs: Tensor, weights: Tensor, biases: Tensor | None, offset: Tensor | None) -> None:
    dtype, device = weights.dtype, weights.device
    if inputs.dim() != 2 or inputs.shape[0] != plan.inputs:
        raise ValueError(f"walk: inputs must be [{plan.inputs}, batch], found {list(inputs.shape)}")
    if weights.dim() != 1 or weights.shape[0] < plan.weights:
        raise ValueError(f"walk: weights must be [{plan.weights}] or longer, found {list(weights.shape)}")
    if inputs.dtype != dtype or inputs.device != device:
        _mismatch("inputs", inputs, weights)
    if not dtype.is_floating_point:
        raise TypeError(f"walk: operands must be floating point, found {dtype}")
    if biases is None:
        if plan.biases:
            raise ValueError(f"walk: biases must be [{plan.biases}] or longer, found none")
    else:
        if biases.dim() != 1 or biases.shape[0] < plan.biases:
            raise ValueError(f"walk: biases must be [{plan.biases}] or longer, found {list(biases.shape)}")
        if biases.dtype != dtype or biases.device != device:
            _mismatch("biases", biases, weights)
    if offset is not None:
        if offset.dim() != 2 or offset.shape[0] != plan.neurons or offset.shape[1] != inputs.shape[1]:
            expected = [plan.neurons, inputs.shape[1]]
            raise ValueError(f"walk: offset must be {expected}, found {list(offset.shape)}")
        if offset.dtype != dtype or offset.device != device:
            _mismatch("offset", offset, weights)


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
