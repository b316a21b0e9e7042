"""Random: new units drawn as torch draws a new layer; silent (fan-out zero) unless asked otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from irgrow.growth.methods.base import proposal, require_choice, require_units
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics


@dataclass(frozen=True)
class Random:
    """Fan-in (and bias) normal with the variance 1/(3 fan-in) of torch's layers; fan-out zero, or normal alike.

    With fan-out zero outputs stay the same. Needs no data. The control of GradMax, section 4 (there uniform
    in [0, 1) by mistake; normal here). `scale` multiplies both standard deviations.
    """

    units: int = 1
    fan_out: str = "zero"  # or "random"
    scale: float = 1.0
    seed: int = 0
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_choice(self, "fan_out", ("zero", "random"))
        require_units(self)

    def propose(self, statistics: Statistics) -> Proposal:
        """The drawn units; the same seed and site give the same ones."""
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        width = sum(block.width for block in statistics.fan_in)
        alpha = torch.randn(width, self.units, generator=draw, dtype=torch.float64)
        alpha *= self.scale / math.sqrt(3 * max(1, width - statistics.bias))
        rows = []
        for block in statistics.fan_out:
            held = sum(b.width for b in statistics.feeding if b.group == block.group and b.shape)
            drawn = torch.randn(block.width, self.units, generator=draw, dtype=torch.float64)
            rows.append(drawn * (self.scale / math.sqrt(3 * max(1, held + self.units * block.taps))))
        omega = torch.cat(rows)
        if self.fan_out == "zero":
            omega = torch.zeros_like(omega)
        return proposal(self, statistics, alpha, omega)
