"""Weights that training leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.passes.base import Pass, register


@register
@dataclass(frozen=True)
class Freeze(Pass):
    """The bundle's weights are fixed: no parameter, no gradient; every output stays the same.

    It freezes the whole bundle; to freeze some edges only, split it first. Biases and norms are trained on.
    Refused: a bundle that is fixed already.
    """

    bundle: str

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

    They have no optimizer state yet. Refused: a bundle that is trained already.
    """

    bundle: str

    @classmethod
    def places(cls, network: Network) -> Iterator[Unfreeze]:
        return (cls(b.name) for b in network.bundles.values() if not b.trainable)

    def requires(self, network: Network) -> None:
        if network.bundle(self.bundle).trainable:
            raise Refused(f"Unfreeze: bundle {self.bundle!r}", "trained weights", "fixed ones")

    def rewrite(self, edit: Edit) -> None:
        edit.bundles[self.bundle] = replace(edit.bundles[self.bundle], trainable=True)
