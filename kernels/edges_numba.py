"""Sums over the edges of a row inside numba, and the gradients of their weights: what sparse kernels have in common.

Values lie in rows of `pitch` numbers, a whole number of lines (lanes.py); an edge names the row it reads (`column`,
`child`) and the place of its weight (`index`; `ordered`: the e-th edge has the e-th weight). No bounds are checked.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

from numba import types

from irgrow.kernels.activations_numba import inline
from irgrow.kernels.lanes import (
    add,
    constant,
    lanes_of,
    load,
    multiply,
    multiply_add,
    splat,
    store,
    total,
    totals,
    transpose,
)


@inline
def gather(out, at, seed, onto, source, pitch, column, index, weights, ordered, start, stop, first, last):
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
def pull(out, at, onto, g, pitch, child, index, weights, start, stop, v, dw, first, last):
    """`gather` from child rows of g into out[at:], and dw[weight] += the sum over b of g[child, b] * v[at + b].

    The gradient of a weight needs the same row of g as its parent's gradient does, and is had with it.
    """
    line = lanes_of(weights[0])
    zero = splat(constant(0.0, weights[0]))
    b = first
    while b < last:
        left = last - b
        place = at + b
        if left >= 4 * line:
            a0, a1, a2, a3 = zero, zero, zero, zero
            if onto:
                a0, a1 = load(out, place), load(out, place + line)
                a2, a3 = load(out, place + 2 * line), load(out, place + 3 * line)
            y0, y1 = load(v, place), load(v, place + line)
            y2, y3 = load(v, place + 2 * line), load(v, place + 3 * line)
            e = start
            while e + 3 < stop:
                k = types.int64(child[e]) * pitch + b
                a0, a1, a2, a3, d0 = _pull_4(g, k, line, weights[index[e]], a0, a1, a2, a3, y0, y1, y2, y3)
                k = types.int64(child[e + 1]) * pitch + b
                a0, a1, a2, a3, d1 = _pull_4(g, k, line, weights[index[e + 1]], a0, a1, a2, a3, y0, y1, y2, y3)
                k = types.int64(child[e + 2]) * pitch + b
                a0, a1, a2, a3, d2 = _pull_4(g, k, line, weights[index[e + 2]], a0, a1, a2, a3, y0, y1, y2, y3)
                k = types.int64(child[e + 3]) * pitch + b
                a0, a1, a2, a3, d3 = _pull_4(g, k, line, weights[index[e + 3]], a0, a1, a2, a3, y0, y1, y2, y3)
                _add_totals(dw, index, e, d0, d1, d2, d3)
                e += 4
            while e < stop:
                k = types.int64(child[e]) * pitch + b
                a0, a1, a2, a3, d0 = _pull_4(g, k, line, weights[index[e]], a0, a1, a2, a3, y0, y1, y2, y3)
                dw[index[e]] += total(d0)
                e += 1
            store(out, place, a0)
            store(out, place + line, a1)
            store(out, place + 2 * line, a2)
            store(out, place + 3 * line, a3)
            b += 4 * line
        elif left >= 2 * line:
            a0, a1, a2, a3 = zero, zero, zero, zero
            if onto:
                a0, a1 = load(out, place), load(out, place + line)
            y0, y1 = load(v, place), load(v, place + line)
            e = start
            while e + 3 < stop:
                k = types.int64(child[e]) * pitch + b
                a0, a1, d0 = _pull_2(g, k, line, weights[index[e]], a0, a1, y0, y1)
                k = types.int64(child[e + 1]) * pitch + b
                a2, a3, d1 = _pull_2(g, k, line, weights[index[e + 1]], a2, a3, y0, y1)
                k = types.int64(child[e + 2]) * pitch + b
                a0, a1, d2 = _pull_2(g, k, line, weights[index[e + 2]], a0, a1, y0, y1)
                k = types.int64(child[e + 3]) * pitch + b
                a2, a3, d3 = _pull_2(g, k, line, weights[index[e + 3]], a2, a3, y0, y1)
                _add_totals(dw, index, e, d0, d1, d2, d3)
                e += 4
            while e < stop:
                k = types.int64(child[e]) * pitch + b
                a0, a1, d0 = _pull_2(g, k, line, weights[index[e]], a0, a1, y0, y1)
                dw[index[e]] += total(d0)
                e += 1
            store(out, place, add(a0, a2))
            store(out, place + line, add(a1, a3))
            b += 2 * line
        else:
            a0, a1, a2, a3 = zero, zero, zero, zero
            if onto:
                a0 = load(out, place)
            y0 = load(v, place)
            e = start
            while e + 3 < stop:
                a0, d0 = _pull_1(g, types.int64(child[e]) * pitch + b, weights[index[e]], a0, y0)
                a1, d1 = _pull_1(g, types.int64(child[e + 1]) * pitch + b, weights[index[e + 1]], a1, y0)
                a2, d2 = _pull_1(g, types.int64(child[e + 2]) * pitch + b, weights[index[e + 2]], a2, y0)
                a3, d3 = _pull_1(g, types.int64(child[e + 3]) * pitch + b, weights[index[e + 3]], a3, y0)
                _add_totals(dw, index, e, d0, d1, d2, d3)
                e += 4
            while e < stop:
                a0, d0 = _pull_1(g, types.int64(child[e]) * pitch + b, weights[index[e]], a0, y0)
                dw[index[e]] += total(d0)
                e += 1
            store(out, place, add(add(a0, a1), add(a2, a3)))
            b += line


@inline
def _pull_1(g, k, weight, a0, y0):
    g0 = load(g, k)
    return multiply_add(splat(weight), g0, a0), multiply(g0, y0)


@inline
def _pull_2(g, k, line, weight, a0, a1, y0, y1):
    w, g0, g1 = splat(weight), load(g, k), load(g, k + line)
    dot = multiply_add(g1, y1, multiply(g0, y0))
    return multiply_add(w, g0, a0), multiply_add(w, g1, a1), dot


@inline
def _pull_4(g, k, line, weight, a0, a1, a2, a3, y0, y1, y2, y3):
    w, g0, g1 = splat(weight), load(g, k), load(g, k + line)
    g2, g3 = load(g, k + 2 * line), load(g, k + 3 * line)
    dot = multiply_add(g1, y1, multiply(g0, y0))
    dot = multiply_add(g3, y3, multiply_add(g2, y2, dot))
    a0, a1 = multiply_add(w, g0, a0), multiply_add(w, g1, a1)
    return a0, a1, multiply_add(w, g2, a2), multiply_add(w, g3, a3), dot


@inline
def _add_totals(dw, index, e, d0, d1, d2, d3):
    """The gradients of four weights, which may be the same one."""
    s0, s1, s2, s3 = totals(d0, d1, d2, d3)
    dw[index[e]] += s0
    dw[index[e + 1]] += s1
    dw[index[e + 2]] += s2
    dw[index[e + 3]] += s3


@inline
def pull_one(seed, g, child, index, weights, start, stop, y, dw):
    """`pull` for batch 1: the gradient of a value, d/d weights added to dw."""
    a0 = seed
    a1 = constant(0.0, seed)
    e = start
    while e + 1 < stop:
        g0, g1 = g[child[e]], g[child[e + 1]]
        a0 += weights[index[e]] * g0
        a1 += weights[index[e + 1]] * g1
        dw[index[e]] += g0 * y
        dw[index[e + 1]] += g1 * y
        e += 2
    if e < stop:
        a0 += weights[index[e]] * g[child[e]]
        dw[index[e]] += g[child[e]] * y
    return a0 + a1


@inline
def gather_one(seed, source, column, index, weights, ordered, start, stop):
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


# --- samples that lie the other way ---------------------------------------------------------------------------


@inline
def turn(target, at, pitch, source, start, stride, rows, samples):
    """target[at + r * pitch + b] = source[start + b * stride + r]: rows of samples from samples of rows, or back."""
    line = lanes_of(source[0])
    whole_rows, whole_samples = rows - rows % line, samples - samples % line
    for r in range(0, whole_rows, line):
        for b in range(0, whole_samples, line):
            transpose(target, at + r * pitch + b, pitch, source, start + b * stride + r, stride)
    for r in range(rows):
        for b in range(whole_samples if r < whole_rows else 0, samples):
            target[at + r * pitch + b] = source[start + b * stride + r]
