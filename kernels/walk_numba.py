"""The walk on a CPU, compiled by numba: forward, and one reverse sweep for all gradients.

Values lie as `buffer` [value rows, pitch], the batch contiguous, the pitch a whole number of lines (see lanes.py)
so that no loop has a ragged end; lanes beyond the batch are kept 0. Batch 1 has loops of its own and pitch 1.
Tensors arrive as addresses: unpacking an array costs more than walking a small network.

The batch is cut into slices of columns, which are independent: one call walks one slice, and several may run at
once. Sums over the batch (gradients of weights and biases) are per slice; the caller adds them.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import sys

from numba import int32, int64, types

from irgrow.kernels import activations_numba, edges_numba, lanes
from irgrow.kernels.activations_numba import (
    activate,
    activate_one,
    chain,
    chain_one,
    compiled,
    inline,
    slope_one,
    store_slopes,
)
from irgrow.kernels.edges_numba import gather, gather_one, pull, pull_one, turn
from irgrow.kernels.entry import Entry, entry, fingerprint, next_of, next_piece, phase_done, piece_done, piece_of, words
from irgrow.kernels.lanes import (
    add,
    constant,
    lanes_of,
    load,
    pointer,
    prefetch,
    splat,
    total,
)
from irgrow.kernels.walk_plan import HEADER, MAX, SUM, Header

INPUTS, NEURONS, EDGES, SUMMED = map(int, (Header.INPUTS, Header.NEURONS, Header.EDGES, Header.SUMMED))
MAXIMA, IN_ORDER, LEVELS = int(Header.MAXIMA), int(Header.IN_ORDER), int(Header.LEVELS)

SOURCES = fingerprint(activations_numba, edges_numba, lanes, sys.modules[__name__])


# --- maxima ---------------------------------------------------------------------------------------------------


@inline
def _exceeds(x, best):
    """x takes over from an earlier `best`: ties stay with the first, and so does NaN."""
    return (x > best or x != x) and best == best


@compiled
def _largest(v, at, seed, onto, pitch, column, index, weights, start, stop, first, last):
    """v[at + b] = seed (+ v[at + b]) + the largest weight * v[column, b]; there is at least one edge."""
    for b in range(first, last):
        best = weights[index[start]] * v[types.int64(column[start]) * pitch + b]
        for e in range(start + 1, stop):
            x = weights[index[e]] * v[types.int64(column[e]) * pitch + b]
            best = x if _exceeds(x, best) else best
        v[at + b] = best + seed + (v[at + b] if onto else constant(0.0, seed))


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


@inline
def _row_tables(structure):
    """(inputs, neurons, edges, and addresses of: pointer, the four row fields, column)."""
    s = pointer(structure, int32(0))
    neurons = types.int64(s[NEURONS])
    rows = structure + 4 * HEADER
    fields = rows + 4 * (neurons + 1)
    return types.int64(s[INPUTS]), neurons, types.int64(s[EDGES]), rows, fields, fields + 16 * neurons


@compiled
def _forward(like, operands):
    """Rows of `buffer` are filled, columns first..last (a whole number of lines; the real ones end at `batch`).

    `weights` is the address of all weights; or, where `part_of` names a part for every row, of a table of addresses,
    each of which the indices of the weights count from. `slopes` (0: not wanted) receives sigma'(z) of the rows that
    store it, with the same pitch. `out` [B, count] receives the values of the computed rows `picked`.
    """
    structure, buffer, pitch, inputs, inputs_pitch, inputs_step, weights, part_of, biases = operands[:9]
    offset, offset_pitch, slopes, picked, count, out, batch, first, last, pieces, progress = operands[9:]
    n_in, neurons, edges, rows, fields_at, column_at = _row_tables(structure)
    ordered = pointer(structure, int32(0))[IN_ORDER] == 1
    row_pointer, fields = pointer(rows, int32(0)), pointer(fields_at, int32(0))
    column, index = pointer(column_at, int32(0)), pointer(column_at + 4 * edges, int32(0))
    v, x, w = pointer(buffer, like), pointer(inputs, like), pointer(weights, like)
    part, table = pointer(part_of, int32(0)), pointer(weights, int64(0))
    bias, extra, kept = pointer(biases, like), pointer(offset, like), pointer(slopes, like)
    zero = constant(0.0, like)
    real = min(last, batch)  # where padding begins

    piece = next_piece(progress, 0, -1)
    while piece < pieces:
        begin, end = piece_of(0, n_in, piece, pieces)
        if inputs_pitch == 1 and inputs_step != 1:
            at = first * inputs_step + begin
            turn(v, begin * pitch + first, pitch, x, at, inputs_step, end - begin, real - first)
        else:
            for r in range(begin, end):
                for b in range(first, real):
                    v[r * pitch + b] = x[r * inputs_pitch + b * inputs_step]
        for r in range(begin, end):
            for b in range(real, last):
                v[r * pitch + b] = zero
        piece_done(progress, 0)
        piece = next_piece(progress, 0, piece)
    phase_done(progress, 0, pieces)

    level_pointer = pointer(_level_table(structure), int32(0))
    levels = types.int64(pointer(structure, int32(0))[LEVELS]) if progress != 0 else 1  # alone: all rows in one go
    for level in range(levels):
        low, high = types.int64(0), neurons
        if progress != 0:
            low, high = types.int64(level_pointer[level]), types.int64(level_pointer[level + 1])
        piece = next_piece(progress, level + 1, -1)
        while piece < pieces:
            begin, end = piece_of(low, high, piece, pieces)
            for r in range(begin, end):
                start, stop = types.int64(row_pointer[r]), types.int64(row_pointer[r + 1])
                code, place = fields[r], fields[r + 2 * neurons]
                if part_of != 0:
                    w = pointer(table[part[r]], like)
                seed = bias[place] if place >= 0 else zero
                at = (n_in + r) * pitch
                if offset != 0:
                    for b in range(first, real):
                        v[at + b] = extra[r * offset_pitch + b]
                    for b in range(real, last):
                        v[at + b] = zero
                if fields[r + neurons] == SUM:
                    gather(v, at, seed, offset != 0, v, pitch, column, index, w, ordered, start, stop, first, last)
                else:
                    _largest(v, at, seed, offset != 0, pitch, column, index, w, start, stop, first, last)
                if slopes != 0 and fields[r + 3 * neurons] >= 0:
                    store_slopes(code, v, at + first, at + last, kept, fields[r + 3 * neurons] * pitch + first)
                activate(code, v, at + first, at + last)
                for b in range(real, last):
                    v[at + b] = zero
            piece_done(progress, level + 1)
            piece = next_piece(progress, level + 1, piece)
        phase_done(progress, level + 1, pieces)

    chosen, y = pointer(picked, int32(0)), pointer(out, like)
    piece = next_piece(progress, levels + 1, -1)
    while piece < pieces:
        begin, end = piece_of(0, count, piece, pieces)
        for block in range(begin, end, 16):
            for b in range(first, real):
                for k in range(block, min(block + 16, end)):
                    y[b * count + chosen[count + k]] = v[(n_in + chosen[k]) * pitch + b]
        piece = next_piece(progress, levels + 1, piece)


@compiled
def _forward_one(like, operands):
    """`_forward` for batch 1."""
    structure, buffer, _pitch, inputs, inputs_pitch, _inputs_step, weights, part_of, biases = operands[:9]
    offset, offset_pitch, slopes, picked, count, out = operands[9:15]
    n_in, neurons, edges, rows, fields_at, column_at = _row_tables(structure)
    ordered = pointer(structure, int32(0))[IN_ORDER] == 1
    row_pointer, fields = pointer(rows, int32(0)), pointer(fields_at, int32(0))
    column, index = pointer(column_at, int32(0)), pointer(column_at + 4 * edges, int32(0))
    v, x, w = pointer(buffer, like), pointer(inputs, like), pointer(weights, like)
    part, table = pointer(part_of, int32(0)), pointer(weights, int64(0))
    bias, extra, kept = pointer(biases, like), pointer(offset, like), pointer(slopes, like)

    for r in range(n_in):
        v[r] = x[r * inputs_pitch]
    for r in range(neurons):
        start, stop = types.int64(row_pointer[r]), types.int64(row_pointer[r + 1])
        place = fields[r + 2 * neurons]
        if part_of != 0:
            w = pointer(table[part[r]], like)
        z = bias[place] if place >= 0 else constant(0.0, like)
        if offset != 0:
            z += extra[r * offset_pitch]
        if fields[r + neurons] == SUM:
            z = gather_one(z, v, column, index, w, ordered, start, stop)
        else:
            _largest(v, n_in + r, z, False, 1, column, index, w, start, stop, 0, 1)
            z = v[n_in + r]
        if slopes != 0 and fields[r + 3 * neurons] >= 0:
            kept[fields[r + 3 * neurons]] = slope_one(fields[r], z)
        v[n_in + r] = activate_one(fields[r], z)

    chosen, y = pointer(picked, int32(0)), pointer(out, like)
    for k in range(count):
        y[chosen[count + k]] = v[n_in + chosen[k]]


# --- backward -------------------------------------------------------------------------------------------------


@inline
def _child_tables(structure):
    """Addresses of child_pointer, child, child_weight."""
    n_in, neurons, edges, _rows, _fields, column_at = _row_tables(structure)
    children = column_at + 8 * edges
    child = children + 4 * (n_in + neurons + 1)
    return children, child, child + 4 * types.int64(pointer(structure, int32(0))[SUMMED])


@inline
def _level_table(structure):
    """Address of level_pointer."""
    _children, _child, child_index = _child_tables(structure)
    return child_index + 4 * types.int64(pointer(structure, int32(0))[SUMMED])


@compiled
def _backward(like, operands):
    """Rows of `gradient` [value rows, pitch] become d/dz of computed rows and, if `every_row`, d/dx of input rows.

    Gradients of weights come with those of the rows their edges leave: wanting them implies `every_row`.
    incoming [neurons, B] is the gradient of the computed values; or [count, B], anyhow strided, that of the computed
    rows `picked`, the others having none (count -1: all of them, in order). `d_weights` and `d_biases` (0: not wanted)
    are added to, in the first panel after their first `clear_...` entries have been set to 0 (see `backward`).
    `d_inputs` [B, inputs] and `d_offset` [neurons, samples] (0: not wanted) receive their part of `gradient`.
    """
    structure, buffer, pitch, weights, slopes, incoming, incoming_pitch, incoming_step, count, picked = operands[:10]
    gradient, d_weights, d_biases, clear_weights, clear_biases, every_row = operands[10:16]
    d_inputs, d_offset, samples, batch, first, last, pieces, progress = operands[16:]
    n_in, neurons, edges, rows_at, fields_at, column_at = _row_tables(structure)
    has_max = pointer(structure, int32(0))[MAXIMA] > 0
    row_pointer, fields = pointer(rows_at, int32(0)), pointer(fields_at, int32(0))
    column, index = pointer(column_at, int32(0)), pointer(column_at + 4 * edges, int32(0))
    children_at, child_at, child_index_at = _child_tables(structure)
    child_pointer, child = pointer(children_at, int32(0)), pointer(child_at, int32(0))
    child_index = pointer(child_index_at, int32(0))
    v, w, kept = pointer(buffer, like), pointer(weights, like), pointer(slopes, like)
    dy, g = pointer(incoming, like), pointer(gradient, like)
    dw, db = pointer(d_weights, like), pointer(d_biases, like)
    real = min(last, batch)
    zero = constant(0.0, like)
    line = lanes_of(like)
    distance = max(
        1, 16 * line // max(1, last - first)
    )  # rows to fetch ahead: descending rows are not fetched by themselves
    rows = n_in + neurons
    lowest = 0 if every_row else n_in

    if has_max:  # their gradients are sent to their parents before the sweep comes to those
        for row in range(lowest, rows):
            for b in range(first, last):
                g[row * pitch + b] = zero
    chosen = pointer(picked, int32(0))
    piece = next_piece(progress, 0, -1)
    while piece < pieces:
        begin, end = piece_of(0, clear_weights, piece, pieces)
        for k in range(begin, end):
            dw[k] = zero
        begin, end = piece_of(0, clear_biases, piece, pieces)
        for k in range(begin, end):
            db[k] = zero
        begin, end = piece_of(0, max(0, count), piece, pieces)
        for block in range(begin, end, 16):
            for b in range(first, real):
                for k in range(block, min(block + 16, end)):
                    place = chosen[count + k]
                    g[(n_in + chosen[k]) * pitch + b] = dy[place * incoming_pitch + b * incoming_step]
            for k in range(block, min(block + 16, end)):
                for b in range(real, last):
                    g[(n_in + chosen[k]) * pitch + b] = zero
        piece_done(progress, 0)
        piece = next_piece(progress, 0, piece)
    phase_done(progress, 0, pieces)

    # In phases, levels one after the other, the last first; the inputs, which have none, at the end.
    level_pointer = pointer(_level_table(structure), int32(0))
    levels = types.int64(pointer(structure, int32(0))[LEVELS]) if progress != 0 else 0
    for step in range(levels + 1):
        low, high = lowest, rows
        if step < levels:
            low, high = n_in + level_pointer[levels - 1 - step], n_in + level_pointer[levels - step]
        elif progress != 0:
            high = n_in
        piece = next_piece(progress, step + 1, -1)
        while piece < pieces:
            begin, end = piece_of(low, max(low, high), piece, pieces)
            next_chosen = count - 1
            while next_chosen >= 0 and n_in + chosen[next_chosen] >= end:
                next_chosen -= 1
            for row in range(end - 1, begin - 1, -1):
                k = rows - 1 - row
                r = row - n_in
                begun = has_max  # whether row holds a part of its gradient already
                if next_chosen >= 0 and chosen[next_chosen] == r:
                    begun, next_chosen = True, next_chosen - 1
                start, stop = types.int64(child_pointer[k]), types.int64(child_pointer[k + 1])
                at = row * pitch
                ahead = at - distance * pitch
                for b in range(first, last, line):
                    prefetch(v, ahead + b)
                    prefetch(g, ahead + b)
                    if count < 0:
                        prefetch(dy, (r - distance) * incoming_pitch + b)
                if d_weights != 0:
                    pull(g, at, begun, g, pitch, child, child_index, w, start, stop, v, dw, first, last)
                else:
                    gather(g, at, zero, begun, g, pitch, child, child_index, w, False, start, stop, first, last)
                if r < 0:
                    continue
                if count < 0:
                    for b in range(first, real):
                        g[at + b] += dy[r * incoming_pitch + b]
                slope = types.int64(fields[r + 3 * neurons])
                if slope >= 0:
                    for b in range(first, last):
                        g[at + b] *= kept[slope * pitch + b]
                else:
                    chain(fields[r], g, v, at + first, at + last)
                for b in range(real, last):
                    g[at + b] = zero
                if d_biases != 0 and fields[r + 2 * neurons] >= 0:
                    sums = splat(zero)
                    for b in range(first, last, line):
                        sums = add(sums, load(g, at + b))
                    db[fields[r + 2 * neurons]] += total(sums)
                if fields[r + neurons] == MAX:
                    start, stop = types.int64(row_pointer[r]), types.int64(row_pointer[r + 1])
                    _send_to_largest(
                        g, row, v, pitch, column, index, w, dw, d_weights != 0, lowest, start, stop, first, real
                    )
            piece_done(progress, step + 1)
            piece = next_piece(progress, step + 1, piece)
        phase_done(progress, step + 1, pieces)

    dx, dz = pointer(d_inputs, like), pointer(d_offset, like)
    piece = next_piece(progress, levels + 2, -1)
    while piece < pieces and (d_inputs != 0 or d_offset != 0):
        if d_inputs != 0:
            begin, end = piece_of(0, n_in, piece, pieces)
            turn(dx, first * n_in + begin, n_in, g, begin * pitch + first, pitch, real - first, end - begin)
        if d_offset != 0:
            begin, end = piece_of(0, neurons, piece, pieces)
            for r in range(begin, end):
                for b in range(first, real):
                    dz[r * samples + b] = g[(n_in + r) * pitch + b]
        piece = next_piece(progress, levels + 2, piece)


@compiled
def _backward_one(like, operands):
    """`_backward` for batch 1."""
    structure, buffer, _pitch, weights, slopes, incoming, incoming_pitch, _step, count, picked = operands[:10]
    gradient, d_weights, d_biases, clear_weights, clear_biases, every_row = operands[10:16]
    d_inputs, d_offset, samples = operands[16:19]
    n_in, neurons, edges, rows_at, fields_at, column_at = _row_tables(structure)
    has_max = pointer(structure, int32(0))[MAXIMA] > 0
    row_pointer, fields = pointer(rows_at, int32(0)), pointer(fields_at, int32(0))
    column, index = pointer(column_at, int32(0)), pointer(column_at + 4 * edges, int32(0))
    children_at, child_at, child_index_at = _child_tables(structure)
    child_pointer, child = pointer(children_at, int32(0)), pointer(child_at, int32(0))
    child_index = pointer(child_index_at, int32(0))
    v, w, kept = pointer(buffer, like), pointer(weights, like), pointer(slopes, like)
    dy, g = pointer(incoming, like), pointer(gradient, like)
    dw, db = pointer(d_weights, like), pointer(d_biases, like)
    rows = n_in + neurons
    lowest = 0 if every_row else n_in

    for k in range(clear_weights):
        dw[k] = constant(0.0, like)
    for k in range(clear_biases):
        db[k] = constant(0.0, like)
    if has_max:
        for row in range(lowest, rows):
            g[row] = constant(0.0, like)

    chosen, next_chosen = pointer(picked, int32(0)), count - 1
    for k in range(rows - lowest):
        row = rows - 1 - k
        r = row - n_in
        start, stop = types.int64(child_pointer[k]), types.int64(child_pointer[k + 1])
        dz = g[row] if has_max else constant(0.0, like)
        if d_weights != 0:
            dz = pull_one(dz, g, child, child_index, w, start, stop, v[row], dw)
        else:
            dz = gather_one(dz, g, child, child_index, w, False, start, stop)
        if next_chosen >= 0 and chosen[next_chosen] == r:
            dz += dy[chosen[count + next_chosen] * incoming_pitch]
            next_chosen -= 1
        if r >= 0:
            if count < 0:
                dz += dy[r * incoming_pitch]
            slope = fields[r + 3 * neurons]
            dz = dz * kept[slope] if slope >= 0 else chain_one(fields[r], dz, v[row])
            if d_biases != 0 and fields[r + 2 * neurons] >= 0:
                db[fields[r + 2 * neurons]] += dz
        g[row] = dz
        if r >= 0 and fields[r + neurons] == MAX:
            start, stop = types.int64(row_pointer[r]), types.int64(row_pointer[r + 1])
            _send_to_largest(g, row, v, 1, column, index, w, dw, d_weights != 0, lowest, start, stop, 0, 1)

    if d_inputs != 0:
        dx = pointer(d_inputs, like)
        for r in range(n_in):
            dx[r] = g[r]
    if d_offset != 0:
        ds = pointer(d_offset, like)
        for r in range(neurons):
            ds[r * samples] = g[n_in + r]


# --- entry points ---------------------------------------------------------------------------------------------


@Entry
def forward(sources, zero):
    @entry
    def forward(at):
        if sources:
            operands = words(at, 20)
            if operands[2] == 1:
                _forward_one(zero, operands)
            else:
                _forward(zero, operands)

    return forward


@Entry
def backward(sources, zero):
    @entry
    def backward(at):
        if sources:
            operands = words(at, 24)
            if operands[2] == 1:
                _backward_one(zero, operands)
            else:
                _backward(zero, operands)

    return backward


@Entry
def put_together(sources, zero):
    """The vectors whose (address, length) stand in a table are copied to `target`, one after the other: a job."""

    @entry
    def put_together(at):
        if sources:
            job = words(at, 1)[0]
            _counter, target, table, parts = words(job, 4)
            out, entries = pointer(target, zero), pointer(table, int64(0))
            k = next_of(job)
            while k < parts:
                place = 0
                for before in range(k):
                    place += entries[2 * before + 1]
                part = pointer(entries[2 * k], zero)
                for i in range(entries[2 * k + 1]):
                    out[place + i] = part[i]
                k = next_of(job)

    return put_together


@Entry
def add_onto(sources, zero):
    """A vector is added to another."""

    @entry
    def add_onto(at):
        if sources:
            target, other, count = words(at, 3)
            a, b = pointer(target, zero), pointer(other, zero)
            for k in range(count):
                a[k] += b[k]

    return add_onto
