"""Sums of outer products on a CPU, compiled by numba: a register tile of the sum at a time.

Operands are packed: columns in groups of two lines (32 float32, 16 float64), group after group, each sample-major
[samples, columns of a group] with zeros after the last column. Nothing is transposed and everything is read in order.
A piece of samples is summed in registers in the precision of the operands and added to `out` in its own. A symmetric
sum computes the tiles that reach its diagonal or lie above it. Tiles are independent: how they are shared out among
threads changes no bit of the result.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys

from irgrow.kernels import lanes, tiles
from irgrow.kernels.activations_numba import compiled
from irgrow.kernels.entry import Entry, entry, fingerprint, real_of, words
from irgrow.kernels.lanes import constant, lanes_of, pointer, splat
from irgrow.kernels.tiles import ROWS, add_line, grow_one, grow_two

SOURCES = fingerprint(lanes, tiles, sys.modules[__name__])
PIECE = 128  # samples summed in registers: a group of both operands then fits the cache


@compiled
def _pack(like, scale, operands):
    """Columns first..last of `source` [samples, ...] stand in `target` from column `start` on, times `scale`.

    source[s, c] lies at s row + c step; groups of the target lie `stride` apart.
    """
    source_at, row, step, target_at, stride, start, samples, first, last = operands
    source, target = pointer(source_at, like), pointer(target_at, scale)
    width = 2 * lanes_of(scale)
    for some in range(0, samples, width):  # so many rows of source and target stay in the cache
        end = min(some + width, samples)
        c = first
        while c < last:
            inside = (start + c) % width
            count = min(last - c, width - inside)
            base = (start + c) // width * stride + inside
            if step == 1:
                for s in range(some, end):
                    for k in range(count):
                        target[base + s * width + k] = scale * source[s * row + c + k]
            else:
                for k in range(count):
                    for s in range(some, end):
                        target[base + s * width + k] = scale * source[s * row + (c + k) * step]
            c += count


@compiled
def _add(like, scale, operands):
    """Items first..last of out += scale * sum over samples of left right^T.

    An item is a group of left columns (rows of out) times a group of right ones; with `symmetric` only those that
    are not below the diagonal.
    """
    out_at, out_pitch, left_at, left_stride, right_at, right_stride, samples, p, q, symmetric, first, last = operands
    out, a, b = pointer(out_at, scale), pointer(left_at, like), pointer(right_at, like)
    line = lanes_of(like)
    width = 2 * line
    bands = (p + width - 1) // width
    zero = splat(constant(0.0, like))
    item = 0
    for group in range((q + width - 1) // width):
        reach = min(bands, group + 1) if symmetric else bands
        if item + reach <= first:  # all before our range
            item += reach
            continue
        column = group * width
        for band in range(reach):
            if item >= last:
                return
            if item >= first:
                for start in range(0, samples, PIECE):
                    count = min(PIECE, samples - start)
                    left = band * left_stride + start * width
                    right = group * right_stride + start * width
                    for r in range(0, min(width, p - band * width), ROWS):
                        row = band * width + r
                        low = symmetric and row >= column + line  # the first line is below the diagonal
                        if column + line < q and not low:
                            # fmt: off
                            wide = (zero, zero, zero, zero, zero, zero, zero, zero,
                                    zero, zero, zero, zero, zero, zero, zero, zero)
                            # fmt: on
                            wide = grow_two(wide, a, left + r, 1, width, count, b, right, width)
                            for k in range(min(ROWS, p - row)):
                                place = (row + k) * out_pitch + column
                                add_line(out, place, wide[2 * k], scale, q - column)
                                add_line(out, place + line, wide[2 * k + 1], scale, q - column - line)
                        else:
                            here = line if low else 0
                            sums = (zero, zero, zero, zero, zero, zero, zero, zero)
                            sums = grow_one(sums, a, left + r, 1, width, count, b, right + here, width)
                            for k in range(min(ROWS, p - row)):
                                place = (row + k) * out_pitch + column + here
                                add_line(out, place, sums[k], scale, q - column - here)
            item += 1


@Entry
def add(sources, zero):
    @entry
    def add(at):
        if sources:
            operands = words(at, 13)
            _add(zero, real_of(operands[0]), operands[1:])

    return add


@Entry
def pack(sources, zero):
    @entry
    def pack(at):
        if sources:
            operands = words(at, 10)
            _pack(zero, constant(real_of(operands[0]), zero), operands[1:])

    return pack
