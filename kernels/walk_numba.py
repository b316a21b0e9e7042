"""The walk on a CPU, compiled by numba: forward, and one reverse sweep for all gradients.

Values lie as `buffer` [value rows, pitch], the batch contiguous, the pitch a whole number of lines (see lanes.py)
so that no loop has a ragged end; lanes beyond the batch are kept 0. Batch 1 has loops of its own and pitch 1.
Tensors arrive as addresses: unpacking an array costs more than walking a small network.

The batch is cut into slices of columns, which are independent: one call walks one slice, and several may run at
once. Sums over the batch (gradients of weights and biases) are per slice; the caller adds them.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from typing import Any

from numba import float32, float64, int32, njit, types

from irgrow.kernels import activations_numba, lanes
from irgrow.kernels.activations_numba import (
    activate,
    activate_one,
    chain,
    chain_one,
    inline,
    slope_one,
    store_slopes,
)
from irgrow.kernels.lanes import (
    add,
    constant,
    lanes_of,
    load,
    multiply_add,
    pointer,
    splat,
    store,
    total,
    totals,
)
from irgrow.kernels.walk_plan import HEADER, MAX, SUM, Header

INPUTS, NEURONS, EDGES, SUMMED = map(int, (Header.INPUTS, Header.NEURONS, Header.EDGES, Header.SUMMED))
MAXIMA, IN_ORDER = int(Header.MAXIMA), int(Header.IN_ORDER)

# numba's cache on disk looks at the file of the cached function only. The compiled entry points close over this
# number, and so are compiled again when any of the files they were made from changes.
SOURCES = zlib.crc32(
    "".join(inspect.getsource(m) for m in (activations_numba, lanes, sys.modules[__name__])).encode()
)

compiled: Any = njit(fastmath={"contract"}, error_model="numpy")


# --- sums over edges ------------------------------------------------------------------------------------------


@inline
def _gather(out, at, seed, onto, source, pitch, column, index, weights, ordered, start, stop, first, last):
    """out[at + b] = seed (+ out[at + b]) + sum over edges of weight * source[column, b], b in first..last.

    Up to four lines of sums are held in registers at a time; the products of one sum are always added in edge
    order within it, whatever the batch size, except that narrow tiles keep two or four partial sums.
    """
    line = lanes_of(seed)
    zero = splat(constant(0.0, seed))
    b = first
    while b < last:
        left = last - b
        place = at + b
        a0 = splat(seed)
        a1, a2, a3 = zero, zero, zero
        if left >= 4 * line:
            a1, a2, a3 = a0, a0, a0
            if onto:
                a0 = add(a0, load(out, place))
                a1 = add(a1, load(out, place + line))
                a2 = add(a2, load(out, place + 2 * line))
                a3 = add(a3, load(out, place + 3 * line))
            for e in range(start, stop):
                w = splat(weights[e] if ordered else weights[index[e]])
                k = types.int64(column[e]) * pitch + b
                a0 = multiply_add(w, load(source, k), a0)
                a1 = multiply_add(w, load(source, k + line), a1)
                a2 = multiply_add(w, load(source, k + 2 * line), a2)
                a3 = multiply_add(w, load(source, k + 3 * line), a3)
            store(out, place, a0)
            store(out, place + line, a1)
            store(out, place + 2 * line, a2)
            store(out, place + 3 * line, a3)
            b += 4 * line
        elif left >= 2 * line:
            a2 = a0
            if onto:
                a0 = add(a0, load(out, place))
                a2 = add(a2, load(out, place + line))
            e = start
            while e + 1 < stop:
                w = splat(weights[e] if ordered else weights[index[e]])
                k = types.int64(column[e]) * pitch + b
                a0 = multiply_add(w, load(source, k), a0)
                a2 = multiply_add(w, load(source, k + line), a2)
                w = splat(weights[e + 1] if ordered else weights[index[e + 1]])
                k = types.int64(column[e + 1]) * pitch + b
                a1 = multiply_add(w, load(source, k), a1)
                a3 = multiply_add(w, load(source, k + line), a3)
                e += 2
            if e < stop:
                w = splat(weights[e] if ordered else weights[index[e]])
                k = types.int64(column[e]) * pitch + b
                a0 = multiply_add(w, load(source, k), a0)
                a2 = multiply_add(w, load(source, k + line), a2)
            store(out, place, add(a0, a1))
            store(out, place + line, add(a2, a3))
            b += 2 * line
        else:
            if onto:
                a0 = add(a0, load(out, place))
            e = start
            while e + 3 < stop:
                w = splat(weights[e] if ordered else weights[index[e]])
                a0 = multiply_add(w, load(source, types.int64(column[e]) * pitch + b), a0)
                w = splat(weights[e + 1] if ordered else weights[index[e + 1]])
                a1 = multiply_add(w, load(source, types.int64(column[e + 1]) * pitch + b), a1)
                w = splat(weights[e + 2] if ordered else weights[index[e + 2]])
                a2 = multiply_add(w, load(source, types.int64(column[e + 2]) * pitch + b), a2)
                w = splat(weights[e + 3] if ordered else weights[index[e + 3]])
                a3 = multiply_add(w, load(source, types.int64(column[e + 3]) * pitch + b), a3)
                e += 4
            while e < stop:
                w = splat(weights[e] if ordered else weights[index[e]])
                a0 = multiply_add(w, load(source, types.int64(column[e]) * pitch + b), a0)
                e += 1
            store(out, place, add(add(a0, a1), add(a2, a3)))
            b += line


@inline
def _gather_one(seed, source, column, index, weights, ordered, start, stop):
    """seed + sum over edges of weight * source[column]: batch 1."""
    a0 = seed
    a1 = a2 = a3 = constant(0.0, seed)
    e = start
    while e + 3 < stop:
        a0 += (weights[e] if ordered else weights[index[e]]) * source[column[e]]
        a1 += (weights[e + 1] if ordered else weights[index[e + 1]]) * source[column[e + 1]]
        a2 += (weights[e + 2] if ordered else weights[index[e + 2]]) * source[column[e + 2]]
        a3 += (weights[e + 3] if ordered else weights[index[e + 3]]) * source[column[e + 3]]
        e += 4
    while e < stop:
        a0 += (weights[e] if ordered else weights[index[e]]) * source[column[e]]
        e += 1
    return (a0 + a1) + (a2 + a3)


@inline
def _exceeds(x, best):
    """x takes over from an earlier `best`: ties stay with the first, and so does NaN."""
    return (x > best or x != x) and best == best


@compiled
def _largest(out, at, seed, onto, source, pitch, column, index, weights, start, stop, first, last):
    """out[at + b] = seed (+ out[at + b]) + the largest weight * source[column, b]; there is at least one edge."""
    for b in range(first, last):
        best = weights[index[start]] * source[types.int64(column[start]) * pitch + b]
        for e in range(start + 1, stop):
            x = weights[index[e]] * source[types.int64(column[e]) * pitch + b]
            best = x if _exceeds(x, best) else best
        out[at + b] = best + seed + (out[at + b] if onto else constant(0.0, seed))


@compiled
def _send_to_largest(
    g, row, v, pitch, column, index, weights, d_weights, needs_weights, first_row, start, stop, first, last
):
    """The gradient of a MAX row goes to the first largest parent, sample by sample."""
    for b in range(first, last):
        winner = start
        best = weights[index[start]] * v[types.int64(column[start]) * pitch + b]
        for e in range(start + 1, stop):
            x = weights[index[e]] * v[types.int64(column[e]) * pitch + b]
            if _exceeds(x, best):
                winner, best = e, x
        parent = types.int64(column[winner]) * pitch + b
        dz = g[row * pitch + b]
        if column[winner] >= first_row:
            g[parent] += weights[index[winner]] * dz
        if needs_weights:
            d_weights[index[winner]] += dz * v[parent]


# --- forward --------------------------------------------------------------------------------------------------


@compiled
def _forward(
    like, structure, buffer, pitch, inputs, inputs_pitch, weights, biases, offset, offset_pitch, slopes, batch, first, last
):
    """Rows of `buffer` are filled, columns first..last (a whole number of lines; the real ones end at `batch`).

    `slopes` (0: not wanted) receives sigma'(z) of the rows that store it, with the same pitch.
    """
    s = pointer(structure, int32(0))
    n_in, neurons, edges = types.int64(s[INPUTS]), types.int64(s[NEURONS]), types.int64(s[EDGES])
    ordered = s[IN_ORDER] == 1
    row_pointer = pointer(structure + 4 * HEADER, int32(0))
    fields = pointer(structure + 4 * (HEADER + neurons + 1), int32(0))
    column = pointer(structure + 4 * (HEADER + 5 * neurons + 1), int32(0))
    index = pointer(structure + 4 * (HEADER + 5 * neurons + 1 + edges), int32(0))
    v, x, w = pointer(buffer, like), pointer(inputs, like), pointer(weights, like)
    bias, extra, kept = pointer(biases, like), pointer(offset, like), pointer(slopes, like)
    real = min(last, batch)  # where padding begins

    for r in range(n_in):
        for b in range(first, real):
            v[r * pitch + b] = x[r * inputs_pitch + b]
        for b in range(real, last):
            v[r * pitch + b] = constant(0.0, like)

    for r in range(neurons):
        start, stop = types.int64(row_pointer[r]), types.int64(row_pointer[r + 1])
        code, place = fields[r], fields[r + 2 * neurons]
        seed = bias[place] if place >= 0 else constant(0.0, like)
        at = (n_in + r) * pitch

        if pitch == 1:
            if offset != 0:
                seed += extra[r * offset_pitch]
            if fields[r + neurons] == SUM:
                z = _gather_one(seed, v, column, index, w, ordered, start, stop)
            else:
                _largest(v, at, seed, False, v, 1, column, index, w, start, stop, 0, 1)
                z = v[at]
            if slopes != 0 and fields[r + 3 * neurons] >= 0:
                kept[fields[r + 3 * neurons]] = slope_one(code, z)
            v[at] = activate_one(code, z)
            continue

        if offset != 0:
            for b in range(first, real):
                v[at + b] = extra[r * offset_pitch + b]
            for b in range(real, last):
                v[at + b] = constant(0.0, like)
        if fields[r + neurons] == SUM:
            _gather(v, at, seed, offset != 0, v, pitch, column, index, w, ordered, start, stop, first, last)
        else:
            _largest(v, at, seed, offset != 0, v, pitch, column, index, w, start, stop, first, last)
        if slopes != 0 and fields[r + 3 * neurons] >= 0:
            store_slopes(code, v, at + first, at + last, kept, fields[r + 3 * neurons] * pitch + first)
        activate(code, v, at + first, at + last)
        for b in range(real, last):
            v[at + b] = constant(0.0, like)


# --- backward -------------------------------------------------------------------------------------------------


@compiled
def _backward(
    like, structure, buffer, pitch, weights, slopes, incoming, incoming_pitch, gradient, d_weights, d_biases,
    needs_inputs, batch, first, last
):
    """Rows of `gradient` [value rows, pitch] become d/dz of computed rows and (if wanted) d/dx of input rows.

    incoming [neurons, B] is the gradient of the computed values. `d_weights` and `d_biases` (0: not wanted) are
    added to: they start at 0.
    """
    s = pointer(structure, int32(0))
    n_in, neurons, edges = types.int64(s[INPUTS]), types.int64(s[NEURONS]), types.int64(s[EDGES])
    summed, has_max, ordered = types.int64(s[SUMMED]), s[MAXIMA] > 0, s[IN_ORDER] == 1
    rows = n_in + neurons
    row_pointer = pointer(structure + 4 * HEADER, int32(0))
    fields = pointer(structure + 4 * (HEADER + neurons + 1), int32(0))
    at = HEADER + 5 * neurons + 1
    column, index = pointer(structure + 4 * at, int32(0)), pointer(structure + 4 * (at + edges), int32(0))
    at += 2 * edges
    child_pointer = pointer(structure + 4 * at, int32(0))
    child = pointer(structure + 4 * (at + rows + 1), int32(0))
    child_index = pointer(structure + 4 * (at + rows + 1 + summed), int32(0))
    v, w, kept = pointer(buffer, like), pointer(weights, like), pointer(slopes, like)
    dy, g = pointer(incoming, like), pointer(gradient, like)
    dw, db = pointer(d_weights, like), pointer(d_biases, like)
    real = min(last, batch)
    zero = constant(0.0, like)
    lowest = 0 if needs_inputs else n_in  # the first value row whose gradient is wanted

    if has_max:  # their gradients are sent to their parents before the sweep comes to those
        for r in range(lowest, rows):
            for b in range(first, last):
                g[r * pitch + b] = zero

    for k in range(rows - lowest):
        row = rows - 1 - k
        r = row - n_in
        start, stop = types.int64(child_pointer[k]), types.int64(child_pointer[k + 1])
        at = row * pitch
        if pitch == 1:
            dz = _gather_one(g[at] if has_max else zero, g, child, child_index, w, False, start, stop)
            if r >= 0:
                dz += dy[r * incoming_pitch]
                slope = fields[r + 3 * neurons]
                dz = dz * kept[slope] if slope >= 0 else chain_one(fields[r], dz, v[at])
                if d_biases != 0 and fields[r + 2 * neurons] >= 0:
                    db[fields[r + 2 * neurons]] += dz
            g[at] = dz
        else:
            _gather(g, at, zero, has_max, g, pitch, child, child_index, w, False, start, stop, first, last)
            if r >= 0:
                for b in range(first, real):
                    g[at + b] += dy[r * incoming_pitch + b]
                slope = fields[r + 3 * neurons]
                if slope >= 0:
                    for b in range(first, last):
                        g[at + b] *= kept[slope * pitch + b]
                else:
                    chain(fields[r], g, v, at + first, at + last)
                for b in range(real, last):
                    g[at + b] = zero
                if d_biases != 0 and fields[r + 2 * neurons] >= 0:
                    sums = splat(zero)
                    for b in range(first, last, lanes_of(like)):
                        sums = add(sums, load(g, at + b))
                    db[fields[r + 2 * neurons]] += total(sums)
        if r >= 0 and fields[r + neurons] == MAX:
            _send_to_largest(
                g, row, v, pitch, column, index, w, dw, d_weights != 0, lowest,
                types.int64(row_pointer[r]), types.int64(row_pointer[r + 1]), first, real
            )

    if d_weights != 0:  # a pass of its own: forwards through the edges, and through half as much memory at a time
        for r in range(neurons):
            start, stop = types.int64(row_pointer[r]), types.int64(row_pointer[r + 1])
            if fields[r + neurons] == SUM:
                at = (n_in + r) * pitch
                if pitch == 1:
                    for e in range(start, stop):
                        dw[e if ordered else index[e]] += g[at] * v[column[e]]
                else:
                    _weight_gradients(dw, g, at, v, pitch, column, index, start, stop, first, last)


@inline
def _weight_gradients(dw, g, at, v, pitch, column, index, start, stop, first, last):
    """dw[weight] += sum over the batch of g[at + b] * v[column, b], four edges at a time."""
    line = lanes_of(g[0])
    zero = splat(constant(0.0, g[0]))
    e = start
    while e + 3 < stop:
        c0, c1 = types.int64(column[e]) * pitch, types.int64(column[e + 1]) * pitch
        c2, c3 = types.int64(column[e + 2]) * pitch, types.int64(column[e + 3]) * pitch
        a0, a1, a2, a3 = zero, zero, zero, zero
        for b in range(first, last, line):
            dz = load(g, at + b)
            a0 = multiply_add(dz, load(v, c0 + b), a0)
            a1 = multiply_add(dz, load(v, c1 + b), a1)
            a2 = multiply_add(dz, load(v, c2 + b), a2)
            a3 = multiply_add(dz, load(v, c3 + b), a3)
        s0, s1, s2, s3 = totals(a0, a1, a2, a3)
        dw[index[e]] += s0
        dw[index[e + 1]] += s1
        dw[index[e + 2]] += s2
        dw[index[e + 3]] += s3
        e += 4
    while e < stop:
        c0 = types.int64(column[e]) * pitch
        a0 = zero
        for b in range(first, last, line):
            a0 = multiply_add(load(g, at + b), load(v, c0 + b), a0)
        dw[index[e]] += total(a0)
        e += 1


# --- entry points ---------------------------------------------------------------------------------------------


def _entry_points(sources: int) -> tuple[Any, ...]:
    entry: Any = njit(cache=True, nogil=True)

    @entry
    def forward_float32(
        structure, buffer, pitch, inputs, inputs_pitch, weights, biases, offset, offset_pitch, slopes, batch, first, last
    ):
        _forward(
            float32(0), structure, buffer, pitch, inputs, inputs_pitch, weights, biases, offset, offset_pitch,
            slopes, batch, first, last,
        )
        return sources

    @entry
    def forward_float64(
        structure, buffer, pitch, inputs, inputs_pitch, weights, biases, offset, offset_pitch, slopes, batch, first, last
    ):
        _forward(
            float64(0), structure, buffer, pitch, inputs, inputs_pitch, weights, biases, offset, offset_pitch,
            slopes, batch, first, last,
        )
        return sources

    @entry
    def backward_float32(
        structure, buffer, pitch, weights, slopes, incoming, incoming_pitch, gradient, d_weights, d_biases,
        needs_inputs, batch, first, last,
    ):
        _backward(
            float32(0), structure, buffer, pitch, weights, slopes, incoming, incoming_pitch, gradient, d_weights,
            d_biases, needs_inputs, batch, first, last,
        )
        return sources

    @entry
    def backward_float64(
        structure, buffer, pitch, weights, slopes, incoming, incoming_pitch, gradient, d_weights, d_biases,
        needs_inputs, batch, first, last,
    ):
        _backward(
            float64(0), structure, buffer, pitch, weights, slopes, incoming, incoming_pitch, gradient, d_weights,
            d_biases, needs_inputs, batch, first, last,
        )
        return sources

    return forward_float32, forward_float64, backward_float32, backward_float64


forward_float32, forward_float64, backward_float32, backward_float64 = _entry_points(SOURCES)
