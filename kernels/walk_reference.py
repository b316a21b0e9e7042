"""What a walk means, in plain torch: the twin that compiled walks are compared with, and what runs without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.walk_plan import MAX, WalkPlan

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
