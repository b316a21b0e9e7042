"""Inside numba: raw pointers, vectors of one cache line, and the few operations that plain loops lack.

`Lanes` is a vector of 64 bytes (16 float32 or 8 float64). Held in local variables it stays in registers across a
loop over edges, which no automatic vectoriser arranges. LLVM lowers it to whatever the machine has (one AVX-512
register, two AVX, four SSE or NEON). No bounds are checked here: callers validate their indices first.

Functions written with these are generic over the floating type: constants come from `constant` and `horner`,
never as bare literals, which numba would compute in float64.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LINE_BYTES = 64
_I32 = ir.IntType(32)


class LanesType(types.Type):
    """The numba type of a vector of one cache line of `real`s."""

    def __init__(self, real: types.Float) -> None:
        self.real = real
        super().__init__(f"Lanes({real})")


def _vector(real: types.Float) -> ir.VectorType:
    element = ir.FloatType() if real == types.float32 else ir.DoubleType()
    return ir.VectorType(element, LINE_BYTES * 8 // real.bitwidth)


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        super().__init__(manager, lanes, _vector(lanes.real))


# --- pointers -------------------------------------------------------------------------------------------------


@intrinsic
def pointer(_typing, address, like):
    """The integer `address` as an array of the type of `like`; index it as p[i]. Null is allowed until read."""
    result = types.CPointer(like)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, like), generate


@intrinsic
def lanes_of(_typing, like):
    """How many values of the type of `like` fit a line: 16 or 8, known when compiling."""
    count = LINE_BYTES * 8 // like.bitwidth

    def generate(context, builder, signature, arguments):
        return context.get_constant(types.int64, count)

    return types.int64(like), generate


# --- vectors --------------------------------------------------------------------------------------------------


@intrinsic
def load(_typing, source, at):
    """The line of values source[at], source[at + 1], ... (any alignment)."""
    result = LanesType(source.dtype)

    def generate(context, builder, signature, arguments):
        place = builder.gep(arguments[0], [arguments[1]])
        place = builder.bitcast(place, _vector(result.real).as_pointer())
        return builder.load(place, align=result.real.bitwidth // 8)

    return result(source, types.int64), generate


@intrinsic
def store(_typing, target, at, lanes):
    """target[at], target[at + 1], ... become the line."""

    def generate(context, builder, signature, arguments):
        place = builder.gep(arguments[0], [arguments[1]])
        place = builder.bitcast(place, _vector(lanes.real).as_pointer())
        builder.store(arguments[2], place, align=lanes.real.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, types.int64, lanes), generate


@intrinsic
def transpose(_typing, target, at, pitch, source, start, stride):
    """target[at + r pitch + b] = source[start + b stride + r] for r and b below a line: a square, in registers."""
    vector = _vector(source.dtype)
    count = vector.count

    def generate(context, builder, signature, arguments):
        target, at, pitch, source, start, stride = arguments

        def line(pointer, first, step, k):
            place = builder.gep(pointer, [builder.add(first, builder.mul(step, ir.IntType(64)(k)))])
            return builder.bitcast(place, vector.as_pointer())

        align = signature.args[0].dtype.bitwidth // 8
        lines = [builder.load(line(source, start, stride, k), align=align) for k in range(count)]
        swap = count // 2
        while swap:  # squares of this size are exchanged across the diagonal
            low = [k if not k & swap else count + k - swap for k in range(count)]
            high = [k + swap if not k & swap else count + k for k in range(count)]
            for k in range(count):
                if not k & swap:
                    a, b = lines[k], lines[k + swap]
                    lines[k] = builder.shuffle_vector(a, b, _places(low))
                    lines[k + swap] = builder.shuffle_vector(a, b, _places(high))
            swap //= 2
        for k in range(count):
            builder.store(lines[k], line(target, at, pitch, k), align=align)
        return context.get_dummy_value()

    return types.void(target, types.int64, types.int64, source, types.int64, types.int64), generate


@intrinsic
def prefetch(_typing, source, at):
    """The line around source[at] is asked for; any address will do."""

    def generate(context, builder, signature, arguments):
        place = builder.gep(arguments[0], [arguments[1]])
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(hint, [builder.bitcast(place, byte), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(source, types.int64), generate


@intrinsic
def splat(_typing, x):
    """A line that holds x everywhere."""
    result = LanesType(x)

    def generate(context, builder, signature, arguments):
        vector = _vector(x)
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], _I32(0))
        return builder.shuffle_vector(first, undefined, _places([0] * vector.count))

    return result(x), generate


@intrinsic
def multiply_add(_typing, a, b, c):
    """a * b + c, lane by lane, fused where the machine can."""

    def generate(context, builder, signature, arguments):
        a_, b_, c_ = arguments
        return builder.fadd(builder.fmul(a_, b_, flags=("contract",)), c_, flags=("contract",))

    return a(a, a, a), generate


@intrinsic
def add(_typing, a, b):
    """a + b, lane by lane."""

    def generate(context, builder, signature, arguments):
        return builder.fadd(*arguments)

    return a(a, a), generate


@intrinsic
def multiply(_typing, a, b):
    """a * b, lane by lane."""

    def generate(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return a(a, a), generate


@intrinsic
def totals(_typing, a, b, c, d):
    """The four sums over lanes (a tuple): four at once cost little more than one."""
    result = types.UniTuple(a.real, 4)

    def generate(context, builder, signature, arguments):
        def pick(x, y, places):
            return builder.shuffle_vector(x, y, _places(places))

        lines, count = list(arguments), _vector(a.real).count
        while count > 4:
            half = count // 2
            low, high = list(range(half)), list(range(half, count))
            lines = [builder.fadd(pick(x, x, low), pick(x, x, high)) for x in lines]
            count = half
        ab, cd = (  # a0+a1, b0+b1, a2+a3, b2+b3, and the same of c and d
            builder.fadd(pick(x, y, [0, 4, 2, 6]), pick(x, y, [1, 5, 3, 7])) for x, y in (lines[:2], lines[2:])
        )
        sums = builder.fadd(pick(ab, cd, [0, 1, 4, 5]), pick(ab, cd, [2, 3, 6, 7]))
        return context.make_tuple(builder, result, [builder.extract_element(sums, _I32(k)) for k in range(4)])

    return result(a, a, a, a), generate


@intrinsic
def total(_typing, a):
    """The sum over lanes, by halves."""

    def generate(context, builder, signature, arguments):
        vector = _vector(a.real)
        name = f"llvm.vector.reduce.fadd.v{vector.count}f{a.real.bitwidth}"
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector.element, [vector.element, vector]), name
        )
        return builder.call(reduce, [ir.Constant(vector.element, -0.0), arguments[0]], fastmath=("reassoc",))

    return a.real(a), generate


def _places(places: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(places)), places)


# --- scalars, generic over the floating type ------------------------------------------------------------------


@intrinsic
def constant(_typing, value, like):
    """The float64 constant `value` in the type of `like`."""

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], types.float64, like)

    return like(types.float64, like), generate


@intrinsic
def either(_typing, single, double, like):
    """The float64 constant `single` or `double`, in the type of `like`: float32 or float64."""

    def generate(context, builder, signature, arguments):
        chosen = arguments[0] if like == types.float32 else arguments[1]
        return context.cast(builder, chosen, types.float64, like)

    return like(types.float64, types.float64, like), generate


@intrinsic
def horner(_typing, x, single, double):
    """single[0] + x (single[1] + x (...)) for a float32 x, the same of `double` for a float64 x: global tuples."""

    def generate(context, builder, signature, arguments):
        table, kind = (arguments[1], single) if x == types.float32 else (arguments[2], double)
        terms = [context.cast(builder, builder.extract_value(table, k), types.float64, x) for k in range(kind.count)]
        result = terms.pop()
        while terms:
            result = builder.fmul(result, arguments[0], flags=("contract",))
            result = builder.fadd(result, terms.pop(), flags=("contract",))
        return result

    return x(x, single, double), generate


@intrinsic
def nearest(_typing, x):
    """The integer nearest to x as a float, and shifted: a float whose lowest bits are that integer.

    Adding 1.5 * 2^(mantissa bits) leaves no room for a fraction; exact for |x| < 2^22 (float32) or 2^51. NaN
    stays NaN in the first.
    """
    magic = 1.5 * 2.0**23 if x == types.float32 else 1.5 * 2.0**52

    def generate(context, builder, signature, arguments):
        shift = context.get_constant(x, magic)
        shifted = builder.fadd(arguments[0], shift)
        return context.make_tuple(builder, signature.return_type, [builder.fsub(shifted, shift), shifted])

    return types.UniTuple(x, 2)(x), generate


@intrinsic
def power_of_two(_typing, shifted):
    """2^k for the `shifted` form of k (see `nearest`), for k from -126 (-1022) to 127 (1023)."""
    mantissa, bias = (23, 127) if shifted == types.float32 else (52, 1023)

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(shifted.bitwidth)
        bits = builder.bitcast(arguments[0], integer)
        bits = builder.shl(builder.add(bits, integer(bias)), integer(mantissa))
        return builder.bitcast(bits, context.get_value_type(shifted))

    return shifted(shifted), generate


@intrinsic
def low_bits(_typing, shifted):
    """The two lowest bits of the integer in `shifted` (see `nearest`), as an integer of the same width."""
    result = types.int32 if shifted == types.float32 else types.int64

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(shifted.bitwidth)
        return builder.and_(builder.bitcast(arguments[0], integer), integer(3))

    return result(shifted), generate
