"""Triangular systems on a CPU, compiled by numba: every thread solves for columns of its own, float64.

Eight rows at a time are solved for two lines of columns: what the rows before contribute is a register tile (tiles.py),
the eight rows among themselves come after it. Columns do not depend on each other, so threads never wait.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys

from numba import int64

from irgrow.kernels import lanes, tiles
from irgrow.kernels.activations_numba import compiled
from irgrow.kernels.entry import Entry, entry, fingerprint, next_of, words
from irgrow.kernels.lanes import LINE_BYTES, load, multiply, multiply_add, pointer, splat, store
from irgrow.kernels.tiles import ROWS, grow_two, sum_two

SOURCES = fingerprint(lanes, tiles, sys.modules[__name__])
LINE = LINE_BYTES // 8
COLUMNS = 2 * LINE  # of an item


@compiled
def _rows(factor, row_step, step, x, pitch, column, first, last, count, known):
    """x[first..last - 1] of two lines of columns, from `count` rows of x that are known, from row `known` on."""
    rows = last - first
    at, start = first * row_step + known * step, known * pitch + column
    if rows == ROWS:
        zero = splat(0.0)
        # fmt: off
        sums = (zero, zero, zero, zero, zero, zero, zero, zero,
                zero, zero, zero, zero, zero, zero, zero, zero)
        # fmt: on
        sums = grow_two(sums, factor, at, row_step, step, count, x, start, pitch)
    else:
        sums = sum_two(0.0, factor, at, row_step, rows, step, count, x, start, pitch, COLUMNS)
    for n in range(rows):
        k = rows - 1 - n if known > first else n
        row = first + k
        here, minus = row * pitch + column, splat(-1.0)
        low = multiply_add(minus, sums[2 * k], load(x, here))
        high = multiply_add(minus, sums[2 * k + 1], load(x, here + LINE))
        begin, end = (k + 1, rows) if known > first else (0, k)
        for j in range(begin, end):
            weight, there = splat(-factor[row * row_step + (first + j) * step]), (first + j) * pitch + column
            low, high = multiply_add(weight, load(x, there), low), multiply_add(weight, load(x, there + LINE), high)
        pivot = splat(1.0 / factor[row * row_step + row * step])
        store(x, here, multiply(low, pivot))
        store(x, here + LINE, multiply(high, pivot))


@compiled
def _substitute(at_job):
    """Rows first..last - 1 of x solve F x = what stood there, for groups of COLUMNS columns from `begin` on.

    The job: factor, its pitches along rows and columns; x, its pitch; first, last, begin; 0 for a lower triangular
    factor, its size for an upper one, whose rows are solved from the last one on. What is on the other side of the
    diagonal is never read. x has whole lines for all columns of its groups.
    """
    job = pointer(at_job, int64(0))
    items, factor, x = job[1], pointer(job[2], 0.0), pointer(job[5], 0.0)
    row_step, step, pitch, first, last, begin, size = job[3], job[4], job[6], job[7], job[8], job[9], job[10]
    item = next_of(at_job)
    while item < items:
        column = begin + item * COLUMNS
        if size == 0:
            for row in range(first, last, ROWS):
                _rows(factor, row_step, step, x, pitch, column, row, min(row + ROWS, last), row, 0)
        else:
            end = last
            while end > first:
                row = max(first, end - ROWS)
                _rows(factor, row_step, step, x, pitch, column, row, end, size - end, end)
                end = row
        item = next_of(at_job)


@Entry
def substitute(sources, _zero):
    @entry
    def substitute(at):
        if sources:
            _substitute(words(at, 1)[0])

    return substitute
