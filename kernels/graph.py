"""Integer structure: sorting edges into rows, levels, cycles, repeated edges. Numpy arrays in, numpy arrays out.

Edges are two index arrays, `source` and `target` (int32 or int64), one entry per edge. Everything here is
O(neurons + edges) and compiled by numba; without numba the same text runs as (slow) Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _interpreted(**_: Any) -> Any:
    return lambda function: function


try:
    import numba

    njit: Any = numba.njit
except ImportError:  # the loops below are plain Python as well
    njit = _interpreted


Array = np.ndarray[Any, np.dtype[Any]]


def compressed_rows(keys: Array, rows: int) -> tuple[Array, Array]:
    """Edges are grouped by key: `order[pointer[k]:pointer[k + 1]]` are the edges with key k, in their old order.

    keys [E] in 0..rows-1 -> pointer int64 [rows + 1], order [E] (int32 when E fits in it, else int64).
    A stable counting sort. Raises ValueError for a key outside 0..rows-1.
    """
    keys = _indices("keys", keys)
    pointer = np.zeros(rows + 1, np.int64)
    bad = _count(keys, pointer)
    if bad >= 0:
        raise ValueError(f"compressed_rows: edge {bad} has key {keys[bad]}, expected 0..{rows - 1}")
    order = np.empty(len(keys), np.int32 if len(keys) < 2**31 else np.int64)
    _place(keys, pointer, order)
    return pointer, order


def children(source: Array, target: Array, neurons: int) -> tuple[Array, Array]:
    """The targets of each neuron stand together: `child[pointer[u]:pointer[u + 1]]`, in edge order.

    Raises ValueError for an index outside 0..neurons-1.
    """
    source, target = _edges(source, target, neurons, neurons)
    return _children(source, target, neurons)


def levels(source: Array, target: Array, neurons: int, base: Array | None = None) -> Array:
    """Each neuron has its depth: the length of the longest path of edges that ends in it. int32 [neurons].

    `base` (int32 [neurons], >= 0) is a lower bound per neuron, from edges that are not listed here. Neurons on
    a cycle, or behind one, get -1. Edges already in topological order (every edge into a neuron stands before
    every edge out of it) take one pass; otherwise Kahn's algorithm. Raises ValueError for an index outside
    0..neurons-1.
    """
    source, target = _edges(source, target, neurons, neurons)
    level = _base(base, neurons)
    if _levels_in_one_pass(source, target, level, np.zeros(neurons, np.bool_)):
        return level
    level = _base(base, neurons)
    _kahn(*_children(source, target, neurons), level)
    return level


def levels_of_children(pointer: Array, child: Array, base: Array | None = None) -> Array:
    """`levels`, for edges that `children` (or `compressed_rows`) has already grouped by source."""
    level = _base(base, len(pointer) - 1)
    _kahn(pointer, child, level)
    return level


def find_cycle(source: Array, target: Array, neurons: int) -> Array:
    """The neurons of one cycle, each a parent of the next and the last of the first; empty if there is none.

    int64 [length], starting with its smallest neuron. A self-loop is a cycle of length 1.
    """
    level = levels(source, target, neurons)
    source, target = _edges(source, target, neurons, neurons)
    cycle = _cycle(source, target, level)
    return np.roll(cycle, -int(cycle.argmin())) if len(cycle) else cycle


def first_duplicate(source: Array, target: Array, targets: int, sources: int | None = None) -> int:
    """The index of the first edge that repeats an earlier (source, target) pair, or -1.

    Targets lie in 0..targets-1, sources in 0..sources-1 (default: up to the largest one). Edges sorted by
    (target, source) take one pass; otherwise needs 4 bytes per edge beside the input.
    """
    if sources is None:
        sources = int(source.max()) + 1 if len(source) else 0
    source, target = _edges(source, target, sources, targets)
    if _is_strictly_sorted(source, target):
        return -1
    pointer, grouped = _grouped(target, source, targets)
    if not _repeats(pointer, grouped, sources):
        return -1
    pointer, order = compressed_rows(target, targets)  # only now: the earliest index costs random reads
    return int(_first_repeat(source, pointer, order, sources))


def repeats(pointer: Array, grouped: Array, columns: int) -> bool:
    """Whether a row of `compressed_rows` or `children` holds the same entry (0..columns-1) twice."""
    return bool(_repeats(pointer, grouped, columns))


@njit(cache=True, nogil=True)
def count_edges(source: Array, target: Array, row_of: Array, pointer: Array, used: Array) -> int:
    """pointer[r + 1] is raised by the edges into row r, their sources are marked as used; returns how many they are.

    row_of[t] is the row of target t, negative: none. All indices are int32 and within bounds.
    """
    count = 0
    for e in range(len(target)):
        row = row_of[target[e]]
        if row >= 0:
            pointer[row + 1] += 1
            used[source[e]] = True
            count += 1
    return count


@njit(cache=True, nogil=True)
def fill_edges(
    source: Array,
    target: Array,
    weight: Array,
    row_of: Array,
    column_of: Array,
    first_weight: int,
    where: Array,
    column: Array,
    index: Array,
) -> None:
    """The edges that `count_edges` counted stand at where[row]..., which rises, in their order."""
    for e in range(len(target)):
        row = row_of[target[e]]
        if row >= 0:
            at = where[row]
            where[row] = at + 1
            column[at] = column_of[source[e]]
            index[at] = weight[e] + first_weight


# --- what callers may get wrong -------------------------------------------------------------------------------


def _indices(name: str, array: Array) -> Array:
    array = np.ascontiguousarray(array)
    if array.ndim != 1 or array.dtype not in (np.int32, np.int64):
        if array.size == 0 and array.ndim == 1:
            return array.astype(np.int64)
        raise TypeError(f"{name} must be a 1-d int32 or int64 array, found {array.dtype} {array.shape}")
    return array


def _edges(source: Array, target: Array, sources: int, targets: int) -> tuple[Array, Array]:
    source, target = _indices("source", source), _indices("target", target)
    if source.dtype != target.dtype:  # one compiled variant per dtype, not per pair of dtypes
        source, target = source.astype(np.int64), target.astype(np.int64)
    if len(source) != len(target):
        raise ValueError(f"source and target must be equally long, found {len(source)} and {len(target)}")
    bad = _outside(source, target, sources, targets)
    if bad >= 0:
        raise ValueError(
            f"edge {bad} goes from {source[bad]} to {target[bad]}, "
            f"expected a source in 0..{sources - 1} and a target in 0..{targets - 1}"
        )
    return source, target


def _base(base: Array | None, neurons: int) -> Array:
    if base is None:
        return np.zeros(neurons, np.int32)
    if base.shape != (neurons,):
        raise ValueError(f"base must have one entry per neuron, found shape {base.shape} for {neurons} neurons")
    return base.astype(np.int32)  # a copy: the walk raises it in place


# --- compiled -------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _outside(source: Array, target: Array, sources: int, targets: int) -> int:
    worst = False
    for e in range(len(source)):  # no early exit: this loop is vectorised
        worst |= (source[e] < 0) | (source[e] >= sources) | (target[e] < 0) | (target[e] >= targets)
    if worst:
        for e in range(len(source)):
            if source[e] < 0 or source[e] >= sources or target[e] < 0 or target[e] >= targets:
                return e
    return -1


@njit(cache=True, nogil=True)
def _count(keys: Array, pointer: Array) -> int:
    """`pointer[k]` is where key k starts; returns the first edge whose key has no row, or -1."""
    rows = len(pointer) - 1
    for e in range(len(keys)):
        key = keys[e]
        if key < 0 or key >= rows:
            return e
        pointer[key + 1] += 1
    for k in range(rows):
        pointer[k + 1] += pointer[k]
    return -1


@njit(cache=True, nogil=True)
def _place(keys: Array, pointer: Array, order: Array) -> None:
    where = pointer[:-1].copy()
    for e in range(len(keys)):
        order[where[keys[e]]] = e
        where[keys[e]] += 1


@njit(cache=True, nogil=True)
def _grouped(keys: Array, values: Array, rows: int) -> tuple[Array, Array]:
    """`values` (int32) in the order of their keys: what `compressed_rows` and a gather would give, in one scatter."""
    pointer = np.zeros(rows + 1, np.int64)
    _count(keys, pointer)
    where = pointer[:-1].copy()
    grouped = np.empty(len(values), np.int32)
    for e in range(len(keys)):
        key = keys[e]
        grouped[where[key]] = values[e]
        where[key] += 1
    return pointer, grouped


@njit(cache=True, nogil=True)
def _children(source: Array, target: Array, neurons: int) -> tuple[Array, Array]:
    return _grouped(source, target, neurons)


@njit(cache=True, nogil=True)
def _levels_in_one_pass(source: Array, target: Array, level: Array, used: Array) -> bool:
    """Relax every edge once. False as soon as a level rises that an earlier edge has already built upon.

    True means that every edge rises by at least one at the end: the order was topological and there is no cycle.
    """
    for e in range(len(source)):
        u, v = source[e], target[e]
        used[u] = True
        if level[v] <= level[u]:
            if used[v]:
                return False
            level[v] = level[u] + 1
    return True


@njit(cache=True, nogil=True)
def _kahn(pointer: Array, child: Array, level: Array) -> None:
    neurons = len(level)
    waiting = np.zeros(neurons, np.int32)  # parents not yet settled
    for e in range(len(child)):
        waiting[child[e]] += 1
    queue = np.empty(neurons, np.int32)
    end = 0
    for u in range(neurons):
        if waiting[u] == 0:
            queue[end] = u
            end += 1
    begin = 0
    while begin < end:
        u = queue[begin]
        begin += 1
        next_level = level[u] + 1
        for e in range(pointer[u], pointer[u + 1]):
            v = child[e]
            if level[v] < next_level:
                level[v] = next_level
            waiting[v] -= 1
            if waiting[v] == 0:
                queue[end] = v
                end += 1
    for u in range(neurons):
        if waiting[u] > 0:
            level[u] = -1


@njit(cache=True, nogil=True)
def _cycle(source: Array, target: Array, level: Array) -> Array:
    """Every neuron without a level has a parent without one: following such parents must come back."""
    parent = np.full(len(level), -1, np.int64)
    start = -1
    for e in range(len(source)):
        if level[source[e]] < 0 and level[target[e]] < 0:
            parent[target[e]] = source[e]
            start = target[e]
    if start < 0:
        return np.empty(0, np.int64)
    seen = np.zeros(len(level), np.bool_)
    u = np.int64(start)
    while not seen[u]:
        seen[u] = True
        u = parent[u]
    length, v = 1, parent[u]
    while v != u:
        length, v = length + 1, parent[v]
    cycle = np.empty(length, np.int64)
    for k in range(length - 1, -1, -1):  # parents come before their children
        cycle[k] = u
        u = parent[u]
    return cycle


@njit(cache=True, nogil=True)
def _is_strictly_sorted(source: Array, target: Array) -> bool:
    for e in range(1, len(source)):
        if target[e] < target[e - 1] or (target[e] == target[e - 1] and source[e] <= source[e - 1]):
            return False
    return True


@njit(cache=True, nogil=True)
def _repeats(pointer: Array, grouped: Array, sources: int) -> bool:
    last = np.full(sources, -1, np.int32)  # the last target each source was seen with
    for v in range(len(pointer) - 1):
        for e in range(pointer[v], pointer[v + 1]):
            if last[grouped[e]] == v:
                return True
            last[grouped[e]] = v
    return False


@njit(cache=True, nogil=True)
def _first_repeat(source: Array, pointer: Array, order: Array, sources: int) -> int:
    first = np.int64(len(source))
    last = np.full(sources, -1, np.int32)
    for v in range(len(pointer) - 1):
        for k in range(pointer[v], pointer[v + 1]):
            e = order[k]
            if last[source[e]] == v:
                first = min(first, np.int64(e))
                break  # edges of one target stand in their old order, later ones come later
            last[source[e]] = v
    return int(first) if first < len(source) else -1
