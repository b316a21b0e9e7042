"""Splitting a unit into two that share what leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network, Unit
from irgrow.ir.site import Site
from irgrow.ir.units import UnitMap, fits
from irgrow.passes.base import Pass, register
from irgrow.passes.exactness import refuse_max_targets, refuse_norm_across_units


@register
@dataclass(frozen=True)
class SplitUnit(Pass):
    """The unit becomes two that share its outgoing weights; every output stays the same.

        a --w--> u --v--> b     becomes     u: share*v, twin: (1 - share)*v, both fed by w

    The twin stands directly behind the unit and has a serial of its own. Units tied to it (pooling,
    residual sums, depthwise convolutions) split along. Exact in real arithmetic; in floats the sum is
    reassociated, hence the tolerance. The gradient of the copied fan-in is share (1 - share) times the
    old one; that of the fan-out is the old one.

    Refused: a unit of an input or output or tied to one, a layer or group norm over the units, a target
    that aggregates by max.
    Source: Net2WiderNet, arXiv:1511.05641, section 2.2; Firefly (eps = 0), equation 2.
    """

    unit: Unit
    share: float = 0.5
    reference: ClassVar[str] = "Net2Net, arXiv:1511.05641, section 2.2"

    @classmethod
    def places(cls, network: Network) -> Iterator[SplitUnit]:
        for site in Site.all(network):
            for serial in network.groups[site.name].serials.tolist():
                candidate = cls(Unit(site.name, serial))
                try:
                    candidate.requires(network)
                except Refused:
                    continue  # ranges of a concatenation differ
                yield candidate

    def requires(self, network: Network) -> None:
        network.index(self.unit)
        if not np.isfinite(self.share):
            raise Refused(f"SplitUnit: unit {self.unit}", f"share {self.share}", "a finite number")
        maps = fits(network, {self.unit.group: self._map(network)})
        site = Site.around(network, self.unit.group, maps)
        refuse_norm_across_units(f"SplitUnit: unit {self.unit}", network, site)
        refuse_max_targets(f"SplitUnit: unit {self.unit}", network, site)

    def rewrite(self, edit: Edit) -> None:
        edit.rewire({self.unit.group: self._map(edit.before)})

    def _map(self, network: Network) -> UnitMap:
        at, units = network.index(self.unit), network.groups[self.unit.group].units
        share = np.ones(units + 1)
        share[at], share[at + 1] = self.share, 1.0 - self.share
        return UnitMap(np.insert(np.arange(units), at, at), share)
