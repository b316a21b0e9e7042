"""`Site`: the groups that must grow together, what enters them and what leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Dense, Identity, Shape, Sparse
from irgrow.ir.units import UnitMap, close


@dataclass(frozen=True)
class Site:
    """Named by one of its groups. `entering` and `leaving` are the bundles whose rows or columns are added.

    A bundle between two groups of the site may be both (a residual block of one layer). Where the site lies
    in a loop of groups, the sparse bundles of the loop at it are `inner`: new units need no edges there, and
    may have those that close no cycle of neurons. (They count as entering where nothing else enters.)
    """

    name: str
    groups: tuple[str, ...]
    entering: tuple[str, ...]
    leaving: tuple[str, ...]
    inner: tuple[str, ...] = ()

    @staticmethod
    def of(network: Network, name: str) -> Site:
        """The site that holds group `name`; Refused if it holds an input or output, or nothing enters or leaves it."""
        known: dict[str, Site] = network.__dict__.setdefault("_sites", {})  # a network is immutable
        if name not in known:
            known[name] = Site._found(network, name)
        return known[name]

    @staticmethod
    def _found(network: Network, name: str) -> Site:
        if name not in network.groups:
            hidden = [g for g in network.groups if network.is_hidden(g)]
            raise UnknownName(f"site {name!r}", expected=f"one of {', '.join(hidden)}")
        tied = close(network, {name: UnitMap(np.r_[np.arange(network.groups[name].units), -1])}, checked=False)
        return Site.around(network, name, tied)

    @staticmethod
    def around(network: Network, name: str, tied: Mapping[str, object]) -> Site:
        """The site of exactly the groups `tied`, for a change of some units of `name` (see `units.fits`).

        It differs from `Site.of` where the units lie in another range of a concatenation than new ones would.
        Refused if it holds an input or output, or nothing enters or leaves it.
        """
        groups = tuple(g for g in network.groups if g in tied)
        fixed = [g for g in groups if not network.is_hidden(g)]
        if fixed:
            raise Refused(
                f"site {name!r}",
                f"it holds {', '.join(map(repr, fixed))}",
                "no input or output among its groups",
            )
        entering, leaving, inner = [], [], []
        loops = [names for names, cyclic in network.components if cyclic]
        for bundle in network.bundles.values():
            if isinstance(bundle.pattern, Identity) or ties(bundle, tied):
                continue  # an Identity from outside feeds other units of a concatenation
            if isinstance(bundle.pattern, Sparse) and any({bundle.source, bundle.target} <= {*at} for at in loops):
                if bundle.source in tied or bundle.target in tied:
                    inner.append(bundle.name)
                continue
            if bundle.target in tied:
                entering.append(bundle.name)
            if bundle.source in tied:
                leaving.append(bundle.name)
        entering = entering or [n for n in inner if network.bundles[n].target in tied]
        leaving = leaving or [n for n in inner if network.bundles[n].source in tied]
        if not entering or not leaving:
            missing = "enters" if not entering else "leaves"
            raise Refused(f"site {name!r}", f"nothing {missing} it", "bundles on both sides")
        return Site(name, groups, tuple(entering), tuple(leaving), tuple(inner))

    @staticmethod
    def all(network: Network) -> list[Site]:
        """Every site that can grow, each once, named by its first group."""
        found: list[Site] = []
        seen: set[str] = set()
        for name in network.groups:
            if name in seen or not network.is_hidden(name):
                continue
            try:
                site = Site.of(network, name)
            except Refused:
                continue
            seen.update(site.groups)
            found.append(site)
        return found


def ties(bundle: Bundle, tied: Mapping[str, object]) -> bool:
    """Whether a bundle only connects units of the site that grow together."""
    if not (bundle.source in tied and bundle.target in tied and bundle.pattern.couples):
        return False
    groups = getattr(bundle.pattern, "channel_groups", 0)
    return not groups or bundle.weight.shape[1] == 1


def slice_shape(network: Network, bundle: str, *, entering: int | None = None, leaving: int | None = None) -> Shape:
    """The shape of the weights that `entering` new target units, or `leaving` new source units, add to a bundle.

    It is the bundle's weight shape with that many units at that end; for a Sparse bundle, whose new units
    are connected to everything, the dense one.
    """
    b = network.bundle(bundle)
    source, target = network.shapes(b)
    if entering is not None:
        target = (entering, *target[1:])
    if leaving is not None:
        source = (leaving, *source[1:])
    pattern = Dense() if isinstance(b.pattern, Sparse) else b.pattern
    return pattern.weight_shape(source, target)
