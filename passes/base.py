"""`Pass`: one kind of rewrite as a value; the registry; text forms; sequences of passes."""

from __future__ import annotations

import ast
import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from irgrow.ir.edit import Edit
from irgrow.ir.errors import IrgrowError, Refused, UnknownName
from irgrow.ir.morphism import Morphism, Promise, SameFunction
from irgrow.ir.network import Network, Unit
from irgrow.ir.proposal import Proposal

_REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Makes a pass known by its class name: to `list()`, to `Pass.from_text`, and to the property tests."""
    if cls.__name__ in _REGISTRY and _REGISTRY[cls.__name__].__module__ != cls.__module__:
        raise UnknownName(f"pass {cls.__name__}", "a pass of that name is registered", "a new name")
    _REGISTRY[cls.__name__] = cls
    return cls


def registered() -> dict[str, type[Pass]]:
    """Every registered pass by name."""
    return dict(_REGISTRY)


class Pass(ABC):
    """One kind of rewrite. Subclasses are frozen dataclasses whose fields are their options.

    A pass is pure: the same pass on the same network gives the same result; randomness is a `seed` among
    its fields and measured data arrives as a `Proposal`.
    """

    reference: ClassVar[str] = ""  # paper and equation
    reads_weights: ClassVar[bool] = False  # True: what it writes depends on weights, beyond copying them

    @classmethod
    @abstractmethod
    def places(cls, network: Network) -> Iterator[Pass]:
        """This pass with default options at every place where it applies."""

    @abstractmethod
    def requires(self, network: Network) -> None:
        """Raises Refused (or UnknownName) where the pass does not apply."""

    def promise(self, network: Network) -> Promise:
        """What the pass keeps on this network."""
        return SameFunction()

    @abstractmethod
    def rewrite(self, edit: Edit) -> None:
        """Makes the change inside a transaction."""

    def __call__(self, network: Network) -> Morphism:
        """The network rewritten; the old one stays as it is. Raises Refused, naming pass, place and reason."""
        try:
            self.requires(network)
            edit = Edit(network)
            self.rewrite(edit)
        except Refused as error:
            raise self._named(error) from None
        after, lineage = edit.finish()
        return Morphism(network, after, lineage, self.promise(network), str(self), (self,))

    def _named(self, error: Refused) -> Refused:
        name = type(self).__name__
        return (
            error
            if error.who.startswith(name)
            else Refused(f"{name}: {error.who}", error.found, error.expected, error.do)
        )

    def __rshift__(self, later: Pass) -> Sequence:
        """This pass, then `later`, as one pass."""
        return Sequence((*_steps(self), *_steps(later)))

    def __str__(self) -> str:
        parts = [f"{f.name}={_write(getattr(self, f.name))}" for f in dataclasses.fields(self) if f.init]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"

    @staticmethod
    def from_text(text: str, proposals: Mapping[str, Proposal] | None = None) -> Pass:
        """The pass that prints as `text`. Proposals are looked up by their hash in `proposals`."""
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            raise UnknownName(
                f"pass text {text!r}", expected="text like SplitUnit(unit='hidden#3', share=0.5)"
            ) from None
        return _read(tree, proposals or {})


@dataclass(frozen=True)
class Sequence(Pass):
    """Passes one after the other, as one pass: a composition."""

    steps: tuple[Pass, ...]

    @classmethod
    def places(cls, network: Network) -> Iterator[Pass]:
        return iter(())

    def requires(self, network: Network) -> None:
        if not self.steps:
            raise Refused("Sequence", "no steps", "at least one")

    def rewrite(self, edit: Edit) -> None:
        raise NotImplementedError("a sequence is applied step by step")

    def __call__(self, network: Network) -> Morphism:
        self.requires(network)
        morphism = self.steps[0](network)
        for step in self.steps[1:]:
            later = step(morphism.after)
            lineage, promise = morphism.lineage.then(later.lineage), morphism.promise.then(later.promise)
            by, made_by = f"{morphism.by} >> {later.by}", (*morphism.made_by, *later.made_by)
            morphism = Morphism(network, later.after, lineage, promise, by, made_by)
        return morphism

    def promise(self, network: Network) -> Promise:
        return self(network).promise

    def __str__(self) -> str:
        return " >> ".join(map(str, self.steps))


def _steps(p: Pass) -> tuple[Pass, ...]:
    return p.steps if isinstance(p, Sequence) else (p,)


def _write(value: Any) -> str:
    if isinstance(value, Unit):
        return repr(str(value))
    if isinstance(value, Proposal):
        return repr(f"proposal:{value.hash}")
    if isinstance(value, tuple):
        return f"({', '.join(map(_write, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _read(tree: ast.expr, proposals: Mapping[str, Proposal]) -> Pass:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.RShift):
        return _read(tree.left, proposals) >> _read(tree.right, proposals)
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args):
        raise UnknownName(f"pass text {ast.unparse(tree)!r}", expected="Name(field=value, ...)")
    if tree.func.id not in _REGISTRY:
        raise UnknownName(f"pass {tree.func.id!r}", expected=f"one of {', '.join(sorted(_REGISTRY))}")
    cls = _REGISTRY[tree.func.id]
    types = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = {}
    for word in tree.keywords:
        if word.arg not in known:
            raise UnknownName(f"{tree.func.id}: field {word.arg!r}", expected=f"one of {', '.join(sorted(known))}")
        try:
            value = ast.literal_eval(word.value)
        except ValueError:
            raise UnknownName(f"{tree.func.id}: {word.arg}", ast.unparse(word.value), "a plain value") from None
        values[word.arg] = _typed(value, types[word.arg], proposals)
    try:
        return cls(**values)
    except TypeError as error:
        raise IrgrowError(f"{tree.func.id}", str(error), "all fields without a default") from None


def _typed(value: Any, wanted: Any, proposals: Mapping[str, Proposal]) -> Any:
    """A literal as the type of its field: units and proposals are written as text."""
    if isinstance(value, str):
        if wanted is Proposal or Proposal in typing.get_args(wanted):
            key = value.removeprefix("proposal:")
            if key not in proposals:
                raise UnknownName(f"proposal {key!r}", expected=f"one of {', '.join(proposals) or 'none given'}")
            return proposals[key]
        if wanted is Unit or Unit in typing.get_args(wanted):
            group, mark, serial = value.rpartition("#")
            if not mark or not serial.isdigit():
                raise UnknownName(f"unit {value!r}", expected="text like hidden#12")
            return Unit(group, int(serial))
    if isinstance(value, tuple):
        inner = [a for a in typing.get_args(wanted) if a is not Ellipsis]
        return tuple(_typed(v, inner[0] if inner else Any, proposals) for v in value)
    return value
