"""Copies of existing units, exact (Net2Net) or with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.geometry import Geometry
from irgrow.growth.methods.base import proposal, require_choice, require_units
from irgrow.growth.methods.draws import normal
from irgrow.growth.methods.with_model import Bindable, require_model
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.pattern import Sparse
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.ir.statistics import Statistics
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class Copies(Bindable):
    """Each new unit is a copy of a random existing one; without noise outputs stay the same.

        a --w--> u --v--> b     becomes     u: v/2, copy: v/2, both fed by w       (fan_out="share")
                                            u: v,   copy: 0,   both fed by w       (fan_out="zero")

    A unit that is copied c times shares its fan-out in c + 1 equal parts; the old unit's part arrives as
    the proposal's `delta`. `noise`: normal, with that standard deviation relative to the root mean square
    of the copied fan-in, on the copies' fan-in (with their bias); it is what lets equal units part.
    A batch norm is folded into the copy's fan-in. No data is read. In `fit` with `Growth(refine=False)`: a
    line search would change copies that are exact.

    `SplitUnit` is the same as a pass, unit by unit, also through depthwise convolutions.
    Refused: concatenations, depthwise convolutions, norms or biases along the site that a new unit would not
    have, bundles from the site into itself, shared sparse weights (with "share").
    Source: Net2WiderNet, arXiv:1511.05641, section 2.2 (random units, noise).
    """

    units: int = 1
    noise: float = 0.0
    fan_out: str = "share"
    seed: int = 0
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_choice(self, "fan_out", ("share", "zero"))
        require_units(self)
        if not self.noise >= 0:
            raise Refused("Copies: noise", self.noise, "0 or more")

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal:
        """The copies; the seed says which units."""
        network = require_model(self, statistics, model)
        geometry = Geometry(network, Site.of(network, statistics.site))
        self._refuse(geometry, statistics)
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        units = network.groups[geometry.entries[0].group].units
        chosen = torch.randint(units, (self.units,), generator=draw)
        alpha = self._fan_in(geometry, statistics, chosen)
        if self.noise:
            size = alpha.norm(dim=0) / math.sqrt(alpha.shape[0])
            alpha = alpha + self.noise * size * normal(draw, *alpha.shape, like=alpha)
        share = 1.0 / (1.0 + torch.bincount(chosen, minlength=units).double())
        omega, delta = _fan_out(network, geometry, statistics, chosen, share)
        if self.fan_out == "zero":
            omega, delta = torch.zeros_like(omega), {}
        notes = (f"copies of units {', '.join(map(str, chosen.tolist()))}",)
        return replace(proposal(self, replace(statistics, notes=()), alpha, omega, notes=notes), delta=delta)

    def _refuse(self, geometry: Geometry, statistics: Statistics) -> None:
        network, who = geometry.network, f"Copies: site {statistics.site!r}"
        entered = {e.group for e in geometry.entries}
        split = "use SplitUnit, which copies everything along the site"
        for step in geometry.steps:
            if step.depthwise:
                raise Refused(who, f"a depthwise convolution into {step.group!r}", "none along the site", do=split)
        for name in geometry.site.groups:
            group = network.groups[name]
            if name not in entered and (group.bias is not None or group.norm is not None):
                raise Refused(who, f"a bias or norm of {name!r}, which a new unit would not have", "none", do=split)
        sizes = {name: network.groups[name].units for name in geometry.site.groups}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name!r} of {units} units" for name, units in sizes.items())
            raise Refused(who, f"a concatenation: {found}", "groups of one size", do=split)
        both = sorted({*geometry.site.inner, *(set(geometry.site.entering) & set(geometry.site.leaving))})
        if both:
            raise Refused(who, f"bundle {both[0]!r} from the site into itself", "none", do=split)
        for name in geometry.site.leaving:
            pattern = network.bundles[name].pattern
            if self.fan_out == "share" and isinstance(pattern, Sparse) and pattern.weight_index is not None:
                raise Refused(who, f"shared weights of {name!r}", "a weight of its own for every edge")
        assert geometry.slopes  # refuses norms across units

    def _fan_in(self, geometry: Geometry, statistics: Statistics, chosen: Tensor) -> Tensor:
        """`[features, units]` such that a new unit of scale 1, mean 0, variance 1 says what the old one says."""
        network, who = geometry.network, f"Copies: site {statistics.site!r}"
        parts, biases = [], []
        for entry in geometry.entries:
            bundle, group = network.bundles[entry.block.name.removeprefix("weight.")], network.groups[entry.group]
            weight = bundle.weight.detach().double()
            if isinstance(bundle.pattern, Sparse):
                whole = weight.new_zeros(group.units, entry.block.width)
                at = (bundle.pattern.target, bundle.pattern.source, bundle.pattern.index)
                t, s, w = (torch.from_numpy(i).long().to(weight.device) for i in at)
                weight = whole.index_put((t, s), weight[w], accumulate=True)
            factor, shift = weight.new_ones(group.units), weight.new_zeros(group.units)
            bias = weight.new_zeros(group.units) if group.bias is None else group.bias.detach().double()
            if group.norm is not None:
                norm = group.norm
                assert norm.mean is not None and norm.variance is not None
                root = math.sqrt(1.0 + norm.eps)
                factor = root * norm.scale.detach().double() / (norm.variance.double() + norm.eps).sqrt()
                shift = root * norm.shift.detach().double() - factor * norm.mean.double()
            parts.append((weight.reshape(group.units, -1) * factor[:, None])[chosen.to(weight.device)])
            biases.append((factor * bias + shift)[chosen.to(weight.device)])
        if any(not torch.allclose(b, biases[0], rtol=1e-6, atol=1e-12) for b in biases[1:]):
            raise Refused(who, "a unit with different biases in several groups", "one bias", do="use SplitUnit")
        if statistics.bias:
            parts.append(biases[0][:, None])
        elif any(bool(b.any()) for b in biases):
            raise Refused(who, "a constant (shift or mean of a batch norm)", "a group with a bias to hold it")
        return torch.cat(parts, 1).mT


def _fan_out(
    network: Network, geometry: Geometry, statistics: Statistics, chosen: Tensor, share: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`[columns, units]`: each copy's part of the fan-out, and what the copied units give away, by tensor."""
    rows, delta = [], {}
    for way in geometry.exits:
        bundle, units = network.bundles[way.block.name.removeprefix("weight.")], network.groups[way.group].units
        weight = bundle.weight.detach().double()
        part = share.to(weight.device)
        if isinstance(bundle.pattern, Sparse):
            positions = network.groups[way.group].positions
            t, s, w = (
                torch.from_numpy(i).long().to(weight.device)
                for i in (bundle.pattern.target, bundle.pattern.source, bundle.pattern.index)
            )
            if bundle.pattern.weight_index is None:
                delta[bundle.tensor] = weight * (part[s // positions] - 1.0)
            whole = weight.new_zeros(way.block.outputs, units * positions).index_put((t, s), weight[w], accumulate=True)
        else:
            kept = part.repeat_interleave(weight.shape[1] // units)
            shape = (1, -1, *[1] * (weight.dim() - 2))
            delta[bundle.tensor] = weight * (kept - 1.0).reshape(shape)
            whole = weight
        held = whole.reshape(way.block.outputs, units, -1)[:, chosen.to(weight.device)]  # [out, units, taps]
        held = held * part[chosen.to(weight.device)][:, None]
        if way.block.tap is not None:
            held = held[:, :, way.block.tap : way.block.tap + 1]
        rows.append(held.mT.reshape(-1, chosen.numel()))
    return torch.cat(rows), delta
