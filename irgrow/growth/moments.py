"""`Sums`: what accumulates at one site while data runs through: float64 sums over samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from irgrow.growth.geometry import Geometry
from irgrow.growth.windows import Windows
from irgrow.ir.statistics import Block
from irgrow.kernels.outer import accumulate, accumulate_gram, mirror, route
from irgrow.kernels.patches import PatchGram

ALL = slice(None)
SYMMETRIC = ("S", "S_in", "E")


@dataclass
class Sums:
    """Sums over samples of the products behind `Statistics`; `want` names the moments, `bias` adds a 1 to b."""

    geometry: Geometry
    bias: bool
    want: frozenset[str]
    totals: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, PatchGram] = field(default_factory=dict)  # of patches: `S`, and S_in by target
    used: dict[str, dict[str, int]] = field(default_factory=dict)  # by moment: which kernel, and how often
    move: Tensor | None = None  # dW*, once N is measured with it

    def __post_init__(self) -> None:
        want = set(self.want)
        if "N" in want:  # from C of flat sites; for images it costs more than a second run, which measures N
            want |= {"M_prev", "S_in", "M"} | ({"C"} if self.geometry.flat else set())
        self.twice = "N" in want and "C" not in want
        self.want = frozenset(want - {"N"})

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
        shapes = {"S": (b, b), "M_prev": (b, columns), "S_in": (c, c), "M": (c, g), "C": (b, held), "E": (g, g)}
        return shapes | {"N": (b, columns)}

    def total(self, name: str, *, take: bool = False) -> Tensor:
        """One sum over the samples added so far; `take`: the sum itself, to which nothing more may be added."""
        if name in self.grams:
            return self.grams[name].gram()
        found = self._held(name, None)
        if not take:
            found = found.clone()
        if name in SYMMETRIC:
            mirror(found)
        for target, (c, _) in self.ranges.items():
            if name == "S_in" and target in self.grams:
                found[c, c] = self.grams[target].gram()
        return found

    @cached_property
    def ranges(self) -> dict[str, tuple[slice, slice]]:
        """Per target its columns of c and of g."""
        found, row, column = {}, 0, 0
        for t in self.geometry.targets:
            found[t.name] = slice(row, row + t.width), slice(column, column + t.outputs)
            row, column = row + t.width, column + t.outputs
        return found

    def patches(self, name: str, x: Tensor, windows: Windows, ones: bool) -> None:
        """Adds the sum of patch patch^T over images to `S`, or to a target's part of S_in."""
        if name not in self.grams:
            self.grams[name] = PatchGram(windows.kernel_window, ones=ones)
        self.grams[name].add(x)
        self._note("S" if name == "S" else "S_in", f"PatchGram, {self.grams[name].route}", x)

    def _held(self, name: str, like: Tensor | None) -> Tensor:
        if name not in self.totals:
            device = None if like is None else like.device
            self.totals[name] = torch.zeros(self.shapes[name], dtype=torch.float64, device=device)
        return self.totals[name]

    def columns(self, name: str, exit: int) -> slice:
        """The columns of M_prev, N or C that belong to one leaving bundle."""
        widths = {t.name: t.width for t in self.geometry.targets}
        sizes = [way.block.taps * widths[way.target] if name == "C" else way.block.width for way in self.geometry.exits]
        return slice(sum(sizes[:exit]), sum(sizes[: exit + 1]))

    def _note(self, name: str, kernel: str, like: Tensor) -> None:
        counts = self.used.setdefault(name, {})
        text = f"{kernel} by {route(like.device)[0]}"
        counts[text] = counts.get(text, 0) + 1

    def put(self, name: str, value: Tensor, rows: slice = ALL, columns: slice = ALL, *, by: str) -> None:
        """Adds a finished product, which the kernel `by` made, to a part of a sum."""
        self._note(name, by, value)
        self._held(name, value)[rows, columns] += value

    def gram(self, name: str, x: Tensor, weight: float = 1.0, at: slice = ALL) -> None:
        """Adds weight * x^T x for rows `x [samples, width]` to a diagonal part of a sum."""
        self._note(name, "accumulate_gram", x)
        accumulate_gram(self._held(name, x)[at, at], x, scale=weight)

    def cross(self, name: str, x: Tensor, y: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """Adds x^T y for rows `x`, `y` to a part of a sum."""
        self._note(name, "accumulate", x)
        accumulate(self._held(name, x)[rows, columns], x, y)

    def add_targets(self, fed: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> None:
        """Adds to S_in, M and E: `fed[target] [samples, c]`, `g[target] [samples, O]`."""
        for name, (c, o) in self.ranges.items():
            if "S_in" in self.want and name in fed:
                self.gram("S_in", fed[name], at=c)
            if "M" in self.want and name in fed:
                self.cross("M", fed[name], g[name], c, o)
            if "E" in self.want and name in g:
                self.gram("E", g[name], at=o)
