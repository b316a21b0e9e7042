"""Masked matmul on a CPU, compiled by numba: forward, and all gradients in one sweep over the transpose.

A tile is a few columns of the batch (at most four lines, see lanes.py), packed: its rows stand next to each other.
The edges are walked in the order of `Panels` (masked_matmul_cpu.py): so that the rows they read stay in the nearest
cache while many rows of the result are summed. No bounds are checked.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys

from numba import int32, types

from irgrow.kernels import activations_numba, edges_numba, lanes
from irgrow.kernels.activations_numba import activate, chain, compiled, inline, store_slopes
from irgrow.kernels.edges_numba import gather, gather_one, pull, pull_one, turn
from irgrow.kernels.entry import Entry, entry, fingerprint, words
from irgrow.kernels.lanes import add, constant, lanes_of, load, pointer, splat, store, total

SOURCES = fingerprint(activations_numba, edges_numba, lanes, sys.modules[__name__])
LINES = 4  # of a tile


@inline
def _pack(tile, width, source, start, pitch, step, rows, real):
    """tile[r * width + b] = source[start + r * pitch + b * step] for b < real, and 0 from there to `width`.

    Either stride is 1.
    """
    line = lanes_of(source[0])
    if step == 1 and real == width and width % line == 0:
        for r in range(rows):
            for b in range(0, width, line):
                store(tile, r * width + b, load(source, start + r * pitch + b))
        return
    if step == 1:
        for r in range(rows):
            for b in range(real):
                tile[r * width + b] = source[start + r * pitch + b]
    else:  # the rows lie next to each other
        turn(tile, 0, width, source, start, step, rows, real)
    zero = constant(0.0, source[0])
    for r in range(rows):
        for b in range(real, width):
            tile[r * width + b] = zero


@inline
def _unpack(out, start, pitch, tile, width, first_row, last_row, real):
    """out[start + r * pitch + b] = tile[r * width + b]."""
    line = lanes_of(tile[0])
    for r in range(first_row, last_row):
        if real == 4 * line:
            for b in range(0, 4 * line, line):
                store(out, start + r * pitch + b, load(tile, r * width + b))
        else:
            for b in range(real):
                out[start + r * pitch + b] = tile[r * width + b]


@inline
def _sweep(sweeps, k, first_row, last_row):
    """(first row, last row, where its segments begin less the first row, whether it opens its rows) of sweep k."""
    first, last, segment, opens = sweeps[4 * k], sweeps[4 * k + 1], sweeps[4 * k + 2], sweeps[4 * k + 3]
    return max(types.int64(first), first_row), min(types.int64(last), last_row), segment - first, opens != 0


@compiled
def _forward(like, operands):
    """Rows first_row..last_row of y [rows, batch] = act(W x + bias), samples first..last (whole lines, or one).

    x [columns, batch] with strides (x_pitch, x_step). slopes [rows, batch] (0: not wanted) receives sigma'(z).
    `scratch` holds a tile of x and one of y. Addresses; 0 for no bias.
    """
    count, sweeps_at, segments_at, edges_at, edges, ordered, columns, x_at, x_pitch, x_step, weights_at = operands[:11]
    bias_at, code, slopes_at, out_at, batch, scratch_at, first, last, first_row, last_row = operands[11:]
    sweeps, segments = pointer(sweeps_at, int32(0)), pointer(segments_at, int32(0))
    column, index = pointer(edges_at, int32(0)), pointer(edges_at + 4 * edges, int32(0))
    x, w, bias = pointer(x_at, like), pointer(weights_at, like), pointer(bias_at, like)
    slopes, out, tile = pointer(slopes_at, like), pointer(out_at, like), pointer(scratch_at, like)
    line = lanes_of(like)
    zero = constant(0.0, like)
    in_order = ordered != 0
    size = 64 // line
    b = first
    while b < last:
        width = min(LINES * line, last - b)
        real = min(width, batch - b)
        _pack(tile, width, x, b * x_step, x_pitch, x_step, columns, real)
        y = pointer(scratch_at + columns * width * size, like)
        for k in range(count):
            begin, end, segment, opens = _sweep(sweeps, k, first_row, last_row)
            for r in range(begin, end):
                start, stop = types.int64(segments[segment + r]), types.int64(segments[segment + r + 1])
                if start == stop and not opens:
                    continue
                seed = bias[r] if opens and bias_at != 0 else zero
                if width == 1:
                    seed = seed if opens else y[r]
                    y[r] = gather_one(seed, tile, column, index, w, in_order, start, stop)
                elif width == LINES * line:  # as a constant
                    at, full = r * LINES * line, LINES * line
                    gather(y, at, seed, not opens, tile, full, column, index, w, in_order, start, stop, 0, full)
                else:
                    at = r * width
                    gather(y, at, seed, not opens, tile, width, column, index, w, in_order, start, stop, 0, width)
        if code != 0:
            for r in range(first_row, last_row):
                if slopes_at != 0:
                    store_slopes(code, y, r * width, r * width + real, slopes, r * batch + b)
                activate(code, y, r * width, r * width + real)
        _unpack(out, b, batch, y, width, first_row, last_row, real)
        b += width


@compiled
def _backward(like, operands):
    """Rows first_row..last_row of d_x [columns, batch] = W^T dz, and what their edges add to d_weights; d_bias += dz.

    The edges are those of the transpose. incoming [rows, batch] with strides (pitch, step); dz = incoming sigma'(z),
    from y or the stored slopes [rows, batch]. `scratch` holds tiles of dz, x and d_x. 0: not wanted.
    """
    count, sweeps_at, segments_at, edges_at, edges, rows, columns, incoming_at, pitch, step, weights_at = operands[:11]
    code, slopes_at, y_at, x_at, x_pitch, x_step, d_x_at, d_weights_at, d_bias_at, batch = operands[11:21]
    scratch_at, first, last, first_row, last_row = operands[21:]
    sweeps, segments = pointer(sweeps_at, int32(0)), pointer(segments_at, int32(0))
    child, index = pointer(edges_at, int32(0)), pointer(edges_at + 4 * edges, int32(0))
    x, w, incoming = pointer(x_at, like), pointer(weights_at, like), pointer(incoming_at, like)
    slopes, d_x, dz = pointer(slopes_at, like), pointer(d_x_at, like), pointer(scratch_at, like)
    d_weights, d_bias = pointer(d_weights_at, like), pointer(d_bias_at, like)
    line = lanes_of(like)
    zero = constant(0.0, like)
    size = 64 // line
    b = first
    while b < last:
        width = min(LINES * line, last - b)
        real = min(width, batch - b)
        _pack(dz, width, incoming, b * step, pitch, step, rows, real)
        if code != 0:
            for r in range(rows):
                if slopes_at != 0:
                    for l in range(real):
                        dz[r * width + l] *= slopes[r * batch + b + l]
                else:
                    y = pointer(y_at + (r * batch + b) * size, like)
                    chain(code, pointer(scratch_at + r * width * size, like), y, 0, real)
        if d_bias_at != 0:
            for r in range(rows):
                if width == 1:
                    d_bias[r] += dz[r]
                else:
                    whole = splat(zero)
                    for l in range(0, width, line):
                        whole = add(whole, load(dz, r * width + l))
                    d_bias[r] += total(whole)
        tile = pointer(scratch_at + rows * width * size, like)
        out = pointer(scratch_at + (rows + columns) * width * size, like)
        if d_weights_at != 0:
            _pack(tile, width, x, b * x_step, x_pitch, x_step, columns, real)
        for k in range(count):
            begin, end, segment, opens = _sweep(sweeps, k, first_row, last_row)
            for r in range(begin, end):
                start, stop = types.int64(segments[segment + r]), types.int64(segments[segment + r + 1])
                if start == stop and not opens:
                    continue
                at = r * width
                if width == 1:
                    seed = zero if opens else out[r]
                    if d_weights_at != 0:
                        out[r] = pull_one(seed, dz, child, index, w, start, stop, tile[r], d_weights)
                    else:
                        out[r] = gather_one(seed, dz, child, index, w, False, start, stop)
                elif d_weights_at != 0 and width == LINES * line:  # as a constant
                    full = LINES * line
                    pull(out, at, not opens, dz, full, child, index, w, start, stop, tile, d_weights, 0, full)
                elif d_weights_at != 0:
                    pull(out, at, not opens, dz, width, child, index, w, start, stop, tile, d_weights, 0, width)
                else:
                    gather(out, at, zero, not opens, dz, width, child, index, w, False, start, stop, 0, width)
        if d_x_at != 0:
            _unpack(d_x, b, batch, out, width, first_row, last_row, real)
        b += width


@Entry
def forward(sources, zero):
    @entry
    def forward(at):
        if sources:
            _forward(zero, words(at, 21))

    return forward


@Entry
def backward(sources, zero):
    @entry
    def backward(at):
        if sources:
            _backward(zero, words(at, 26))

    return backward
