"""Weights that training leaves alone: whole bundles, and single entries of any tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadShape, Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.passes.base import Pass, register

LOCKED = "Firefly, arXiv:2102.08574, algorithm 2 (locked weights)"


@register
@dataclass(frozen=True)
class Freeze(Pass):
    """The bundle's weights are fixed: no parameter, no gradient; every output stays the same.

        a --W (trained)--> b     becomes     a --W (fixed)--> b

    It freezes the whole bundle, and what units added later bring to it; for some weights, or biases and
    norms, see FreezeEntries. Refused: a bundle that is fixed already.
    """

    bundle: str
    reference: ClassVar[str] = LOCKED

    @classmethod
    def places(cls, network: Network) -> Iterator[Freeze]:
        return (cls(b.name) for b in network.bundles.values() if b.trainable)

    def requires(self, network: Network) -> None:
        if not network.bundle(self.bundle).trainable:
            raise Refused(f"Freeze: bundle {self.bundle!r}", "fixed weights", "trained ones")

    def rewrite(self, edit: Edit) -> None:
        edit.bundles[self.bundle] = replace(edit.bundles[self.bundle], trainable=False)


@register
@dataclass(frozen=True)
class Unfreeze(Pass):
    """The bundle's weights are trained; every output stays the same.

        a --W (fixed)--> b     becomes     a --W (trained)--> b

    They have no optimizer state yet. Refused: a bundle that is trained already.
    """

    bundle: str
    reference: ClassVar[str] = LOCKED

    @classmethod
    def places(cls, network: Network) -> Iterator[Unfreeze]:
        return (cls(b.name) for b in network.bundles.values() if not b.trainable)

    def requires(self, network: Network) -> None:
        if network.bundle(self.bundle).trainable:
            raise Refused(f"Unfreeze: bundle {self.bundle!r}", "trained weights", "fixed ones")

    def rewrite(self, edit: Edit) -> None:
        edit.bundles[self.bundle] = replace(edit.bundles[self.bundle], trainable=True)


@dataclass(frozen=True)
class _Entries(Pass):
    """Some entries of one tensor (`weight.x`, `bias.y`, ...), by their index in the flattened tensor."""

    tensor: str
    entries: tuple[int, ...]
    reference: ClassVar[str] = LOCKED

    @classmethod
    def where(cls, network: Network, tensor: str, mask: Tensor) -> _Entries:
        """The pass for the entries at which `mask`, of the tensor's shape, is true."""
        shape = tuple(_tensor(network, tensor).shape)
        if tuple(mask.shape) != shape:
            raise BadShape(f"{cls.__name__}: mask of {tensor!r}", tuple(mask.shape), shape)
        return cls(tensor, tuple(mask.flatten().nonzero().flatten().tolist()))

    @classmethod
    def places(cls, network: Network) -> Iterator[_Entries]:
        for name in network.trainable():
            free = (cls._frozen(network, name).flatten() == cls._expected()).nonzero().flatten().tolist()
            for entries in dict.fromkeys((tuple(free[:1]), tuple(free[::2]), tuple(free))):
                if entries:
                    yield cls(name, entries)

    def requires(self, network: Network) -> None:
        who = f"{type(self).__name__}: tensor {self.tensor!r}"
        size = _tensor(network, self.tensor).numel()
        if self.tensor not in network.trainable():
            raise Refused(who, "a tensor that is not trained", f"one of {', '.join(network.trainable())}")
        if not self.entries:
            raise Refused(who, "no entries", "at least one")
        if len(set(self.entries)) != len(self.entries):
            raise Refused(who, "an entry twice", "each once")
        outside = [e for e in self.entries if not 0 <= e < size]
        if outside:
            raise Refused(who, f"entry {outside[0]}", f"0 to {size - 1}, of the flattened tensor")
        frozen = self._frozen(network, self.tensor).flatten()[list(self.entries)]
        wrong = (frozen != self._expected()).nonzero().flatten()
        if wrong.numel():
            words = ("frozen", "trained") if not self._expected() else ("trained", "frozen")
            raise Refused(who, f"entry {self.entries[int(wrong[0])]}, which is {words[0]}", f"{words[1]} entries")

    def rewrite(self, edit: Edit) -> None:
        mask = self._frozen(edit.before, self.tensor).clone()
        mask.view(-1)[list(self.entries)] = not self._expected()
        edit.freeze(self.tensor, mask)

    @classmethod
    @abstractmethod
    def _expected(cls) -> bool:
        """Whether the entries are frozen before."""

    @staticmethod
    def _frozen(network: Network, tensor: str) -> Tensor:
        found = network.frozen.get(tensor)
        return torch.zeros(_tensor(network, tensor).shape, dtype=torch.bool) if found is None else found


@register
@dataclass(frozen=True)
class FreezeEntries(_Entries):
    """These entries of a weight, bias or norm keep their bits whatever trains the rest; outputs stay the same.

        W     becomes     W with W[entries] frozen, until UnfreezeEntries

    No gradient reaches them, and no optimizer's weight decay or momentum moves them. The mask follows the
    lineage: an entry that later comes from a frozen one is frozen, new entries are not. An entry of a shared
    weight (a convolution's) is frozen at every edge. `FreezeEntries.where(network, tensor, mask)` makes one
    from a mask.

    Edges that are held at 0 are better no edges: see RemoveEdges.
    Refused: entries out of range or frozen already, tensors that are not trained.
    """

    @classmethod
    def _expected(cls) -> bool:
        return False


@register
@dataclass(frozen=True)
class UnfreezeEntries(_Entries):
    """These entries of a weight, bias or norm are trained again; every output stays the same.

        W with W[entries] frozen     becomes     W

    Refused: entries out of range or not frozen.
    """

    @classmethod
    def _expected(cls) -> bool:
        return True


def _tensor(network: Network, name: str) -> Tensor:
    tensors = network.tensors()
    if name not in tensors:
        raise UnknownName(f"tensor {name!r}", expected=f"one of {', '.join(tensors)}")
    return tensors[name]
