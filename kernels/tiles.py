"""Register tiles inside numba: products of a few rows and a few lines, held in registers along the whole sum.

Written as LLVM loops, because no automatic vectoriser keeps sixteen lines of sums in registers. As in lanes.py no
bounds are checked.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from irgrow.kernels import lanes
from irgrow.kernels.lanes import LanesType

ROWS = 8  # of a tile: with two lines, 16 sums and little to load
_I64 = ir.IntType(64)


def _tile(lines: int) -> Any:
    """sums[r, l] + sum over k of a[at + r row + k step] * x[start + k pitch + line l], for ROWS rows."""

    @intrinsic
    def grown(_typing, sums, a, at, row, step, count, x, start, pitch):
        vector = lanes._vector(x.dtype)

        def generate(context, builder, signature, arguments):
            sums, a, at, row, step, count, x, start, pitch = arguments
            held = [cgutils.alloca_once_value(builder, builder.extract_value(sums, k)) for k in range(ROWS * lines)]
            with cgutils.for_range(builder, count) as loop:
                base = builder.add(start, builder.mul(loop.index, pitch))
                values = [_line(builder, x, builder.add(base, _I64(l * vector.count)), vector) for l in range(lines)]
                first = builder.add(at, builder.mul(loop.index, step))
                for r in range(ROWS):
                    weight = builder.load(builder.gep(a, [builder.add(first, builder.mul(row, _I64(r)))]))
                    weight = _spread(builder, weight, vector)
                    for l, value in enumerate(values):
                        _fuse(builder, held[r * lines + l], weight, value)
            return context.make_tuple(builder, signature.return_type, [builder.load(place) for place in held])

        return sums(sums, a, types.int64, types.int64, types.int64, types.int64, x, types.int64, types.int64), generate

    return grown


def _masked_tile(lines: int) -> Any:
    """ROWS rows of `lines` lines: sums over k of a[at + min(r, rows - 1) row + k step] * x[start + k pitch + column].

    Rows after `rows` repeat the last one and columns from `columns` on are read as zeros: no address is used that
    does not belong to the operands.
    """

    @intrinsic
    def summed(_typing, like, a, at, row, rows, step, count, x, start, pitch, columns):
        vector = lanes._vector(x.dtype)
        result = types.UniTuple(LanesType(x.dtype), ROWS * lines)

        def generate(context, builder, signature, arguments):
            _, a, at, row, rows, step, count, x, start, pitch, columns = arguments
            zero = ir.Constant(vector, [0.0] * vector.count)
            held = [cgutils.alloca_once_value(builder, zero) for _ in range(ROWS * lines)]
            last = builder.sub(rows, _I64(1))
            firsts = []
            for r in range(ROWS):
                inside = builder.select(builder.icmp_signed("<", _I64(r), last), _I64(r), last)
                firsts.append(builder.add(at, builder.mul(row, inside)))
            masks = [_before(builder, builder.sub(columns, _I64(l * vector.count)), vector) for l in range(lines)]
            with cgutils.for_range(builder, count) as loop:
                base = builder.add(start, builder.mul(loop.index, pitch))
                values = [
                    _masked_line(builder, x, builder.add(base, _I64(l * vector.count)), mask, zero)
                    for l, mask in enumerate(masks)
                ]
                along = builder.mul(loop.index, step)
                for r, first in enumerate(firsts):
                    weight = builder.load(builder.gep(a, [builder.add(first, along)]))
                    weight = _spread(builder, weight, vector)
                    for l, value in enumerate(values):
                        _fuse(builder, held[r * lines + l], weight, value)
            return context.make_tuple(builder, result, [builder.load(place) for place in held])

        number = types.int64
        return (
            result(like, a, number, number, number, number, number, x, number, number, number),
            generate,
        )

    return summed


sum_one, sum_two = _masked_tile(1), _masked_tile(2)


def _before(builder, count, vector):
    """The lanes whose number is below `count`."""
    wide = ir.VectorType(_I64, vector.count)
    numbers = ir.Constant(wide, list(range(vector.count)))
    return builder.icmp_signed("<", numbers, _spread(builder, count, wide))


def _masked_line(builder, source, at, mask, zero):
    place = builder.bitcast(builder.gep(source, [at]), zero.type.as_pointer())
    single = zero.type.count == 16
    name = f"llvm.masked.load.{'v16f32' if single else 'v8f64'}.p0"
    kind = ir.FunctionType(zero.type, [place.type, ir.IntType(32), mask.type, zero.type])
    load = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(load, [place, ir.IntType(32)(4 if single else 8), mask, zero])


@intrinsic
def dots(_typing, like, a, at, a_pitch, b, start, b_pitch, count):
    """16 lines of partial sums over `count` lines: a[at + r a_pitch + l] * b[start + c b_pitch + l], r, c in 0..3."""
    result = types.UniTuple(LanesType(like), 16)
    vector = lanes._vector(like)

    def generate(context, builder, signature, arguments):
        _, a, at, a_pitch, b, start, b_pitch, count = arguments
        zero = ir.Constant(vector, [0.0] * vector.count)
        held = [cgutils.alloca_once_value(builder, zero) for _ in range(16)]
        with cgutils.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, _I64(vector.count))

            def four(source, first, pitch):
                places = [builder.add(builder.add(first, offset), builder.mul(pitch, _I64(r))) for r in range(4)]
                return [_line(builder, source, place, vector) for place in places]

            right = four(b, start, b_pitch)
            for r, left in enumerate(four(a, at, a_pitch)):
                for c in range(4):
                    _fuse(builder, held[4 * r + c], left, right[c])
        return context.make_tuple(builder, result, [builder.load(place) for place in held])

    return result(like, a, types.int64, types.int64, b, types.int64, types.int64, types.int64), generate


def _line(builder, source, at, vector):
    place = builder.bitcast(builder.gep(source, [at]), vector.as_pointer())
    return builder.load(place, align=4 if vector.count == 16 else 8)


def _spread(builder, number, vector):
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes._places([0] * vector.count))


def _fuse(builder, place, a, b):
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)


grow_one, grow_two = _tile(1), _tile(2)


@intrinsic
def add_line(_typing, out, at, line, scale, count):
    """out[at + l] += scale * line[l] for l < count, added in the precision of `out` (that of `scale`)."""
    vector, wide = lanes._vector(line.real), lanes._vector(line.real).count

    def generate(context, builder, signature, arguments):
        out, at, line, scale, count = arguments
        target = context.get_value_type(signature.args[0].dtype)
        if line.type.element != target:
            line = builder.fpext(line, ir.VectorType(target, vector.count))
        whole = ir.VectorType(target, vector.count)

        with builder.if_else(builder.icmp_signed(">=", count, _I64(wide))) as (full, part):
            with full:
                place = builder.bitcast(builder.gep(out, [at]), whole.as_pointer())
                align = 8 if isinstance(target, ir.DoubleType) else 4
                product = builder.fmul(line, _spread(builder, scale, whole), flags=("contract",))
                total = builder.fadd(builder.load(place, align=align), product, flags=("contract",))
                builder.store(total, place, align=align)
            with part, cgutils.for_range(builder, count) as loop:
                place = builder.gep(out, [builder.add(at, loop.index)])
                product = builder.fmul(builder.extract_element(line, loop.index), scale, flags=("contract",))
                builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)
        return context.get_dummy_value()

    return types.void(out, types.int64, line, out.dtype, types.int64), generate
