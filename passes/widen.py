"""Widening a group by copies of its units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused
from irgrow.ir.morphism import FirstOrder, Promise, SameFunction
from irgrow.ir.network import Network, Unit
from irgrow.ir.pattern import Local2d, Sparse, size
from irgrow.ir.site import Site
from irgrow.ir.units import UnitMap, close, fits, parts_of, with_new_units
from irgrow.passes.base import Pass, register
from irgrow.passes.exactness import refuse_max_targets, refuse_norm_across_units


@register
@dataclass(frozen=True)
class WidenUnits(Pass):
    """The group has more units, copies of those it had, which share what leaves them; outputs stay the same.

        a --w--> u --v--> b     becomes     u, copy, copy: each fed by w, each with v/3

    Which units are copied is drawn from `seed`, as in the paper, or given by `copies` (a unit for each new
    one). Copies stand at the end, or at the end of each channel group where there are several. With `noise`
    > 0, normal numbers of that standard deviation are added to what enters the copies, which breaks the tie
    between them.

    Promise: SameFunction; with noise FirstOrder. Gradient factors are those without noise: 1 / number of
    copies for what enters, 1 for what leaves.
    Refused: an input or output or a group tied to one, a layer or group norm, a target that aggregates by max,
    channel groups that would grow unequally.
    Source: Chen et al., Net2WiderNet, arXiv:1511.05641, section 2.2 and algorithm 1.
    """

    group: str
    units: int = 1
    seed: int = 0
    copies: tuple[Unit, ...] | None = None
    noise: float = 0.0
    reference: ClassVar[str] = "Net2Net, arXiv:1511.05641, section 2.2"

    @classmethod
    def places(cls, network: Network) -> Iterator[WidenUnits]:
        for site in Site.all(network):
            for units in (3, 12):  # 12: divisible by the usual channel groups
                try:
                    cls(site.name, units).requires(network)
                except Refused:
                    continue
                yield cls(site.name, units)
                yield cls(site.name, units, noise=0.1)
                break

    def requires(self, network: Network) -> None:
        who = f"WidenUnits: group {self.group!r}"
        if self.units < 1:
            raise Refused(who, f"{self.units} units", "at least 1")
        if not (np.isfinite(self.noise) and self.noise >= 0):
            raise Refused(who, f"noise {self.noise}", "a finite number, 0 or more")
        site = Site.of(network, self.group)
        refuse_norm_across_units(who, network, site)
        refuse_max_targets(who, network, site)
        if self.copies is not None:
            if len(self.copies) != self.units:
                raise Refused(who, f"{len(self.copies)} copies", f"{self.units}, one per new unit")
            for unit in self.copies:
                if unit.group != self.group:
                    raise Refused(who, f"a copy of {unit}", "copies of its own units")
                network.index(unit)
        fits(network, {self.group: self._map(network)})

    def promise(self, network: Network) -> Promise:
        return FirstOrder() if self.noise else SameFunction()

    def rewrite(self, edit: Edit) -> None:
        network = edit.before
        maps = edit.rewire({self.group: self._map(network)})
        if self.noise == 0:
            return
        fresh = close(network, {self.group: with_new_units(network, self.group, self.units)})
        draw = torch.Generator().manual_seed(self.seed)
        site = Site.of(network, self.group)
        for name in dict.fromkeys((*site.entering, *site.inner)):
            bundle = edit.bundles[name]
            if bundle.target not in maps:
                continue
            noise = self.noise * torch.randn(bundle.weight.shape, generator=draw, dtype=torch.float64)
            new = fresh[bundle.target].fresh
            assert maps[bundle.target].units == fresh[bundle.target].units
            source, target = edit.shapes(name)
            pattern = bundle.pattern
            moved = torch.zeros(bundle.weight.shape, dtype=torch.bool)
            if isinstance(pattern, Sparse):
                edges = np.isin(pattern.target // size(target[1:]), new)
                moved[torch.from_numpy(pattern.index[edges].astype(np.int64))] = True
            else:
                each = bundle.weight.shape[0] // target[0]
                moved[torch.from_numpy((new[:, None] * each + np.arange(each)).ravel())] = True
            if isinstance(pattern, Local2d):
                used = torch.zeros(moved.numel(), dtype=torch.bool)
                for _, _, w in pattern.edges(source, target):
                    used[torch.from_numpy(w)] = True
                moved &= used.reshape(moved.shape)
            weight = bundle.weight
            edit.write(bundle.tensor, weight + (noise * moved).to(weight))

    def _map(self, network: Network) -> UnitMap:
        index = with_new_units(network, self.group, self.units).index.copy()
        new = np.flatnonzero(index < 0)
        if self.copies is not None:
            index[new] = [network.index(unit) for unit in self.copies]
        else:
            part = network.groups[self.group].units // parts_of(network, self.group)
            draw = np.random.default_rng(self.seed)
            # a new unit copies one of its own channel group, which begins where its old units begin
            begins = np.maximum.accumulate(np.where(index >= 0, index // part * part, 0))[new]
            index[new] = begins + draw.integers(0, part, new.size)
        return UnitMap(index, 1.0 / np.bincount(index)[index])
