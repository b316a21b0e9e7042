"""Sums of outer products on a CPU, compiled by numba: a register tile of a sum at a time, many sums in one call.

Nothing is packed: of the left operand single numbers are spread over a line, wherever they lie; of the right one whole
lines are read, row after row. A piece of samples is summed in registers in the precision of the operands and added to
`out` in its own. A symmetric sum computes the tiles that reach its diagonal or lie above it. Tiles are independent:
which thread computes them changes no bit of the result.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys

from numba import float64, int64

from irgrow.kernels import lanes, tiles
from irgrow.kernels.activations_numba import compiled
from irgrow.kernels.entry import Entry, entry, fingerprint, next_of, words
from irgrow.kernels.lanes import constant, lanes_of, pointer, prefetch, splat
from irgrow.kernels.tiles import ROWS, add_line, grow_two, sum_one, sum_two

SOURCES = fingerprint(lanes, tiles, sys.modules[__name__])
PIECE = 256  # samples summed in registers
# Numbers of a product: out, its pitch; left, its pitches along columns and samples; right, its pitch; samples; rows and
# columns of out; whether it is symmetric.
PRODUCT = 11
AHEAD = 1  # rows of an image that are asked for early
# And of a grid: target; source, its pitches along images, channels, rows and columns; rows and columns of an image.
GRID = 8


@compiled
def _tile(like, scale, product, band, group):
    """Rows of `band` and columns of `group` of out += scale * sum over samples of left right^T."""
    out, a, b = pointer(product[0], scale), pointer(product[2], like), pointer(product[5], like)
    out_pitch, row_step, step = product[1], product[3], product[4]
    pitch, samples, p, q, symmetric = product[6], product[7], product[8], product[9], product[10]
    line = lanes_of(like)
    width = 2 * line
    column, zero = group * width, splat(constant(0.0, like))
    for start in range(0, samples, PIECE):
        count = min(PIECE, samples - start)
        for row in range(band * width, min(band * width + width, p), ROWS):
            left, rows = row * row_step + start * step, min(ROWS, p - row)
            low = symmetric and row >= column + line  # the first line is below the diagonal
            if column + line < q and not low:
                right = start * pitch + column
                if rows == ROWS and column + width <= q:
                    # fmt: off
                    wide = (zero, zero, zero, zero, zero, zero, zero, zero,
                            zero, zero, zero, zero, zero, zero, zero, zero)
                    # fmt: on
                    wide = grow_two(wide, a, left, row_step, step, count, b, right, pitch)
                else:
                    wide = sum_two(like, a, left, row_step, rows, step, count, b, right, pitch, q - column)
                for k in range(rows):
                    place = (row + k) * out_pitch + column
                    add_line(out, place, wide[2 * k], scale, q - column)
                    add_line(out, place + line, wide[2 * k + 1], scale, q - column - line)
            else:
                here = column + line if low else column
                sums = sum_one(like, a, left, row_step, rows, step, count, b, start * pitch + here, pitch, q - here)
                for k in range(rows):
                    add_line(out, (row + k) * out_pitch + here, sums[k], scale, q - here)


@compiled
def _add(like, at_job):
    """Items of the products of a job, one after the other, until none is left: other threads take some too."""
    job = pointer(at_job, int64(0))
    items, scale = job[1], pointer(job[3], float64(0))[0]
    width = 2 * lanes_of(like)
    item = next_of(at_job)
    at, before = 0, 0  # the product of the item, and how many items come before its
    while item < items:
        while True:
            product = pointer(job[2] + 8 * PRODUCT * at, int64(0))
            bands, groups = (product[8] + width - 1) // width, (product[9] + width - 1) // width
            count = groups * (groups + 1) // 2 if product[10] else bands * groups
            if item < before + count:
                break
            before += count
            at += 1
        inside = item - before
        if product[10]:
            group = 0
            while inside > group:
                inside -= group + 1
                group += 1
            _tile(like, scale, product, inside, group)
        else:
            _tile(like, scale, product, inside % bands, inside // bands)
        item = next_of(at_job)


@compiled
def _fill(like, at_job):
    """Images of a job, pixel after pixel with the channels together, zeros after each row and after the last one."""
    job = pointer(at_job, int64(0))
    items, count, channels, height, width = job[1], job[3], job[4], job[5], job[6]
    zero, line = constant(0.0, like), lanes_of(like)
    item = next_of(at_job)
    while item < items:
        grid, image = pointer(job[2] + 8 * GRID * (item // count), int64(0)), item % count
        target, source = pointer(grid[0], like), pointer(grid[1], like)
        channel_step, column_step, rows, columns = grid[3], grid[5], grid[6], grid[7]
        for y in range(height):
            at = (image * height + y) * width * channels
            filled = columns if y < rows else 0
            begin = image * grid[2] + y * grid[4]
            for c in range(channels):  # the row of the target stays in the cache; channels may lie a page apart
                ahead = begin + AHEAD * grid[4] + c * channel_step
                for x in range(0, filled * column_step, line):
                    prefetch(source, ahead + x)
                for x in range(filled):
                    target[at + x * channels + c] = source[begin + x * column_step + c * channel_step]
            for k in range(filled * channels, width * channels):
                target[at + k] = zero
        item = next_of(at_job)


# --- entry points ---------------------------------------------------------------------------------------------


@Entry
def add(sources, zero):
    @entry
    def add(at):
        if sources:
            _add(zero, words(at, 1)[0])

    return add


@Entry
def fill(sources, zero):
    @entry
    def fill(at):
        if sources:
            _fill(zero, words(at, 1)[0])

    return fill
