"""`Pass`: one kind of rewrite as a value; the registry; sequences of passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.morphism import Morphism, Promise, SameFunction
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.passes import text

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
        return text.write(self)

    @staticmethod
    def from_text(written: str, proposals: Mapping[str, Proposal] | None = None) -> Pass:
        """The pass that prints as `written`. Proposals are looked up by their hash in `proposals`."""
        steps = text.read(written, _REGISTRY, proposals or {})
        return steps[0] if len(steps) == 1 else Sequence(tuple(steps))


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
