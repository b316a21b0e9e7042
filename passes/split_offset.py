"""Splitting units into pairs that move apart: the growing step of Firefly and of splitting steepest descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, Refused, StaleMorphism
from irgrow.ir.morphism import FirstOrder, Promise, SameFunction
from irgrow.ir.network import Bundle, Network, Unit
from irgrow.ir.pattern import Local2d, Sparse, size
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site, slice_shape
from irgrow.ir.units import UnitMap, close, fits, parts_of
from irgrow.passes.base import Pass, register
from irgrow.passes.exactness import refuse_max_targets, refuse_norm_across_units


@register
@dataclass(frozen=True)
class SplitUnits(Pass):
    """Each unit becomes two with half of its outgoing weights, one moved by +offset, the other by -offset.

        a --theta--> u --v--> b     becomes     a --theta + offset--> u    --v/2--> b
                                                a --theta - offset--> twin --v/2--> b

    `offsets` (eps * delta in the papers) is a proposal whose `fan_in[bundle]` has the bundle's weight shape
    with the split units as target units, in the order they are stored; bundles left out do not move, `bias`
    is the offset of the biases, there is no fan-out. Without offsets every output stays the same. Flipping
    the sign of a unit's offset only exchanges the two: outputs are even in it, so where the activation is
    smooth they change to second order. Twins stand behind their units and have serials of their own; units
    tied to them split along. Gradient factors (1/2 for what enters, 1 for what leaves) are those at offset 0.

    Refused: units that are not all of one group and in stored order, an input or output or tied to one, a
    layer or group norm over them, a target that aggregates by max, an offset where there is no edge or on
    shared sparse weights.
    Source: Wu et al., Firefly, section 2.2 and equation 3; Liu et al., Splitting steepest descent,
    arXiv:1910.02366.
    """

    units: tuple[Unit, ...]
    offsets: Proposal | None = None
    reference: ClassVar[str] = "Firefly, arXiv:2102.08574, equation 3"

    @classmethod
    def places(cls, network: Network) -> Iterator[SplitUnits]:
        for site in Site.all(network):
            serials = network.groups[site.name].serials.tolist()
            part = max(1, len(serials) // parts_of(network, site.name))
            for chosen in dict.fromkeys((tuple(serials[:1]), tuple(serials[-2:]), tuple(serials[::part]))):
                units = tuple(Unit(site.name, s) for s in chosen)
                for offsets in (None, _drawn(network, site, units)):
                    candidate = cls(units, offsets)
                    try:
                        candidate.requires(network)
                    except Refused:
                        continue
                    yield candidate

    def requires(self, network: Network) -> None:
        who = f"SplitUnits: units {', '.join(map(str, self.units)) or 'none'}"
        groups = {unit.group for unit in self.units}
        if len(groups) != 1:
            raise Refused(who, f"units of {len(groups)} groups", "units of one group")
        at = [network.index(unit) for unit in self.units]
        if at != sorted(set(at)):
            raise Refused(who, f"units stored at {at}", "different units in the order they are stored")
        name = self.units[0].group
        maps = fits(network, {name: self._map(network)})
        site = Site.around(network, name, maps)
        refuse_norm_across_units(who, network, site)
        refuse_max_targets(who, network, site)
        if self.offsets is not None:
            self._fits(who, network, site, maps, self.offsets)

    def _fits(self, who: str, network: Network, site: Site, maps: Mapping[str, UnitMap], offsets: Proposal) -> None:
        if offsets.structure != network.structure:
            raise StaleMorphism(
                who, "offsets for another structure", "ones made for this network", do="make them again"
            )
        if offsets.fan_out or offsets.delta:
            raise Refused(who, "offsets with a fan-out or delta", "a fan-in only: what leaves the units is halved")
        for name, offset in offsets.fan_in.items():
            if name not in _entering(network, site):
                raise Refused(f"{who}: offsets", f"bundle {name!r}", f"one of {', '.join(_entering(network, site))}")
            bundle = network.bundles[name]
            split = _split(maps[bundle.target])
            shape = slice_shape(network, name, entering=split.size)
            _check(f"{who}: offset of {name!r}", offset, shape)
            pattern = bundle.pattern
            if isinstance(pattern, Sparse) and pattern.weight_index is not None and bool(offset.any()):
                raise Refused(f"{who}: offset of {name!r}", "shared weights", "a weight of its own for every edge")
            if isinstance(pattern, (Sparse, Local2d)):
                kept = _spread(bundle, *network.shapes(bundle), split, offset)
                if int(kept.count_nonzero()) != int(offset.count_nonzero()):
                    raise Refused(f"{who}: offset of {name!r}", "an offset where there is no edge", "0 there")
        if offsets.bias is not None:
            for name in _biased(network, site):
                _check(f"{who}: offset of the bias of {name!r}", offsets.bias, (_split(maps[name]).size,))
            if not _biased(network, site):
                raise Refused(who, "offsets of a bias", "none, since no group of the site has a bias")

    def promise(self, network: Network) -> Promise:
        if self.offsets is not None:
            parts = [*self.offsets.fan_in.values(), *([] if self.offsets.bias is None else [self.offsets.bias])]
            if any(bool(offset.any()) for offset in parts):
                return FirstOrder()
        return SameFunction()

    def rewrite(self, edit: Edit) -> None:
        network, offsets = edit.before, self.offsets
        site = self.units[0].group
        maps = edit.rewire({site: self._map(network)})
        if offsets is None:
            return
        for name, offset in offsets.fan_in.items():
            bundle = network.bundles[name]
            units = maps[bundle.target]
            moved = _spread(bundle, *network.shapes(bundle), _split(units), offset).to(bundle.weight)
            weight = edit.tensor(bundle.tensor)
            for gather in edit.gathers(bundle.tensor):  # as the weights go: parents may have split as well
                weight = weight + gather.take(moved) * _signs(edit.bundles[name], units, edit.shapes(name)[1]).to(
                    weight
                )
            edit.write(bundle.tensor, weight)
        if offsets.bias is not None:
            for name in _biased(network, Site.around(network, site, maps)):
                bias, split = edit.tensor(f"bias.{name}"), torch.from_numpy(_split(maps[name]))
                whole = torch.zeros_like(network.tensors()[f"bias.{name}"]).index_copy(0, split, offsets.bias.to(bias))
                edit.write(
                    f"bias.{name}", bias + whole[torch.from_numpy(maps[name].index)] * _sign(maps[name]).to(bias)
                )

    def _map(self, network: Network) -> UnitMap:
        split = np.zeros(network.groups[self.units[0].group].units, bool)
        split[[network.index(unit) for unit in self.units]] = True
        index = np.repeat(np.arange(split.size), 1 + split)
        return UnitMap(index, np.where(split[index], 0.5, 1.0))


def _split(units: UnitMap) -> NDArray[np.int64]:
    """The old units that have two copies."""
    old, copies = np.unique(units.index, return_counts=True)
    return old[copies > 1]


def _sign(units: UnitMap) -> Tensor:
    """+1 for the first copy of a unit, -1 for the second."""
    second = np.r_[False, units.index[1:] == units.index[:-1]]
    return torch.from_numpy(np.where(second, -1.0, 1.0))


def _signs(bundle: Bundle, units: UnitMap, target: tuple[int, ...]) -> Tensor:
    """The sign of every weight of a bundle into split units, shaped to multiply it."""
    sign, pattern = _sign(units), bundle.pattern
    if isinstance(pattern, Sparse):
        return sign[torch.from_numpy(pattern.target // size(target[1:])).long()]
    rows = bundle.weight.shape[0] // target[0]  # dense rows are neurons
    return sign.repeat_interleave(rows).reshape(-1, *[1] * (bundle.weight.dim() - 1))


def _spread(
    bundle: Bundle, source: tuple[int, ...], target: tuple[int, ...], split: NDArray[np.int64], offset: Tensor
) -> Tensor:
    """The offset of the split units' rows in a tensor like the bundle's weights, 0 in all other rows and off edges."""
    pattern = bundle.pattern
    weight = torch.zeros_like(bundle.weight, dtype=offset.dtype)
    offset = offset.detach().to(weight.device)
    if isinstance(pattern, Sparse):
        row = np.full(target[0], -1)
        row[split] = np.arange(split.size)
        positions = size(target[1:])
        unit, position = np.divmod(pattern.target, positions)
        edge = np.flatnonzero(row[unit] >= 0)
        rows = torch.from_numpy(row[unit[edge]] * positions + position[edge]).long()
        at = torch.from_numpy(pattern.index[edge]).long()
        return weight.index_copy(0, at, offset[rows, torch.from_numpy(pattern.source[edge]).long()])
    rows_each = bundle.weight.shape[0] // target[0]
    rows = torch.from_numpy((split[:, None] * rows_each + np.arange(rows_each)).ravel())
    whole = weight.index_copy(0, rows, offset)
    if isinstance(pattern, Local2d):
        used = torch.zeros(whole.numel(), dtype=torch.bool)
        for _, _, w in pattern.edges(source, target):
            used[torch.from_numpy(w)] = True
        whole = whole * used.reshape(whole.shape).to(whole)
    return whole


def _entering(network: Network, site: Site) -> list[str]:
    """The bundles that enter the site's units, those of a loop of groups too."""
    inner = (name for name in site.inner if network.bundles[name].target in site.groups)
    return list(dict.fromkeys((*site.entering, *inner)))


def _biased(network: Network, site: Site) -> list[str]:
    """The groups of the site that a unit's bias belongs to: those that something enters."""
    targets = dict.fromkeys(network.bundles[name].target for name in _entering(network, site))
    return [name for name in targets if network.groups[name].bias is not None]


def _check(who: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise Refused(who, f"shape {tuple(tensor.shape)}", tuple(shape))
    if not bool(torch.isfinite(tensor).all()):
        raise BadData(who, "NaN or infinity", "finite values")


def _drawn(network: Network, site: Site, units: tuple[Unit, ...]) -> Proposal | None:
    """Fixed random offsets, for `places`; None where the units cannot split."""
    draw = torch.Generator().manual_seed(0)
    try:
        maps = close(network, {site.name: SplitUnits(units)._map(network)})
        site = Site.around(network, site.name, maps)
    except Refused:
        return None

    def normal(shape: tuple[int, ...]) -> Tensor:
        return 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64).to(network.dtype)

    fan_in = {}
    for name in _entering(network, site):
        bundle = network.bundles[name]
        split = _split(maps[bundle.target])
        pattern, shape = bundle.pattern, slice_shape(network, name, entering=split.size)
        if isinstance(pattern, Sparse):
            if pattern.weight_index is None:
                source, target = network.shapes(bundle)
                edges = torch.zeros(size(target), size(source), dtype=network.dtype)
                edges[pattern.target, pattern.source] = 1
                rows = (split[:, None] * size(target[1:]) + np.arange(size(target[1:]))).ravel()
                fan_in[name] = normal(shape) * edges[rows]
        elif isinstance(pattern, Local2d):
            ones = _spread(bundle, *network.shapes(bundle), split, torch.ones(shape, dtype=network.dtype))
            fan_in[name] = normal(shape) * ones[split]
        else:
            fan_in[name] = normal(shape)
    sizes = {_split(maps[name]).size for name in _biased(network, site)}
    bias = normal((sizes.pop(),)) if len(sizes) == 1 else None
    return Proposal(site.name, network.structure, "Random", fan_in, {}, bias)
