"""Merging twins into one unit: the inverse of splitting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused
from irgrow.ir.morphism import Changes, Promise, SameFunction
from irgrow.ir.network import Bundle, Network, Unit
from irgrow.ir.pattern import Conv2d, Sparse, size
from irgrow.ir.site import Site
from irgrow.ir.units import UnitMap, close, fits, parts_of
from irgrow.passes.base import Pass, register
from irgrow.passes.exactness import refuse_max_targets, refuse_norm_across_units
from irgrow.passes.wiring import Ints, refuse_broken

Twins = tuple[tuple[Unit, Unit], ...]


@register
@dataclass(frozen=True)
class MergeUnits(Pass):
    """Of each pair of twins the first stays, with the outgoing weights of both; every output stays the same.

        a --w--> u --v--> b
        a --w--> twin --v'--> b     becomes     a --w--> u --(v + v')--> b

    Twins have equal incoming weights, biases and norms, as SplitUnit leaves them; so have the units tied to
    them, which merge along. The gradient of what leaves is the old one of either; that of what enters is the
    sum of two and starts without history.

    With `approximate`, units whose incoming weights differ merge too: the first keeps its own (Changes).
    Refused: units that are no twins (unless `approximate`), of several groups or an input or output, a layer
    or group norm over them, a target that aggregates by max, shared sparse weights that leave them.
    Source: the inverse of Net2WiderNet, arXiv:1511.05641, section 2.2.
    """

    pairs: Twins
    approximate: bool = False
    reference: ClassVar[str] = "inverse of Net2Net, arXiv:1511.05641, section 2.2"
    reads_weights: ClassVar[bool] = True  # whether units are twins depends on their weights

    @classmethod
    def places(cls, network: Network) -> Iterator[MergeUnits]:
        for site in Site.all(network):
            units = [Unit(site.name, serial) for serial in network.groups[site.name].serials.tolist()]
            part = max(1, len(units) // parts_of(network, site.name))
            for first in range(part - 1):  # a pair in every channel group
                pairs = tuple((units[n], units[n + 1]) for n in range(first, len(units) - 1, part))
                candidate = cls(pairs)
                try:
                    candidate.requires(network)
                except Refused:
                    continue
                yield candidate

    def requires(self, network: Network) -> None:
        who = f"MergeUnits: pairs {', '.join(f'{a} and {b}' for a, b in self.pairs) or 'none'}"
        everyone = [unit for pair in self.pairs for unit in pair]
        groups = {unit.group for unit in everyone}
        if len(groups) != 1:
            raise Refused(who, f"units of {len(groups)} groups", "units of one group")
        if len(set(everyone)) != len(everyone):
            raise Refused(who, "one unit twice", "each unit once")
        name = everyone[0].group
        site = Site.around(network, name, fits(network, {name: self._kept(network)}))
        refuse_norm_across_units(who, network, site)
        refuse_max_targets(who, network, site)
        different = self._difference(network)
        if different and not self.approximate:
            raise Refused(who, f"units that differ in {different}", "twins", do="use approximate=True to merge them")
        trial = Edit(network)
        self.rewrite(trial)
        refuse_broken(who, trial)

    def promise(self, network: Network) -> Promise:
        different = self._difference(network)
        return Changes(f"the merged units differed in {different}") if different else SameFunction()

    def rewrite(self, edit: Edit) -> None:
        network = edit.before
        kept = self._kept(network)
        twins = self._twins(network)
        maps = edit.rewire({self.pairs[0][0].group: kept})
        for bundle in network.bundles.values():
            if bundle.weight.dim() == 0:
                continue
            if bundle.source in maps and not _ties(bundle, maps):
                edit.absorb(bundle.name, _only(maps[bundle.source], twins[bundle.source]), maps.get(bundle.target))
            if bundle.target in maps:
                merged = np.flatnonzero(maps[bundle.target].index != twins[bundle.target].index)
                edit.forget(bundle.tensor, _rows(edit.bundles[bundle.name], edit.shapes(bundle.name)[1], merged))
        for name, units in maps.items():
            merged = np.flatnonzero(units.index != twins[name].index)
            for tensor, _ in network.groups[name].tensors():
                if not tensor.startswith(("mean.", "variance.")):
                    edit.forget(tensor, merged)

    def _kept(self, network: Network) -> UnitMap:
        gone = [network.index(twin) for _, twin in self.pairs]
        return UnitMap(np.delete(np.arange(network.groups[self.pairs[0][0].group].units), gone))

    def _twins(self, network: Network) -> dict[str, UnitMap]:
        """The maps of all tied groups in which the twins stay in place of the units that absorb them."""
        index = self._kept(network).index.copy()
        for unit, twin in self.pairs:
            index[index == network.index(unit)] = network.index(twin)
        return close(network, {self.pairs[0][0].group: UnitMap(index)})

    def _difference(self, network: Network) -> str | None:
        """The tensor in which a unit and its twin differ; None if they are twins."""
        kept, twins = close(network, {self.pairs[0][0].group: self._kept(network)}), self._twins(network)
        for name, units in kept.items():
            other = twins[name].index
            merged = units.index != other
            one, two = units.index[merged], other[merged]
            for tensor, value in network.groups[name].tensors():
                if not torch.equal(value[torch.from_numpy(one)], value[torch.from_numpy(two)]):
                    return tensor
            for bundle in network.entering(name):
                if bundle.weight.dim() and not _same_rows(bundle, *network.shapes(bundle), one, two):
                    return bundle.tensor
        return None


def _only(kept: UnitMap, twins: UnitMap) -> UnitMap:
    """For every unit that absorbs another one, that one; -1 for the rest."""
    return UnitMap(np.where(kept.index != twins.index, twins.index, -1))


def _rows(bundle: Bundle, target: tuple[int, ...], units: Ints) -> Ints:
    """The entries along the first axis of a bundle's weights that enter these units of its target."""
    pattern = bundle.pattern
    if isinstance(pattern, Sparse):
        into = np.isin(pattern.target // size(target[1:]), units)
        return np.unique(pattern.index[into])
    each = bundle.weight.shape[0] // target[0]
    return (units[:, None] * each + np.arange(each)).ravel()


def _same_rows(bundle: Bundle, source: tuple[int, ...], target: tuple[int, ...], one: Ints, two: Ints) -> bool:
    """Whether units `one` and `two` have the same incoming edges with the same weights."""
    pattern, weight = bundle.pattern, bundle.weight.detach()
    if isinstance(pattern, Sparse):
        positions = size(target[1:])
        parts = []
        for units in (one, two):
            place = np.full(target[0], -1)
            place[units] = np.arange(units.size)
            unit, position = np.divmod(pattern.target, positions)
            edge = np.flatnonzero(place[unit] >= 0)
            order = np.lexsort((pattern.source[edge], position[edge], place[unit[edge]]))
            edge = edge[order]
            ends = np.stack([place[unit[edge]], position[edge], pattern.source[edge]])
            parts.append((ends, weight[torch.from_numpy(pattern.index[edge].astype(np.int64))]))
        (ends, w), (others, v) = parts
        return np.array_equal(ends, others) and torch.equal(w, v)
    if isinstance(pattern, Conv2d) and pattern.channel_groups > 1 and not pattern.depthwise(source):
        outputs = target[0] // pattern.channel_groups
        if not np.array_equal(one // outputs, two // outputs):
            return False
    rows = [torch.from_numpy(_rows(bundle, target, units)) for units in (one, two)]
    return torch.equal(weight[rows[0]], weight[rows[1]])


def _ties(bundle: Bundle, maps: dict[str, UnitMap]) -> bool:
    """Whether the bundle joins units that merge together (a depthwise convolution)."""
    return bundle.pattern.couples and bundle.target in maps and bundle.weight.shape[1] == 1
