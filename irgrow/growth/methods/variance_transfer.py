"""Variance transfer: new weights scaled so that activations and gradients keep their size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.entries import Entrance
from irgrow.growth.methods.base import columns, proposal, require_units
from irgrow.growth.methods.draws import normal
from irgrow.growth.methods.with_model import Bindable, require_data, require_model
from irgrow.ir.errors import Refused
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class VarianceTransfer(Bindable):
    """Normal fan-in and fan-out, at the size of what is there: new units speak, and learn, as loudly as old ones.

    fan-in      scaled so that each new pre-activation has the mean square of the existing ones on the data
    fan-out     each column with the mean norm of the existing ones, so gradients reach the new fan-in at
                the size at which they reach the old
    pairs       units in pairs with equal fan-in and opposite fan-out, which cancel: outputs stay the same,
                and the two part with the first step. Off: the units speak at once
    rescale     (without pairs) old and new fan-outs times sqrt(m / (m + k)), so that the targets'
                pre-activations keep their size as m units become m + k; the old ones' part is `delta`

    In `fit` with `Growth(refine=False)`: looking ahead turns single units and rescales them.
    Off the paper, which draws with the variances of fresh layers, sizes are measured here.
    Refused: an odd number of units in pairs, sites entered at several groups, norms across units.
    Source: Yuan, Savarese and Maire, arXiv:2306.12700 (variance transfer; growth by cancelling pairs).
    """

    units: int = 2
    pairs: bool = True
    rescale: bool = True
    seed: int = 0
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_units(self)
        if self.pairs and self.units % 2:
            raise Refused("VarianceTransfer: units", f"{self.units} in pairs", "an even number, or pairs=False")

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal:
        """The units, their size taken from `data`; `loss` is not read."""
        network = require_model(self, statistics, model)
        who = f"VarianceTransfer: site {statistics.site!r}"
        entrance = Entrance(who, network, statistics.site, statistics.bias)
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        different = self.units // 2 if self.pairs else self.units
        drawn = normal(draw, entrance.width, different)
        omega = normal(draw, columns(statistics), different)
        alpha = self._sized(entrance, model, require_data(self, statistics, data), drawn)
        omega = (statistics.fan_out_norm * omega / omega.norm(dim=0)).to(alpha.device)
        delta: dict[str, Tensor] = {}
        if self.pairs:
            alpha = alpha.repeat_interleave(2, 1)
            omega = torch.stack([omega, -omega], 2).flatten(1)
        elif self.rescale:
            units = network.groups[statistics.site].units
            factor = math.sqrt(units / (units + self.units))
            omega = factor * omega
            tensors = network.tensors()
            delta = {b.name: (factor - 1.0) * tensors[b.name].detach() for b in statistics.fan_out}
        return replace(proposal(self, replace(statistics, notes=()), alpha, omega), delta=delta)

    def _sized(self, entrance: Entrance, model: CompiledNetwork, data: Data, drawn: Tensor) -> Tensor:
        """The drawn fan-ins, each with the mean square pre-activation of the existing units."""
        W, S = entrance.weights, entrance.second_moment(model, data)
        drawn = drawn.to(S.device)
        have = ((S @ drawn) * drawn).sum(0)
        want = ((W @ S) * W).sum(1).mean()
        if not bool((have > 0).all()) or not float(want) > 0:
            raise Refused(entrance.who, "pre-activations that are all zero", "units and features that are not silent")
        return drawn * (want / have).sqrt()
