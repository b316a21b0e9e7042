"""Taking units away: the inverse of adding them."""

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
from irgrow.ir.pattern import size
from irgrow.ir.units import UnitMap, close, parts_of
from irgrow.passes.base import Pass, register
from irgrow.passes.wiring import Ints, leaving_weights, refuse_broken


@register
@dataclass(frozen=True)
class PruneUnits(Pass):
    """The units are gone, and those tied to them; where nothing left them, every output stays the same.

        a --W--> h --V--> b     becomes     h without the units, W without their rows, V without their columns

    `means` (one number per unit, measured by the caller) are what the units put out on average: each mean
    times the outgoing weights moves into the targets' biases, which is exact for units that are constant.

    Promise: SameFunction if all outgoing weights of the units (and of those tied to them) are 0, else Changes;
    Changes too under a layer or group norm and into a max, where a 0 counts.
    Refused: units of several groups, all units of a group, of an input or output or tied to one, some of a
    channel group only; an output left without inputs; means where a target has no bias, or where padding
    makes what would move differ between the positions of a target.
    """

    units: tuple[Unit, ...]
    means: tuple[float, ...] | None = None
    reference: ClassVar[str] = "NeST, arXiv:1711.02017 (magnitude-based pruning)"

    @classmethod
    def places(cls, network: Network) -> Iterator[PruneUnits]:
        for name, group in network.groups.items():
            units = [Unit(name, s) for s in group.serials.tolist()]
            alone = [cls((unit,)) for unit in units[:32]]
            silent = [p.units[0] for p in alone if p._applies(network) and p._silent(network)]
            for chosen in dict.fromkeys((tuple(silent), tuple(units[:1]), tuple(units[-2:]), _one_each(network, name))):
                if cls(chosen)._applies(network):
                    yield cls(chosen)

    def _applies(self, network: Network) -> bool:
        try:
            self.requires(network)
        except Refused:
            return False
        return True

    @property
    def reads_weights(self) -> bool:  # type: ignore[override]
        return self.means is not None

    def requires(self, network: Network) -> None:
        who = f"PruneUnits: units {', '.join(map(str, self.units)) or 'none'}"
        groups = {unit.group for unit in self.units}
        if len(groups) != 1:
            raise Refused(who, f"units of {len(groups)} groups", "units of one group")
        gone = self._gone(network)
        if np.unique(gone).size < gone.size:
            raise Refused(who, "one of them twice", "each once")
        if gone.size == network.groups[self.units[0].group].units:
            raise Refused(who, "all units of their group", "at least one that stays")
        if self.means is not None and (len(self.means) != gone.size or not np.isfinite(self.means).all()):
            raise Refused(f"{who}: means", self.means, f"{gone.size} finite numbers, one per unit")
        trial = Edit(network)
        self.rewrite(trial)
        refuse_broken(who, trial)

    def promise(self, network: Network) -> Promise:
        group = self.units[0].group
        for name in close(network, {group: self._map(network)}):
            norm = network.groups[name].norm
            if norm is not None and norm.across_units:
                return Changes(f"the {norm.kind} norm of group {name!r} was taken over the pruned units too")
        if self._silent(network):
            return SameFunction()
        return Changes("pruned units have outgoing weights, or feed a max")

    def rewrite(self, edit: Edit) -> None:
        if self.means is not None:
            self._compensate(edit)
        edit.rewire({self.units[0].group: self._map(edit.before)})

    def _gone(self, network: Network) -> Ints:
        return np.array([network.index(unit) for unit in self.units], np.int64)

    def _map(self, network: Network) -> UnitMap:
        return UnitMap(np.delete(np.arange(network.groups[self.units[0].group].units), self._gone(network)))

    def _silent(self, network: Network) -> bool:
        """Whether nothing leaves these units and those tied to them."""
        maps = close(network, {self.units[0].group: self._map(network)})
        for name, kept in maps.items():
            gone = np.setdiff1d(np.arange(network.groups[name].units), kept.index)
            for bundle in network.leaving(name):
                if bundle.weight.dim() == 0 or _ties(bundle, maps):
                    continue
                if network.groups[bundle.target].aggregation == "max":
                    return False
                if bool(leaving_weights(bundle, *network.shapes(bundle), gone).any()):
                    return False
        return True

    def _compensate(self, edit: Edit) -> None:
        """Adds mean * outgoing weight to the biases of the targets."""
        network, group = edit.before, self.units[0].group
        assert self.means is not None
        who = f"PruneUnits: units {', '.join(map(str, self.units))}: means"
        tied = [name for name in close(network, {group: self._map(network)}) if name != group]
        if tied:
            raise Refused(who, f"group {tied[0]!r}, whose units go too", "units that no others are tied to")
        constant = np.zeros(network.groups[group].units)
        constant[self._gone(network)] = self.means
        constant = np.repeat(constant, network.groups[group].positions)
        for bundle in network.leaving(group):
            target = network.groups[bundle.target]
            if target.bias is None or target.aggregation == "max":
                raise Refused(who, f"target {target.name!r} without a bias", "a bias that takes what the units gave")
            if f"bias.{target.name}" in network.frozen:
                raise Refused(who, f"target {target.name!r} with frozen biases", "biases that take what the units gave")
            s, t, w = bundle.pattern.all_edges(*network.shapes(bundle))
            given = constant[s] * bundle.weight.detach().double().flatten().cpu().numpy()[w]
            moved = np.bincount(t, given, size(target.shape)).reshape(target.units, -1)
            if np.ptp(moved, axis=1).max() > 1e-12 * max(1.0, float(np.abs(moved).max())):
                raise Refused(who, f"target {target.name!r}, whose positions would need different biases", "equal ones")
            bias = edit.tensor(f"bias.{target.name}")
            edit.write(f"bias.{target.name}", bias + torch.from_numpy(moved[:, 0]).to(bias))


def _one_each(network: Network, group: str) -> tuple[Unit, ...]:
    """One unit of every channel group."""
    try:
        parts = parts_of(network, group)
    except Refused:  # units that only go in blocks
        parts = 1
    serials = network.groups[group].serials.tolist()
    return tuple(Unit(group, s) for s in serials[:: max(1, len(serials) // parts)])


def _ties(bundle: Bundle, maps: dict[str, UnitMap]) -> bool:
    """Whether the bundle joins units that go together (a depthwise convolution)."""
    return bundle.pattern.couples and bundle.target in maps and bundle.weight.dim() > 1 and bundle.weight.shape[1] == 1
