"""Block-sparse products on a CPU, compiled by numba: a register tile at a time.

Values lie feature-major with the batch contiguous, in rows of a whole number of lines (see lanes.py) so that no loop
has a ragged end. Tensors arrive as addresses. One call computes a range of tiles, which are independent; several
calls may run at once, and how the tiles are shared out changes no bit of the result.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys

from numba import int32, types

from irgrow.kernels import activations_numba, lanes, tiles
from irgrow.kernels.activations_numba import activate, chain, compiled, store_slopes, stores_slope
from irgrow.kernels.entry import Entry, entry, fingerprint, words
from irgrow.kernels.lanes import add, constant, lanes_of, load, pointer, splat, store, total, totals
from irgrow.kernels.tiles import ROWS, dots, grow_one, grow_two

SOURCES = fingerprint(activations_numba, lanes, tiles, sys.modules[__name__])


# --- what they are for ----------------------------------------------------------------------------------------


@compiled
def _multiply(like, operands):
    """Items first..last of y = act(W x + bias), an item being a block row and two lines of the batch.

    `blocks` (0: they are in order) numbers the blocks of each row, `sources` says which rows of x block e multiplies.
    A block is read with strides (row, step): (size, 1), or (1, size) for its transpose.
    """
    pointers, blocks, sources, values, size, row, step, x_at, x_pitch = operands[:9]
    y_at, pitch, biases, code, slopes_at, block_rows, first, last = operands[9:]
    start, number, source = pointer(pointers, int32(0)), pointer(blocks, int32(0)), pointer(sources, int32(0))
    a, x, y = pointer(values, like), pointer(x_at, like), pointer(y_at, like)
    bias, slopes = pointer(biases, like), pointer(slopes_at, like)
    line = lanes_of(like)
    zero = constant(0.0, like)
    for item in range(first, last):
        tile = item // block_rows
        i = item - tile * block_rows
        column = tile * 2 * line
        wide = column + line < pitch
        for r in range(0, size, ROWS):
            at = i * size + r
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(zero)
            if biases != 0:
                s0, s1, s2, s3 = splat(bias[at]), splat(bias[at + 1]), splat(bias[at + 2]), splat(bias[at + 3])
                s4, s5, s6, s7 = splat(bias[at + 4]), splat(bias[at + 5]), splat(bias[at + 6]), splat(bias[at + 7])
            out = at * pitch + column
            if wide:
                sums = (s0, s0, s1, s1, s2, s2, s3, s3, s4, s4, s5, s5, s6, s6, s7, s7)
                for e in range(start[i], start[i + 1]):
                    block = types.int64(number[e]) if blocks != 0 else e
                    begin = types.int64(source[block]) * size * x_pitch + column
                    sums = grow_two(sums, a, block * size * size + r * row, row, step, size, x, begin, x_pitch)
                for k in range(ROWS):
                    store(y, out + k * pitch, sums[2 * k])
                    store(y, out + k * pitch + line, sums[2 * k + 1])
            else:
                narrow = (s0, s1, s2, s3, s4, s5, s6, s7)
                for e in range(start[i], start[i + 1]):
                    block = types.int64(number[e]) if blocks != 0 else e
                    begin = types.int64(source[block]) * size * x_pitch + column
                    narrow = grow_one(narrow, a, block * size * size + r * row, row, step, size, x, begin, x_pitch)
                for k in range(ROWS):
                    store(y, out + k * pitch, narrow[k])
            stop = 2 * line if wide else line
            if code != 0:
                for k in range(ROWS):
                    here = out + k * pitch
                    if slopes_at != 0:
                        store_slopes(code, y, here, here + stop, slopes, here)
                    activate(code, y, here, here + stop)


@compiled
def _differentiate(like, operands):
    """Rows first..last of dz [rows, pitch] become g sigma'(z), zero beyond the batch; bias gradients their sums."""
    g_at, g_pitch, dz_at, y_at, slopes_at, pitch, d_bias, code, batch, first, last = operands
    g, dz, y = pointer(g_at, like), pointer(dz_at, like), pointer(y_at, like)
    slopes, sums = pointer(slopes_at, like), pointer(d_bias, like)
    line = lanes_of(like)
    zero = constant(0.0, like)
    for r in range(first, last):
        at = r * pitch
        for b in range(batch):
            dz[at + b] = g[r * g_pitch + b]
        if stores_slope(code):
            for b in range(batch):
                dz[at + b] *= slopes[at + b]
        else:
            chain(code, dz, y, at, at + batch)
        for b in range(batch, pitch):
            dz[at + b] = zero
        if d_bias != 0:
            whole = splat(zero)
            for b in range(0, pitch, line):
                whole = add(whole, load(dz, at + b))
            sums[r] = total(whole)


@compiled
def _gradients(like, operands):
    """Blocks first..last of d_values: the products of rows of dz and rows of x, summed over the batch."""
    rows, columns, size, dz_at, x_at, x_pitch, pitch, d_values, first, last = operands
    row, column = pointer(rows, int32(0)), pointer(columns, int32(0))
    dz, x, d = pointer(dz_at, like), pointer(x_at, like), pointer(d_values, like)
    count = pitch // lanes_of(like)
    for e in range(first, last):
        left, right, out = types.int64(row[e]) * size, types.int64(column[e]) * size, e * size * size
        for r in range(0, size, 4):
            for c in range(0, size, 4):
                sums = dots(like, dz, (left + r) * pitch, pitch, x, (right + c) * x_pitch, x_pitch, count)
                for k in range(4):
                    at = out + (r + k) * size + c
                    d[at], d[at + 1], d[at + 2], d[at + 3] = totals(
                        sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3]
                    )


@compiled
def _put(like, operands):
    """out[place[e]] = values[e] for edges first..last."""
    values_at, places, out_at, first, last = operands
    values, out, place = pointer(values_at, like), pointer(out_at, like), pointer(places, types.int64(0))
    for e in range(first, last):
        out[place[e]] = values[e]


@compiled
def _take(like, operands):
    """out[e] = values[place[e]] for edges first..last."""
    values_at, places, out_at, first, last = operands
    values, out, place = pointer(values_at, like), pointer(out_at, like), pointer(places, types.int64(0))
    for e in range(first, last):
        out[e] = values[place[e]]


@compiled
def _copy(like, operands):
    """Rows first..last of out [rows, pitch] become those of x, zero after the batch; tile by tile, for any strides."""
    x_at, row_step, step, batch, out_at, pitch, first, last = operands
    x, out = pointer(x_at, like), pointer(out_at, like)
    line = lanes_of(like)
    zero = constant(0.0, like)
    for start in range(0, pitch, line):
        stop = min(start + line, batch)
        for r in range(first, last):
            for b in range(start, stop):
                out[r * pitch + b] = x[r * row_step + b * step]
            for b in range(max(start, batch), start + line):
                out[r * pitch + b] = zero


# --- entry points ---------------------------------------------------------------------------------------------


@Entry
def multiply(sources, zero):
    @entry
    def multiply(at):
        if sources:
            _multiply(zero, words(at, 17))

    return multiply


@Entry
def differentiate(sources, zero):
    @entry
    def differentiate(at):
        if sources:
            _differentiate(zero, words(at, 11))

    return differentiate


@Entry
def gradients(sources, zero):
    @entry
    def gradients(at):
        if sources:
            _gradients(zero, words(at, 10))

    return gradients


@Entry
def put(sources, zero):
    @entry
    def put(at):
        if sources:
            _put(zero, words(at, 5))

    return put


@Entry
def take(sources, zero):
    @entry
    def take(at):
        if sources:
            _take(zero, words(at, 5))

    return take


@Entry
def copy(sources, zero):
    @entry
    def copy(at):
        if sources:
            _copy(zero, words(at, 8))

    return copy
