"""All weights zero and the bias one: the plainest way to add units that change nothing and still learn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from irgrow.growth.methods.base import columns, proposal, require_units
from irgrow.ir.errors import Refused
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics


@dataclass(frozen=True)
class Silent:
    """Fan-in and fan-out zero, bias one: outputs stay the same.

    The units say sigma(1), so their fan-out receives a gradient at once, all of them the same one: without
    noise in training they stay equal, and only the first few steps of their fan-in come from the data. A
    control for the other methods (GradMax, section 4). Needs no data.
    Refused where no group of the site that a unit enters has a bias.
    """

    units: int = 1
    bias: float = 1.0
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_units(self)

    def propose(self, statistics: Statistics) -> Proposal:
        """The units; the same for every site."""
        if not statistics.bias:
            raise Refused(
                f"Silent: site {statistics.site!r}",
                "no bias",
                "a group with a bias: without one, a unit of zero weights never learns",
                do="use Random, or give the group a bias",
            )
        width = sum(block.width for block in statistics.fan_in)
        alpha = torch.zeros(width, self.units, dtype=torch.float64)
        alpha[-1] = self.bias
        omega = torch.zeros(columns(statistics), self.units, dtype=torch.float64)
        return proposal(self, replace(statistics, notes=()), alpha, omega)
