"""`Plan`: which units split, which are added, which layers begin, and the passes that do all of it at once.

Firefly trains a network in which every candidate is present, then keeps a few. Both networks come from
`assemble`: residual layers first, then site by site from the outputs to the inputs, new units before
splits. Values are given in the coordinates of the network before; where the other end of a bundle has
grown as well they are carried along as weights are: a copy of a parent takes its share, a copy of a child
takes all, and units that are new on both sides are not joined.

Names of values: `split/<site>/<bundle>`, `in/<site>/<bundle>`, `out/<site>/<bundle>`, `layer_in/<group>`,
`layer_out/<group>`, and `split/<site>/bias`, `in/<site>/bias`, `layer_bias/<group>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from irgrow.growth.selection import downstream_first
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network, Unit
from irgrow.ir.pattern import Conv2d, Local2d, Shape, Sparse
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site, slice_shape
from irgrow.ir.units import UnitMap, blocks, close, fits, with_new_units
from irgrow.passes.add_block import AddResidual
from irgrow.passes.add_units import AddUnits
from irgrow.passes.base import Pass
from irgrow.passes.exactness import refuse_loops
from irgrow.passes.split_offset import SplitUnits


@dataclass(frozen=True)
class Plan:
    """`splits`: per site the units that split (as stored, ascending); `new`, `layers`: how many units each gets."""

    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    new: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    activation: str = "relu"  # of new layers
    kernel: int | None = 3

    def layer(self, group: str, proposal: Proposal | None = None) -> AddResidual:
        """The pass that begins the layer behind a group."""
        return AddResidual(group, self.layers[group], self.activation, self.kernel, proposal=proposal)

    def shapes(self, network: Network) -> dict[str, Shape]:
        """The shape of every value."""
        found: dict[str, Shape] = {}
        for site, units in self.splits.items():
            for name in Site.of(network, site).entering:
                if _moves(network, name):
                    found[f"split/{site}/{name}"] = slice_shape(network, name, entering=len(units))
            if _biased(network, site):
                found[f"split/{site}/bias"] = (len(units),)
        for site, count in self.new.items():
            ends = Site.of(network, site)
            found |= {f"in/{site}/{n}": slice_shape(network, n, entering=count) for n in ends.entering}
            if _biased(network, site):
                found[f"in/{site}/bias"] = (count,)
            found |= {f"out/{site}/{n}": slice_shape(network, n, leaving=count) for n in ends.leaving}
        for group, count in self.layers.items():
            into, outof = self.layer(group).shapes(network)
            found |= {f"layer_in/{group}": into, f"layer_out/{group}": outof, f"layer_bias/{group}": (count,)}
        return found

    def masks(self, network: Network) -> dict[str, Tensor]:
        """Where a split's offsets have an edge, for values where some entries have none."""
        found = {}
        for site, units in self.splits.items():
            for name in Site.of(network, site).entering:
                bundle = network.bundles[name]
                source, target = network.shapes(bundle)
                if isinstance(bundle.pattern, Local2d):
                    used = torch.from_numpy(bundle.pattern.used(source))
                    found[f"split/{site}/{name}"] = used.expand(len(units), source[0], *used.shape)
                elif isinstance(bundle.pattern, Sparse) and _moves(network, name):
                    mask = torch.zeros(target[0], int(np.prod(source)), dtype=torch.bool)
                    mask[bundle.pattern.target, bundle.pattern.source] = True
                    found[f"split/{site}/{name}"] = mask[list(units)]
        return found


def assemble(network: Network, plan: Plan, values: Mapping[str, Tensor], method: str) -> tuple[list[Pass], Network]:
    """The passes that carry out the plan with these values (0 where there is no edge), and the network they make."""
    masks = plan.masks(network)
    values = {n: v * masks[n].to(v) if n in masks else v for n, v in values.items()}
    steps: list[Pass] = []
    now = network
    origin: dict[str, UnitMap] = {}

    def take(step: Pass, maps: Mapping[str, UnitMap]) -> None:
        nonlocal now
        for name, units in maps.items():
            origin[name] = _composed(origin.get(name, _same(now, name)), units)
        steps.append(step)
        now = step(now).after

    for group in plan.layers:
        bias = values[f"layer_bias/{group}"]
        into, outof = {group: values[f"layer_in/{group}"]}, {group: values[f"layer_out/{group}"]}
        take(plan.layer(group, Proposal(group, now.structure, method, into, outof, bias)), {})
    for site in downstream_first(network, dict.fromkeys([*plan.splits, *plan.new])):
        if plan.new.get(site):
            count, ends = plan.new[site], Site.of(now, site)
            into = {n: _entering(now, f"in/{site}/{n}", n, count, values, origin) for n in ends.entering}
            outof = {n: _leaving(now, f"out/{site}/{n}", n, count, values, origin) for n in ends.leaving}
            made = Proposal(site, now.structure, method, into, outof, values.get(f"in/{site}/bias"))
            take(AddUnits(made), fits(now, {site: with_new_units(now, site, count)}))
        if plan.splits.get(site):
            at = plan.splits[site]
            offsets = {
                n: _entering(now, f"split/{site}/{n}", n, len(at), values, origin)
                for n in Site.of(network, site).entering
                if f"split/{site}/{n}" in values
            }
            made = Proposal(site, now.structure, method, offsets, {}, values.get(f"split/{site}/bias"))
            serials = network.groups[site].serials
            step = SplitUnits(tuple(Unit(site, int(serials[i])) for i in at), made)
            take(step, close(now, {site: step._map(now)}))
    return steps, now


def why_not(network: Network, site: str, *, new: bool) -> Refused | None:
    """Why units of this site cannot be chosen one by one to split (or to be added), or None."""
    where = f"site {site!r}"
    try:
        ends = Site.of(network, site)
        refuse_loops(where, network, ends)
        if blocks(network, dict.fromkeys(ends.groups)) > 1:
            raise Refused(where, "channel groups that must grow equally", "units that can be chosen one by one")
        for name in ends.entering:
            bundle = network.bundles[name]
            if network.groups[bundle.target].units != network.groups[site].units:
                raise Refused(where, f"groups {site!r} and {bundle.target!r} of different sizes", "one size")
        for name in (*ends.entering, *ends.leaving):
            pattern = network.bundles[name].pattern
            if isinstance(pattern, Conv2d) and pattern.channel_groups > 1:
                raise Refused(where, f"channel groups in {name!r}", "a convolution without them")
        for name in ends.groups:
            norm = network.groups[name].norm
            if norm is not None and norm.across_units:
                raise Refused(where, f"a {norm.kind} norm of {name!r}", "no norm across units, or a batch norm")
        if new:
            into = {n: torch.zeros(slice_shape(network, n, entering=1)) for n in ends.entering}
            outof = {n: torch.zeros(slice_shape(network, n, leaving=1)) for n in ends.leaving}
            AddUnits(Proposal(site, network.structure, "none", into, outof)).requires(network)
        else:
            serials = network.groups[site].serials.tolist()
            SplitUnits(tuple(Unit(site, s) for s in serials)).requires(network)
    except Refused as refused:
        return refused
    return None


def _entering(
    now: Network, key: str, name: str, count: int, values: Mapping[str, Tensor], origin: Mapping[str, UnitMap]
) -> Tensor:
    """A fan-in slice of the network as it is now: columns follow what has become of the source's units."""
    if key not in values:
        return torch.zeros(slice_shape(now, name, entering=count), dtype=now.dtype)
    source = now.groups[now.bundles[name].source]
    return _carried(values[key], 1, origin.get(source.name), source.positions, shared=True)


def _leaving(
    now: Network, key: str, name: str, count: int, values: Mapping[str, Tensor], origin: Mapping[str, UnitMap]
) -> Tensor:
    """A fan-out slice of the network as it is now: rows follow what has become of the target's units."""
    if key not in values:
        return torch.zeros(slice_shape(now, name, leaving=count), dtype=now.dtype)
    target = now.groups[now.bundles[name].target]
    return _carried(values[key], 0, origin.get(target.name), target.positions, shared=False)


def _carried(value: Tensor, axis: int, units: UnitMap | None, positions: int, *, shared: bool) -> Tensor:
    """The value with its entries along `axis` copied as these units were; 0 for units that are new."""
    if units is None:
        return value
    if value.dim() == 2:  # dense rows and columns are neurons, those of convolutions are channels
        units = units.neurons(positions)
    index = torch.from_numpy(units.index).to(value.device)
    factor = (index >= 0).to(value)
    if shared and units.share is not None:
        factor = factor * torch.from_numpy(units.share).to(value)
    shape = [-1 if a == axis else 1 for a in range(value.dim())]
    return value.index_select(axis, index.clamp(min=0)) * factor.reshape(shape)


def _same(network: Network, name: str) -> UnitMap:
    return UnitMap(np.arange(network.groups[name].units))


def _composed(first: UnitMap, then: UnitMap) -> UnitMap:
    """Which units of the beginning the units are after both changes."""
    kept = then.index >= 0
    index = np.where(kept, first.index[np.where(kept, then.index, 0)], -1)
    shares = [m.share if m.share is not None else np.ones(m.units) for m in (first, then)]
    share = np.where(kept, shares[0][np.where(kept, then.index, 0)], 1.0) * shares[1]
    return UnitMap(index, share)


def _moves(network: Network, name: str) -> bool:
    """Whether a split can move apart along this bundle (shared sparse weights cannot)."""
    pattern = network.bundles[name].pattern
    return not (isinstance(pattern, Sparse) and pattern.weight_index is not None)


def _biased(network: Network, site: str) -> bool:
    targets = {network.bundles[name].target for name in Site.of(network, site).entering}
    return any(network.groups[t].bias is not None for t in targets)
