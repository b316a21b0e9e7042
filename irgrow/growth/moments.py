"""`Sums`: what accumulates at one site while data runs through: float64 sums over samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from irgrow.growth.geometry import Geometry
from irgrow.ir.statistics import Block
from irgrow.kernels.outer import accumulate, accumulate_gram, mirror

ALL = slice(None)
SYMMETRIC = ("S", "S_in", "E")


@dataclass
class Sums:
    """Sums over samples of the products behind `Statistics`; `want` names the moments, `bias` adds a 1 to b."""

    geometry: Geometry
    bias: bool
    want: frozenset[str]
    totals: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def fan_in(self) -> tuple[Block, ...]:
        """The blocks of b."""
        blocks = tuple(entry.block for entry in self.geometry.entries)
        if not self.bias:
            return blocks
        groups = self.geometry.biased or (self.geometry.entries[0].group,)
        return (*blocks, Block(f"bias.{groups[0]}", ()))

    @cached_property
    def features(self) -> int:
        return sum(block.width for block in self.fan_in)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every moment."""
        geometry = self.geometry
        widths = {t.name: t.width for t in geometry.targets}
        c, g = sum(widths.values()), sum(t.outputs for t in geometry.targets)
        held = sum(way.block.taps * widths[way.target] for way in geometry.exits)
        columns = sum(way.block.width for way in geometry.exits)
        b = self.features
        return {"S": (b, b), "M_prev": (b, columns), "S_in": (c, c), "M": (c, g), "C": (b, held), "E": (g, g)}

    def total(self, name: str) -> Tensor:
        """One sum over the samples added so far."""
        found = self._held(name, None).clone()
        return mirror(found) if name in SYMMETRIC else found

    def _held(self, name: str, like: Tensor | None) -> Tensor:
        if name not in self.totals:
            device = None if like is None else like.device
            self.totals[name] = torch.zeros(self.shapes[name], dtype=torch.float64, device=device)
        return self.totals[name]

    def columns(self, name: str, exit: int) -> slice:
        """The columns of M_prev or C that belong to one leaving bundle."""
        widths = {t.name: t.width for t in self.geometry.targets}
        sizes = [
            way.block.width if name == "M_prev" else way.block.taps * widths[way.target] for way in self.geometry.exits
        ]
        return slice(sum(sizes[:exit]), sum(sizes[: exit + 1]))

    def put(self, name: str, value: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """Adds a finished product to a part of a sum."""
        self._held(name, value)[rows, columns] += value

    def gram(self, name: str, x: Tensor, weight: float = 1.0, at: slice = ALL) -> None:
        """Adds weight * x^T x for rows `x [samples, width]` to a diagonal part of a sum."""
        accumulate_gram(self._held(name, x)[at, at], x, scale=weight)

    def cross(self, name: str, x: Tensor, y: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """Adds x^T y for rows `x`, `y` to a part of a sum."""
        accumulate(self._held(name, x)[rows, columns], x, y)

    def add_targets(self, fed: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> None:
        """Adds to S_in, M and E: rows `fed[target] [rows, c]`, `g[target] [rows, O]` (rows: samples, positions)."""
        row = column = 0
        for target in self.geometry.targets:
            c, o = slice(row, row + target.width), slice(column, column + target.outputs)
            row, column = c.stop, o.stop
            if "S_in" in self.want:
                self.gram("S_in", fed[target.name], at=c)
            if "M" in self.want:
                self.cross("M", fed[target.name], g[target.name], c, o)
            if "E" in self.want:
                self.gram("E", g[target.name], at=o)
