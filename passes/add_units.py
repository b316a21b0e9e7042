"""Adding the units of a proposal to a site: the one structural pass behind every growth method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, Refused, StaleMorphism
from irgrow.ir.morphism import Changes, FirstOrder, Promise, SameFunction
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Conv2d, Dense, Local2d, Sparse, size
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site, slice_shape
from irgrow.ir.units import UnitMap, fits, with_new_units
from irgrow.passes.base import Pass, register
from irgrow.passes.exactness import refuse_max_targets
from irgrow.passes.wiring import refuse_broken


@register
@dataclass(frozen=True)
class AddUnits(Pass):
    """The site has the proposal's units in addition; at zero fan-out (or zero fan-in) outputs stay the same.

        a --W--> h --V--> b     becomes     [h; h'] with W' = [W; fan_in], V' = [V, fan_out] (+ delta)

    Works at any site: flat or convolutional, through pooling and flattening, residual sums (all tied groups
    grow), depthwise convolutions (a new channel's kernel is 1 at the centre tap) and batch norm (a new unit
    has scale 1, shift 0, mean 0, variance 1). A grouped convolution or group norm at the site makes every
    channel group grow equally. Sparse bundles get explicit edges to all neurons at their other end.

    In a loop of groups (an insertion-grown graph) new units stand beside the loop: fed and read by what lies
    outside of it. The sparse bundles inside (`Site.inner`) may be named in `fan_in` or `fan_out` as well,
    wherever that closes no cycle of neurons: units that read every old one feed none of these, and so on.

    Promise: SameFunction if nothing can reach the targets (fan-out zero, or fan-in zero with sigma(0) = 0)
    and there is no delta (which leaves frozen entries alone); Changes under a layer or group norm; else
    FirstOrder in what is fresh.
    Refused: a target that aggregates by max, edges that would close a cycle of neurons, shapes that do not fit.
    """

    proposal: Proposal
    reference: ClassVar[str] = "GradMax, arXiv:2201.05125, section 3; TINY, Verbockhaven et al. 2024"

    @classmethod
    def places(cls, network: Network) -> Iterator[AddUnits]:
        for site in Site.all(network):
            for units in (2, 12):  # 12: divisible by the usual channel groups
                try:
                    drawn = _drawn(network, site, units)
                    cls(drawn).requires(network)
                except Refused:
                    continue
                yield cls(drawn)
                yield cls(drawn.scaled(1.0, 0.0))
                yield from _inside(network, site, drawn)
                break

    def requires(self, network: Network) -> None:
        p, who = self.proposal, f"AddUnits: site {self.proposal.site!r}"
        if p.structure != network.structure:
            raise StaleMorphism(who, "a proposal for another structure", "one made for this network", do="probe again")
        site = Site.of(network, p.site)
        refuse_max_targets(who, network, site, unused={*site.inner} - p.fan_out.keys())
        maps = _maps(network, site, p.units)
        into = [name for name in site.inner if network.bundles[name].target in site.groups]
        outof = [name for name in site.inner if network.bundles[name].source in site.groups]
        _same_names(who, "fan-in", p.fan_in.keys(), site.entering, into)
        _same_names(who, "fan-out", p.fan_out.keys(), site.leaving, outof)
        for name, tensor in p.fan_in.items():
            new = maps[network.bundles[name].target].fresh.size
            _fits(f"{who}: fan-in of {name!r}", tensor, slice_shape(network, name, entering=new))
        for name, tensor in p.fan_out.items():
            new = maps[network.bundles[name].source].fresh.size
            _fits(f"{who}: fan-out of {name!r}", tensor, slice_shape(network, name, leaving=new))
        if p.bias is not None:
            _fits(f"{who}: bias", p.bias, (p.units,))
        if p.bias is not None and bool(p.bias.any()) and not _biased(network, site):
            raise Refused(who, "a bias for new units", "none, since no group of the site has a bias")
        current = network.tensors()
        for name, tensor in p.delta.items():
            if name not in current:
                raise Refused(f"{who}: delta", f"tensor {name!r}", f"one of {', '.join(current)}")
            _fits(f"{who}: delta of {name!r}", tensor, tuple(current[name].shape))
        if _may_close_a_cycle(network, site, p):
            trial = Edit(network)
            self.rewrite(trial)
            refuse_broken(who, trial)

    def promise(self, network: Network) -> Promise:
        p, site = self.proposal, Site.of(network, self.proposal.site)
        for name in site.groups:
            norm = network.groups[name].norm
            if norm is not None and norm.across_units:
                return Changes(f"the {norm.kind} norm of group {name!r} is taken over the new units too")
        if not any(bool(d.any()) for d in p.delta.values()):
            quiet_out = not any(bool(w.any()) for w in p.fan_out.values())
            parts = [*p.fan_in.values(), *([] if p.bias is None else [p.bias])]
            quiet_in = not any(bool(w.any()) for w in parts)
            at_zero = all(network.groups[name].function.at_zero == 0 for name in site.groups)
            if quiet_out or (quiet_in and at_zero):
                return SameFunction()
        return FirstOrder()

    def rewrite(self, edit: Edit) -> None:
        p = self.proposal
        site = Site.of(edit.before, p.site)
        maps = edit.rewire({site.name: with_new_units(edit.before, site.name, p.units)})
        for name, tensor in p.fan_in.items():
            _place(edit, edit.bundles[name], tensor, maps, 0)
        for name, tensor in p.fan_out.items():
            _place(edit, edit.bundles[name], tensor, maps, 1)
        for bundle in list(edit.bundles.values()):
            inside = bundle.source in maps and bundle.name not in (*site.entering, *site.leaving, *site.inner)
            if inside and isinstance(bundle.pattern, Conv2d):
                _centre(edit, bundle, maps[bundle.target])
        if p.bias is not None:
            for name in _biased(edit.before, site):
                new = torch.from_numpy(maps[name].fresh)
                value = edit.tensor(f"bias.{name}")
                edit.write(f"bias.{name}", value.index_copy(0, new, p.bias.detach().to(value)))
        for name, change in p.delta.items():
            edit.write(name, _grown(edit, name, change, maps))


def _maps(network: Network, site: Site, units: int) -> dict[str, UnitMap]:
    return fits(network, {site.name: with_new_units(network, site.name, units)})


def _biased(network: Network, site: Site) -> list[str]:
    """The groups of the site that a new unit's bias belongs to: those that something enters."""
    targets = dict.fromkeys(network.bundles[name].target for name in site.entering)
    return [name for name in targets if network.groups[name].bias is not None]


def _place(edit: Edit, bundle: Bundle, values: Tensor, maps: dict[str, UnitMap], axis: int) -> None:
    """Writes the new rows (axis 0) or columns (axis 1) of a bundle's weights.

    Where both ends grow, new rows meet old columns and old rows new columns; new units do not feed new units.
    """
    source = edit.groups[bundle.source].shape
    rows = _ends(edit, bundle, bundle.target, maps, fresh=axis == 0)
    columns = _ends(edit, bundle, bundle.source, maps, fresh=axis == 1)
    if isinstance(bundle.pattern, Sparse):
        t, s = np.meshgrid(rows, columns, indexing="ij")
        edit.add_edges(bundle.name, s.ravel(), t.ravel(), values)
        return
    columns = columns[: values.shape[1]]  # a grouped convolution counts its inputs within each channel group
    weight = bundle.weight.detach().clone()
    at = torch.from_numpy(rows)[:, None], torch.from_numpy(columns)
    weight[at] = values.detach().to(weight)
    if isinstance(bundle.pattern, Local2d):
        weight *= torch.from_numpy(bundle.pattern.used(source)).to(weight)  # no edge there
    edit.write(bundle.tensor, weight)


def _ends(edit: Edit, bundle: Bundle, group: str, maps: dict[str, UnitMap], *, fresh: bool) -> NDArray[np.int64]:
    """The fresh or else the old rows or columns that belong to one end of a bundle, as its weight counts them."""
    shape = edit.groups[group].shape
    flat = isinstance(bundle.pattern, (Dense, Sparse))
    if group not in maps:
        return np.arange(size(shape) if flat else shape[0])
    units = maps[group].neurons(size(shape[1:])) if flat else maps[group]
    return units.fresh if fresh else np.flatnonzero(units.index >= 0)


def _centre(edit: Edit, bundle: Bundle, units: UnitMap) -> None:
    """New channels of a depthwise convolution pass on their input: 1 at the centre tap."""
    kernel: Any = bundle.pattern
    weight = bundle.weight.detach().clone()
    middle = 0, kernel.kernel[0] // 2, kernel.kernel[1] // 2
    value: Any = 1.0
    if isinstance(kernel, Local2d):
        used = kernel.used(edit.shapes(bundle.name)[0])[middle[1:]]
        value = torch.from_numpy(used).to(weight)
    weight[torch.from_numpy(units.fresh), *middle] = value
    edit.write(bundle.tensor, weight)


def _grown(edit: Edit, name: str, change: Tensor, maps: dict[str, UnitMap]) -> Tensor:
    """The tensor plus a change of its old entries."""
    after = edit.tensor(name)
    for gather in edit.gathers(name):
        after = after + gather.take(change.detach().to(after))
    return after


def _may_close_a_cycle(network: Network, site: Site, p: Proposal) -> bool:
    """Whether new units have edges inside a loop of groups."""
    loops = [names for names, cyclic in network.components if cyclic and {*names} & {*site.groups}]
    used = [network.bundles[name] for name in (*p.fan_in, *p.fan_out)]
    return any({b.source, b.target} <= {*names} for b in used for names in loops)


def _inside(network: Network, site: Site, drawn: Proposal) -> Iterator[AddUnits]:
    """The proposal with edges in one inner bundle too, on either side where no cycle arises."""
    for name in site.inner:
        for enters in (True, False):
            try:
                ends = {"entering": drawn.units} if enters else {"leaving": drawn.units}
                edges = {name: torch.full(slice_shape(network, name, **ends), 0.3, dtype=network.dtype)}
                into = {**drawn.fan_in, **(edges if enters else {})}
                outof = {**drawn.fan_out, **({} if enters else edges)}
                candidate = AddUnits(replace(drawn, fan_in=into, fan_out=outof))
                candidate.requires(network)
            except Refused:
                continue
            yield candidate


def _same_names(who: str, what: str, found: Any, expected: tuple[str, ...], allowed: Sequence[str]) -> None:
    if not {*expected} <= {*found} <= {*expected, *allowed}:
        also = f", and at most for {sorted(allowed)} besides" if allowed else ""
        raise Refused(f"{who}: {what}", f"weights for {sorted(found)}", f"exactly for {sorted(expected)}{also}")


def _fits(who: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise Refused(who, f"shape {tuple(tensor.shape)}", tuple(shape))
    if not bool(torch.isfinite(tensor).all()):
        raise BadData(who, "NaN or infinity", "finite values")


def _drawn(network: Network, site: Site, units: int) -> Proposal:
    """A fixed random proposal, for `places`."""
    draw = torch.Generator().manual_seed(0)
    maps = _maps(network, site, units)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64).to(network.dtype)

    fan_in = {
        n: normal(slice_shape(network, n, entering=maps[network.bundles[n].target].fresh.size)) for n in site.entering
    }
    fan_out = {
        n: normal(slice_shape(network, n, leaving=maps[network.bundles[n].source].fresh.size)) for n in site.leaving
    }
    bias = normal((units,)) if _biased(network, site) else None
    return Proposal(site.name, network.structure, "Random", fan_in, fan_out, bias)
