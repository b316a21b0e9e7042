"""Passes as text: `SplitUnit(unit='hidden#12', share=0.5) >> AddLayer(group='hidden')`, written and read.

Only literals are read; units are written as `group#serial` and proposals as `proposal:hash`. Whatever is
wrong with a text, reading it raises UnknownName and runs nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from irgrow.ir.errors import UnknownName
from irgrow.ir.network import Unit
from irgrow.ir.proposal import Proposal

EXAMPLE = "text like SplitUnit(unit='hidden#3', share=0.5)"
_BROKEN = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)  # what ast raises on hostile text


def write(pass_: Any) -> str:
    """The text of one pass: its name and its fields."""
    parts = [f"{f.name}={_literal(getattr(pass_, f.name))}" for f in dataclasses.fields(pass_) if f.init]
    return f"{type(pass_).__name__}({', '.join(parts)})"


def read(text: str, registry: Mapping[str, type], proposals: Mapping[str, Proposal]) -> list[Any]:
    """The passes of a text, in order."""
    try:
        tree = ast.parse(text, mode="eval").body
    except _BROKEN:
        raise UnknownName(f"pass text {_cut(text)!r}", expected=EXAMPLE) from None
    calls = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.RShift):
        calls.append(tree.right)
        tree = tree.left
    return [_read(call, registry, proposals) for call in (tree, *reversed(calls))]


def _literal(value: Any) -> str:
    if isinstance(value, Unit):
        return repr(str(value))
    if isinstance(value, Proposal):
        return repr(f"proposal:{value.hash}")
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value.item() if isinstance(value, np.generic) else value)


def _read(tree: ast.expr, registry: Mapping[str, type], proposals: Mapping[str, Proposal]) -> Any:
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args):
        raise UnknownName(f"pass text {_cut(_source(tree))!r}", expected="Name(field=value, ...)")
    name = tree.func.id
    if name not in registry:
        raise UnknownName(f"pass {name!r}", expected=f"one of {', '.join(sorted(registry))}")
    cls: Any = registry[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = {}
    for word in tree.keywords:
        if word.arg not in fields:
            raise UnknownName(f"{name}: field {word.arg!r}", expected=f"one of {', '.join(sorted(fields))}")
        if word.arg in values:
            raise UnknownName(f"{name}: field {word.arg!r}", "it twice", "each field once")
        try:
            value = ast.literal_eval(word.value)
        except _BROKEN:
            raise UnknownName(f"{name}: {word.arg}", _cut(_source(word.value)), "a plain value") from None
        try:
            values[word.arg] = _typed(value, hints[word.arg], proposals)
        except _Unfit as error:
            wanted = error.wanted or fields[word.arg].type
            raise UnknownName(f"{name}: {word.arg}", _cut(repr(value)), wanted) from None
    missing = [
        f.name
        for f in fields.values()
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UnknownName(f"{name}", f"no value for {', '.join(missing)}", "all fields without a default")
    return cls(**values)


class _Unfit(Exception):
    """A value of another type than its field."""

    def __init__(self, wanted: str | None = None) -> None:
        self.wanted = wanted


def _typed(value: Any, wanted: Any, proposals: Mapping[str, Proposal]) -> Any:
    """A literal as the type of its field."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (first, *others) = (kind for kind in inner if kind is not type(None))
        for kind in (*others, first):
            try:
                return _typed(value, kind, proposals)
            except _Unfit:
                if kind is first:
                    raise
    if wanted is Unit:
        return _unit(value)
    if wanted is Proposal:
        return _proposal(value, proposals)
    if origin is tuple and isinstance(value, tuple):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            raise _Unfit
        return tuple(_typed(v, kind, proposals) for v, kind in zip(value, kinds, strict=True))
    if wanted is float and type(value) in (int, float):
        return float(value)
    if type(value) is not (origin or wanted):
        raise _Unfit
    return value


def _unit(value: Any) -> Unit:
    if not isinstance(value, str):
        raise _Unfit("text like 'hidden#12'")
    group, mark, serial = value.rpartition("#")
    if not mark or not (serial.isascii() and serial.isdigit()):
        raise UnknownName(f"unit {_cut(value)!r}", expected="text like hidden#12")
    return Unit(group, int(serial))


def _proposal(value: Any, proposals: Mapping[str, Proposal]) -> Proposal:
    if not isinstance(value, str):
        raise _Unfit("text like 'proposal:6f0c...'")
    key = value.removeprefix("proposal:")
    if key not in proposals:
        raise UnknownName(f"proposal {_cut(key)!r}", expected=f"one of {', '.join(proposals) or 'none given'}")
    return proposals[key]


def _source(tree: ast.expr) -> str:
    try:
        return ast.unparse(tree)
    except RecursionError:
        return "..."


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."
