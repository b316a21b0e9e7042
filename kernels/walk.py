"""The walk of an irregular region: one call forward, one reverse sweep for all gradients.

    values[r] = sigma_r( aggregate over edges e of row r (weights[weight[e]] * value[column[e]]) + bias_r + offset[r] )

`plan` makes the structure (walk_plan.py), `walk_reference` says what it means in plain torch, `walk` is the door:
it runs compiled code on the CPU (walk_cpu.py) for float32 and float64, Triton on a GPU, the reference elsewhere.
Values are feature-major: one row per neuron, the batch contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from irgrow.kernels import gpu, walk_cpu
from irgrow.kernels.shared import COMPILED, reference_gradients
from irgrow.kernels.walk_cpu import Parts, backward, forward, pitch_of, sizes
from irgrow.kernels.walk_plan import MAX, SUM, Rows, WalkPlan, parts_of, plan
from irgrow.kernels.walk_reference import Vector, joined, walk_reference

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
    "walked_by",
]


# --- the steps torch knows ------------------------------------------------------------------------------------


def _runs_compiled(like: Tensor) -> bool:
    return like.is_cpu and like.dtype in COMPILED and walk_cpu.kernels() is not None


def _reference_gradients(
    plan: WalkPlan,
    incoming: Tensor,
    inputs: Tensor,
    offset: Tensor | None,
    weights: Parts,
    biases: Parts | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by differentiating the reference, in the order inputs, offset, every weight, every bias."""

    def reference(x: Tensor, added: Tensor | None, *vectors: Tensor) -> Tensor:
        w, b = vectors[: len(weights)], vectors[len(weights) :]
        return walk_reference(plan, x, w, None if biases is None else b, added)

    return reference_gradients(reference, (inputs, offset, *weights, *(biases or ())), needs, incoming)


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
        out, buffer, slopes = forward(plan, rows, inputs, vectors[:weights], vectors[weights:], offset, True)
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
        found = backward(ctx.plan, ctx.rows, incoming, buffer, slopes, weights, biases, every)
        d_inputs, d_weights, d_biases, d_offset = found
        return None, None, None, d_inputs, d_offset, *_apart(d_weights, weights), *_apart(d_biases, biases)


def _apart(whole: Tensor | None, parts: Parts) -> Sequence[Tensor | None]:
    """The gradient of each part, out of that of all of them."""
    if whole is None:
        return [None] * len(parts)
    if len(parts) == 1:
        return [whole.view(parts[0].shape)]
    cut = whole.split(sizes(parts))
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
    values, buffer, kept = forward(plan, None, inputs, (weights,), _parts(biases), offset, True)
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
    pitch = pitch_of(batch, inputs)
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
        found = backward(plan, None, incoming, buffer, slopes, (weights,), _parts(biases), needs)
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

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


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
    dtype of the operands. float32 and float64 on the CPU run compiled, floats on a GPU by Triton
    (walk_triton.py); everything else, torch.func transforms and second derivatives run `walk_reference`.
    Raises ValueError or TypeError for operands that do not fit.
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
    if not _fits(plan, inputs, weight_parts, bias_parts, offset) or isinstance(weights, Tensor):
        _check(plan, inputs, weights, weight_parts, biases, bias_parts, offset)
    if not inputs.is_cpu and gpu.runs_triton(inputs.device, inputs.dtype):
        from irgrow.kernels import walk_triton

        return _picked(rows, walk_triton.walk(plan, inputs, weights, biases, offset))
    if torch.compiler.is_compiling():
        return _picked(rows, _opaque(plan, inputs, weights, biases, offset))
    if not _runs_compiled(inputs) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _picked(rows, walk_reference(plan, inputs, weights, biases, offset))
    operands = (inputs, offset, *weight_parts, *bias_parts)
    if not _PLAIN.issuperset(map(type, operands)):
        return _picked(rows, _opaque(plan, inputs, weights, biases, offset))
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        return _Walk.apply(plan, rows, len(weight_parts), *operands)
    return forward(plan, rows, inputs, weight_parts, bias_parts, offset, False)[0]


def walked_by(device: torch.device, dtype: torch.dtype) -> str:
    """What runs `walk` there: numba, Triton or plain torch."""
    if device.type == "cpu":
        return "numba" if dtype in COMPILED and walk_cpu.kernels() is not None else "plain torch"
    return "Triton" if gpu.runs_triton(device, dtype) else "plain torch"


def _picked(rows: Rows | None, values: Tensor) -> Tensor:
    return values if rows is None else values.index_select(0, rows.tensor.to(values.device)).t().contiguous()


def _parts(vector: Vector | None) -> Parts:
    if vector is None:
        return ()
    return (vector,) if isinstance(vector, Tensor) else tuple(vector)


def _opaque(plan: WalkPlan, inputs: Tensor, weights: Vector, biases: Vector | None, offset: Tensor | None) -> Tensor:
    w, b = joined(weights, inputs), None if biases is None else joined(biases, inputs)
    return _walk_op(plan.tensor, inputs, w, b, offset, plan.neurons, plan.slopes)[0]


def _fits(plan: WalkPlan, inputs: Tensor, weights: Parts, biases: Parts, offset: Tensor | None) -> bool:
    """Whether these operands certainly fit, found in two microseconds: on a CPU, of one type that runs compiled."""
    if offset is not None or (plan.biases and not biases) or inputs.dim() != 2 or inputs.shape[0] != plan.inputs:
        return False
    dtype = inputs.dtype
    if dtype not in COMPILED or not inputs.is_cpu:
        return False
    for parts, needed in ((weights, plan.weights), (biases, plan.biases)):
        for part in parts:
            if part.dtype is not dtype or not part.is_cpu:
                return False
            needed -= part.numel()
        if needed > 0:
            return False
    return True


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
