"""The structure of an irregular region as data: what `walk` walks, on any device.

A region has value rows: rows 0..inputs-1 come from outside, rows inputs..inputs+neurons-1 are computed in order.
Edges are grouped by the row they enter. Everything lies in one int32 array, so that a kernel takes one pointer:

    header            HEADER numbers: inputs, neurons, edges, ... (see `Header`)
    pointer           [neurons + 1]           edges of computed row r: pointer[r]..pointer[r + 1]
    code              [neurons]               activation of the row, from activations.py
    aggregation       [neurons]               SUM or MAX
    bias              [neurons]               index into the bias vector, or -1
    slope             [neurons]               where the row keeps sigma'(z) for the backward pass, or -1
    column            [edges]                 the value row the edge comes from
    weight            [edges]                 index into the weight vector
    child_pointer     [inputs + neurons + 1]  the transposed rows, last value row first (see below)
    child             [summed edges]          the value row the edge enters
    child_weight      [summed edges]          index into the weight vector
    level_pointer     [levels + 1]            computed rows level_pointer[k]..level_pointer[k + 1] share no edge

The backward pass sweeps the value rows from last to first, and the transposed rows are stored in that order: its
reads go forward through memory, which matters once the edges no longer fit the cache. They hold no edges into
MAX rows: which parent won is known only per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.graph import njit

Indices = NDArray[np.int32]
SUM, MAX = 0, 1


class Header(IntEnum):
    """Places of the numbers at the start of the structure."""

    INPUTS = 0
    NEURONS = 1
    EDGES = 2
    SUMMED = 3  # edges into SUM rows: the length of child
    SLOPES = 4  # rows that keep their slope
    MAXIMA = 5  # MAX rows
    IN_ORDER = 6  # 1 if weight[e] = e
    LEVELS = 7
    WEIGHTS = 8  # the weight vector is at least this long
    BIASES = 9


HEADER = 16
(_INPUTS, _NEURONS, _EDGES, _SUMMED, _SLOPES, _MAXIMA, _IN_ORDER, _LEVELS, _WEIGHTS, _BIASES) = map(int, Header)
_ROW_FIELDS = ("code", "aggregation", "bias", "slope")
# Activations whose value does not determine their slope; activations_numba.stores_slope is the same table.
SLOPE_STORED = ("gelu", "silu", "sin", "gaussian", "abs", "square")
_STORED = np.array([a.name in SLOPE_STORED for a in sorted(ACTIVATIONS.values(), key=lambda a: a.code)])


@dataclass(frozen=True, eq=False, repr=False)
class WalkPlan:
    """One region's structure, made by `plan`. Arrays are views into `structure`; nobody writes to them."""

    structure: Indices
    tensor: Tensor  # `structure` on the CPU, in the same memory
    address: int  # and where it lies
    inputs: int
    neurons: int
    edges: int
    levels: int
    weights: int  # the weight vector has at least this many entries
    biases: int
    maxima: int  # rows with aggregation MAX
    slopes: int  # rows that keep sigma'(z) for the backward pass
    spare: list[Tensor] = field(default_factory=list)  # memory that serves one call after the other

    @staticmethod
    def of_structure(structure: Indices | Tensor) -> WalkPlan:
        """The plan whose `structure` this is: an array that `plan` made."""
        array = structure.numpy() if isinstance(structure, Tensor) else structure
        header = array[:HEADER].tolist()
        made = WalkPlan(
            structure=array,
            tensor=torch.from_numpy(array),
            address=array.ctypes.data,
            inputs=header[_INPUTS],
            neurons=header[_NEURONS],
            edges=header[_EDGES],
            levels=header[_LEVELS],
            weights=header[_WEIGHTS],
            biases=header[_BIASES],
            maxima=header[_MAXIMA],
            slopes=header[_SLOPES],
        )
        _PLANS[made.address] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return WalkPlan.of_structure, (self.structure,)  # a copy has an address of its own

    def __repr__(self) -> str:
        return (
            f"WalkPlan({self.inputs} inputs -> {self.neurons} neurons, {self.edges} edges, {self.levels} levels, "
            f"{self.weights} weights, {self.biases} biases)"
        )

    @cached_property
    def nothing_shared(self) -> bool:
        """Whether no two edges have one weight and no two rows one bias: sums of gradients do not meet."""
        bias = self.bias[self.bias >= 0]
        return all(not len(a) or int(np.bincount(a).max()) < 2 for a in (self.weight, bias))

    @property
    def rows(self) -> int:
        """Value rows: inputs and computed ones."""
        return self.inputs + self.neurons

    @property
    def pointer(self) -> Indices:
        return self._part(0, self.neurons + 1)

    @property
    def code(self) -> Indices:
        return self._row_field("code")

    @property
    def aggregation(self) -> Indices:
        return self._row_field("aggregation")

    @property
    def bias(self) -> Indices:
        return self._row_field("bias")

    @property
    def slope(self) -> Indices:
        return self._row_field("slope")

    @property
    def column(self) -> Indices:
        return self._part(5 * self.neurons + 1, self.edges)

    @property
    def weight(self) -> Indices:
        return self._part(5 * self.neurons + 1 + self.edges, self.edges)

    @property
    def child_pointer(self) -> Indices:
        return self._part(5 * self.neurons + 1 + 2 * self.edges, self.rows + 1)

    @property
    def child(self) -> Indices:
        summed = int(self.structure[_SUMMED])
        return self._part(5 * self.neurons + 1 + 2 * self.edges + self.rows + 1, summed)

    @property
    def child_weight(self) -> Indices:
        summed = int(self.structure[_SUMMED])
        return self._part(5 * self.neurons + 1 + 2 * self.edges + self.rows + 1 + summed, summed)

    @property
    def level_pointer(self) -> Indices:
        summed = int(self.structure[_SUMMED])
        return self._part(5 * self.neurons + 2 + 2 * self.edges + self.rows + 2 * summed, self.levels + 1)

    def _row_field(self, name: str) -> Indices:
        return self._part(self.neurons + 1 + _ROW_FIELDS.index(name) * self.neurons, self.neurons)

    def _part(self, start: int, length: int) -> Indices:
        return self.structure[HEADER + start : HEADER + start + length]


class Rows:
    """Computed rows that somebody will read, in the order in which they are wanted. Each at most once.

    `parts` (see `parts_of`) saves putting the weights together where no row needs several parts of them.
    """

    def __init__(self, index: NDArray[np.integer], parts: Parts | None = None) -> None:
        order = np.argsort(index, kind="stable")
        self.table = np.ascontiguousarray([index[order], order], np.int32)  # rows rising, and the place of each
        rows = self.table[0]
        if rows.size and (rows[0] < 0 or bool((rows[1:] == rows[:-1]).any())):
            raise ValueError(f"rows must be different numbers from 0 on, found {index}")
        self.count = rows.size
        self.last = int(rows[-1]) if rows.size else -1
        self.address = self.table.ctypes.data
        self.tensor = torch.from_numpy(np.array(index, np.int64))
        self.parts = parts
        self.starts = [] if parts is None else [sum(parts[0][:n]) for n in range(len(parts[0]))]  # of each part
        self.part_of_address = 0 if parts is None else parts[1].ctypes.data

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.tensor.numpy(), self.parts)  # a copy has an address of its own


Parts = tuple[list[int], Indices]


def parts_of(plan: WalkPlan, sizes: Sequence[int]) -> Parts | None:
    """The sizes and, for every row, the one part that all its weights lie in (the first if it has none).

    `sizes`: how long the parts are that make up the weights, one after the other. None if there is but one part,
    or some row needs two.
    """
    ends = np.cumsum(sizes)
    if len(sizes) < 2 or ends[-1] < plan.weights:
        return None
    part_of = np.zeros(plan.neurons, np.int32)
    return (list(sizes), part_of) if _parts_of(plan.pointer, plan.weight, ends, part_of) else None


@njit(cache=True, nogil=True)
def _parts_of(pointer: Indices, weight: Indices, ends: NDArray[np.int64], part_of: Indices) -> bool:
    for r in range(len(part_of)):
        if pointer[r] == pointer[r + 1]:
            continue
        part = 0
        while weight[pointer[r]] >= ends[part]:
            part += 1
        first = 0 if part == 0 else ends[part - 1]
        for e in range(pointer[r], pointer[r + 1]):
            if weight[e] < first or weight[e] >= ends[part]:
                return False
        part_of[r] = part
    return True


_PLANS: WeakValueDictionary[int, WalkPlan] = WeakValueDictionary()  # by address: a plan keeps its memory


def plan_of(structure: Tensor) -> WalkPlan:
    """The plan whose `tensor` this is: the very one, with all that was made for it, as long as it lives."""
    known = _PLANS.get(structure.data_ptr())
    return WalkPlan.of_structure(structure) if known is None or len(known.structure) != len(structure) else known


def plan(
    inputs: int,
    pointer: ArrayLike,
    column: ArrayLike,
    *,
    code: ArrayLike,
    weight: ArrayLike | None = None,
    aggregation: ArrayLike = SUM,
    bias: ArrayLike = -1,
) -> WalkPlan:
    """A checked structure, ready to be walked. O(neurons + edges), no sorting.

    pointer [neurons + 1], column [edges]: row r (value row inputs + r) has parents
    column[pointer[r]:pointer[r + 1]], each smaller than inputs + r. `weight` [edges] is each edge's index into the
    weight vector, in any order and with repetitions (default: edge e has weight e). `code`, `aggregation` and
    `bias` have one entry per row or are one number for all. Raises ValueError for a structure that cannot be
    walked in order, and for indices that are negative or beyond int32.
    """
    pointer_, column_ = _int32("pointer", pointer), _int32("column", column)
    neurons, edges = len(pointer_) - 1, len(column_)
    if neurons < 0:
        raise ValueError("pointer must have neurons + 1 entries, found none")
    weight_ = np.arange(edges, dtype=np.int32) if weight is None else _int32("weight", weight)
    if len(weight_) != edges:
        raise ValueError(f"weight must have one entry per edge, found {len(weight_)} for {edges} edges")
    rows = [
        _per_row(name, value, neurons) for name, value in (("code", code), ("aggregation", aggregation), ("bias", bias))
    ]
    size = HEADER + 6 * neurons + 3 + 4 * edges + (inputs + neurons)
    if inputs < 0 or size >= 2**31:
        raise ValueError(f"a region of {inputs} inputs, {neurons} neurons, {edges} edges does not fit int32")
    structure = np.empty(size, np.int32)
    problem, row, edge = _build(structure, inputs, pointer_, column_, weight_, *rows, _STORED)
    if problem:
        raise ValueError(_explain(problem, row, edge, inputs, pointer_, column_, weight_, *rows))
    return WalkPlan.of_structure(structure[: structure[HEADER - 1]])


def _int32(name: str, values: ArrayLike) -> Indices:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name} must be a 1-d integer array, found {array.dtype} {array.shape}")
    if array.dtype.itemsize >= 4 and array.dtype != np.int32 and array.size and array.max() >= 2**31:
        raise ValueError(f"{name} holds {array.max()}, which does not fit int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def _per_row(name: str, values: ArrayLike, neurons: int) -> Indices:
    array = np.asarray(values)
    if array.ndim == 0:
        return np.full(neurons, array, np.int32)
    if len(array) != neurons:
        raise ValueError(f"{name} must have one entry per neuron, found {len(array)} for {neurons} neurons")
    return _int32(name, array)


_POINTER, _COLUMN, _WEIGHT, _CODE, _AGGREGATION, _BIAS = range(1, 7)


def _explain(
    problem: int,
    row: int,
    edge: int,
    inputs: int,
    pointer: Indices,
    column: Indices,
    weight: Indices,
    code: Indices,
    aggregation: Indices,
    bias: Indices,
) -> str:
    who = f"plan: row {row} (value row {inputs + row})"
    if problem == _POINTER:
        return f"plan: pointer must rise from 0 to {len(column)} (the number of edges), found {pointer}"
    if problem == _COLUMN:
        return (
            f"{who}, edge {edge}: comes from value row {column[edge]}, expected 0..{inputs + row - 1}; "
            "rows must stand in topological order"
        )
    if problem == _WEIGHT:
        return f"{who}, edge {edge}: has weight index {weight[edge]}, expected 0 or more"
    if problem == _CODE:
        return f"{who}: has activation code {code[row]}, expected 0..{len(_STORED) - 1}"
    if problem == _AGGREGATION:
        return f"{who}: has aggregation {aggregation[row]}, expected {SUM} (sum) or {MAX} (max)"
    return f"{who}: has bias index {bias[row]}, expected -1 (none) or more"


@njit(cache=True, nogil=True)
def _build(
    structure: Indices,
    inputs: int,
    pointer: Indices,
    column: Indices,
    weight: Indices,
    code: Indices,
    aggregation: Indices,
    bias: Indices,
    stored: NDArray[np.bool_],
) -> tuple[int, int, int]:
    """Fills `structure` (its last used place in header[HEADER - 1]). Returns (problem or 0, row, edge)."""
    neurons, edges = len(pointer) - 1, len(column)
    rows = inputs + neurons
    if pointer[0] != 0 or pointer[neurons] != edges:
        return _POINTER, 0, 0
    at = HEADER + 5 * neurons + 1 + 2 * edges
    child_pointer = structure[at : at + rows + 1]
    for k in range(rows + 1):
        child_pointer[k] = 0
    weights, biases, slopes, maxima, summed = 0, 0, 0, 0, 0
    in_order = 1

    for r in range(neurons):
        start, stop = pointer[r], pointer[r + 1]
        if stop < start or stop > edges:
            return _POINTER, r, 0
        if code[r] < 0 or code[r] >= len(stored):
            return _CODE, r, 0
        if aggregation[r] != SUM and aggregation[r] != MAX:
            return _AGGREGATION, r, 0
        if bias[r] < -1:
            return _BIAS, r, 0
        row = inputs + r
        is_max = aggregation[r] == MAX and stop > start  # without parents both mean 0
        for e in range(start, stop):
            if column[e] < 0 or column[e] >= row:
                return _COLUMN, r, e
            if weight[e] < 0:
                return _WEIGHT, r, e
            weights = max(weights, weight[e] + 1)
            if weight[e] != e:
                in_order = 0
            if not is_max:
                child_pointer[rows - column[e]] += 1  # counted one place late: the sum below shifts it
        if is_max:
            maxima += 1
        else:
            summed += stop - start
        biases = max(biases, bias[r] + 1)
        field = HEADER + neurons + 1 + r
        structure[field] = code[r]
        structure[field + neurons] = MAX if is_max else SUM
        structure[field + 2 * neurons] = bias[r]
        structure[field + 3 * neurons] = slopes if stored[code[r]] else -1
        if stored[code[r]]:
            slopes += 1

    for r in range(neurons + 1):
        structure[HEADER + r] = pointer[r]
    begin = HEADER + 5 * neurons + 1
    for e in range(edges):
        structure[begin + e] = column[e]
        structure[begin + edges + e] = weight[e]

    for k in range(rows):
        child_pointer[k + 1] += child_pointer[k]
    place = np.empty(rows, np.int32)
    for k in range(rows):
        place[k] = child_pointer[k]
    begin = at + rows + 1
    for r in range(neurons - 1, -1, -1):  # so that the children of a row stand last to first as well
        if structure[HEADER + 2 * neurons + 1 + r] == SUM:
            for e in range(pointer[r], pointer[r + 1]):
                k = rows - 1 - column[e]
                to = begin + place[k]
                place[k] += 1
                structure[to] = inputs + r
                structure[to + summed] = weight[e]

    begin += 2 * summed
    levels = 0
    structure[begin] = 0
    first = inputs  # the value row at which the current level starts
    for r in range(neurons):
        for e in range(pointer[r], pointer[r + 1]):
            if column[e] >= first:
                levels += 1
                structure[begin + levels] = r
                first = inputs + r
                break
    if neurons:
        levels += 1
        structure[begin + levels] = neurons

    for k in range(HEADER):
        structure[k] = 0
    structure[_INPUTS], structure[_NEURONS], structure[_EDGES], structure[_SUMMED] = inputs, neurons, edges, summed
    structure[_SLOPES], structure[_MAXIMA], structure[_IN_ORDER], structure[_LEVELS] = slopes, maxima, in_order, levels
    structure[_WEIGHTS], structure[_BIASES] = weights, biases
    structure[HEADER - 1] = begin + levels + 1
    return 0, 0, 0
