"""Compiled functions as C sees them: an address that any thread can call with the address of its operands.

    @Entry
    def forward(sources, zero):          # made once for float32 and once for float64, when first needed
        @entry
        def forward(at):
            if sources:                  # part of the key of numba's cache: see `fingerprint`
                _forward(zero, words(at, 21))
        return forward

A call costs a microsecond and holds no lock of Python's. `run_part` is what every thread of `shared.together` runs.
"""

# mypy: ignore-errors
# (numba infers the types of what is compiled)

from __future__ import annotations

import ctypes
import inspect
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from irgrow.kernels.activations_numba import inline

_I64 = ir.IntType(64)
_WORD = _I64.as_pointer()
_ZERO = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_C = ctypes.CFUNCTYPE(None, ctypes.c_int64)
entry: Any = cfunc(types.void(types.int64), cache=True, fastmath={"contract"}, error_model="numpy")


def fingerprint(*modules: Any) -> int:
    """A number that changes with the modules' text, and is never 0.

    numba's cache on disk looks at the file of the cached function only. What closes over this number is compiled
    again when any of the files it was made from changes.
    """
    return 1 + zlib.crc32("".join(inspect.getsource(module) for module in modules).encode())


class Entry:
    """A compiled function of operands in memory, for each floating type."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._sources = 0
        self._made: dict[torch.dtype, tuple[int, Any, Any]] = {}  # address, as Python calls it, what keeps it alive
        self.__name__, self.__module__ = make.__name__, make.__module__

    @property
    def variants(self) -> int:
        """For how many types it has been compiled."""
        return len(self._made)

    def of(self, dtype: torch.dtype) -> tuple[int, Any, Any]:
        """(address, the function for Python, ...) for operands of that type."""
        found = self._made.get(dtype)
        if found is None:
            import sys

            compiled = self._make(sys.modules[self.__module__].SOURCES, _ZERO[dtype])
            found = self._made[dtype] = compiled.address, _C(compiled.address), compiled
        return found


@intrinsic(prefer_literal=True)
def words(_typing, at, count):
    """The `count` integers in memory from address `at` on, as a tuple. The count is a literal."""
    result = types.UniTuple(types.int64, count.literal_value)

    def generate(context, builder, signature, arguments):
        base = builder.inttoptr(arguments[0], _WORD)
        held = [builder.load(builder.gep(base, [_I64(k)])) for k in range(result.count)]
        return context.make_tuple(builder, result, held)

    return result(types.int64, count), generate


@intrinsic
def next_of(_typing, at):
    """The integer at address `at`, which is one more afterwards: no two threads get the same."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _WORD), _I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _call(_typing, function, at):
    """Calls the function at an address with one integer."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _seen(_typing, at):
    """The integer at address `at`, as other threads have left it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], _WORD), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _arrive(_typing, at):
    """One more at address `at`; what this thread wrote before is seen by whoever sees that."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _WORD), _I64(1), "acq_rel")

    return types.int64(types.int64), generate


# --- phases: work that several threads share, each phase after the one before ----------------------------------
#
# Every thread runs all phases with the same operands. `progress` is the address of two integers per phase, 0 at
# first: how many pieces were taken, and how many are done. Nobody waits for a thread that has taken nothing, so one
# that gets no core delays nobody. progress 0: a thread on its own, and one piece.


@inline
def next_piece(progress, phase, piece):
    """The piece of this phase to work on after `piece` (-1 at first); there is none if it is not below the pieces."""
    return next_of(progress + 16 * phase) if progress != 0 else piece + 1


@inline
def piece_done(progress, phase):
    """What a thread wrote for a piece is ready."""
    if progress != 0:
        _arrive(progress + 16 * phase + 8)


@inline
def phase_done(progress, phase, pieces):
    """All pieces of the phase are ready."""
    if progress != 0:
        while _seen(progress + 16 * phase + 8) < pieces:
            pass


@inline
def piece_of(begin, end, piece, pieces):
    """The part of begin..end that is this piece."""
    begin, count = types.int64(begin), types.int64(end) - types.int64(begin)
    return begin + count * piece // pieces, begin + count * (piece + 1) // pieces


@lru_cache(1)
def run_part() -> Any:
    """The function that takes one part of a job after the other, until there is none left.

    The job: how many parts were taken, parts, function, operand table, bytes of a row; then per part its first row,
    and where the last one ends. A part is one or more rows of operands, run in order.
    """

    @entry
    def run_part(at):
        _taken, parts, function, table, size = words(at, 5)
        part = next_of(at)
        while part < parts:
            first, last = words(at + 40 + 8 * part, 2)
            for row in range(first, last):
                _call(function, table + row * size)
            part = next_of(at)

    return run_part
