"""Random fan-ins and fan-outs, drawn alike by the methods that need them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from irgrow.growth.methods.base import columns
from irgrow.ir.statistics import Statistics


def normal(draw: torch.Generator, *shape: int, like: Tensor | None = None) -> Tensor:
    """Standard normal numbers in float64; the same ones on every device."""
    drawn = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return drawn if like is None else drawn.to(like.device)


def fan_out(statistics: Statistics, units: int, how: str, draw: torch.Generator, scale: float = 1.0) -> Tensor:
    """`[columns of M_prev, units]`: zeros, or normal with the variance 1/(3 fan-in) of the grown targets."""
    if how == "zero":
        return torch.zeros(columns(statistics), units, dtype=torch.float64)
    rows = []
    for block in statistics.fan_out:
        held = sum(b.width for b in statistics.feeding if b.group == block.group and b.shape)
        rows.append(normal(draw, block.width, units) * (scale / math.sqrt(3 * max(1, held + units * block.taps))))
    return torch.cat(rows)
