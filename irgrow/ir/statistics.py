"""`Statistics`: what was measured at a site, as a value (ALGORITHMS, section 0).

All are means over samples of per-sample products, sums over positions (images), accumulated in float64:

    S = E[b b^T]    M_prev = E[b g^T]    S_in = E[c c^T]    M = E[c g^T]    C = E[b c^T]    E = E[g g^T]

b: features that enter the site, carried along it (through pooling, sums) to where it is left; one column
block per entering bundle, a constant 1 last if `bias`. g: per-sample gradient of the loss with respect to
the targets' pre-activations. c: features that already feed those targets (patches, for a convolution; a
constant 1 last where the target has a bias).

A flat site has one column of M_prev per target neuron. Where positions are shared (a convolution) or
flattened (image -> dense) a new unit has several fan-out weights per target unit, its taps t, and then
M_prev has a column (o, t), taps fastest, and C one block (t, c) per leaving bundle:

    M_prev[:, (o, t)] = E sum_r b(q(r, t)) g_o(r)      C[:, (t, c)] = E sum_r b(q(r, t)) c(r)^T

with q(r, t) the position that tap t of target position r reads (nothing where it reads padding): borders,
strides and dilation are exact. S_in, M and E are block-diagonal over the targets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from irgrow.ir.errors import BadData, StaleMorphism
from irgrow.ir.pattern import Shape
from irgrow.kernels.whiten import Solution, pseudo_solve


@dataclass(frozen=True)
class Block:
    """A range of columns that belongs to one bundle (or to a group's bias) and how they fold into its weights.

    `shape` is the shape of the weight slice of one unit: fan-in `(in, kh, kw)`, fan-out `(out, kh, kw)`,
    flat `(neurons,)`, fan-out of an image into a flat group `(neurons, positions)`. `name` is the tensor's
    name (`weight.x`, or `bias.y` for the constant 1), `group` the target group (fan-out, feeding). `tap`:
    only this kernel tap has columns, the others stay zero (the restricted form).
    """

    name: str
    shape: Shape
    group: str = ""
    tap: int | None = None

    @property
    def width(self) -> int:
        """How many columns."""
        return int(torch.Size(self.shape).numel()) if self.tap is None else self.shape[0]

    @property
    def outputs(self) -> int:
        """How many target units (the columns of g)."""
        return self.shape[0] if self.shape else 1

    @property
    def taps(self) -> int:
        """How many columns each target unit has."""
        return self.width // self.outputs


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments at one site; those that were not asked for are None. `n` is the number of samples."""

    site: str
    structure: str  # the network's structure hash
    n: int
    fan_in: tuple[Block, ...]
    fan_out: tuple[Block, ...]
    feeding: tuple[Block, ...] = ()  # blocks of c
    S: Tensor | None = None
    M_prev: Tensor | None = None
    S_in: Tensor | None = None
    M: Tensor | None = None
    C: Tensor | None = None
    E: Tensor | None = None
    residual: Tensor | None = None  # N where it was measured with this dW*, in a second run, instead of C
    activation: str = "identity"  # what a new unit's value goes through on its way along the site
    at_zero: float = 0.0  # its value where the unit's pre-activation is 0
    slope: float = 1.0  # and its derivative there (the right-hand one)
    smooth: bool = True  # False: no first-order prediction of gains (ReLU-like, or pooling by max on the way)
    units: int = 0  # of the site, when measured
    fan_out_norm: float = 1.0  # mean norm of the site's existing outgoing weight vectors
    notes: tuple[str, ...] = ()

    @property
    def bias(self) -> bool:
        """Whether the constant 1 is the last feature of b."""
        return bool(self.fan_in) and self.fan_in[-1].name.startswith("bias.")

    def need(self, *names: str) -> None:
        """Raises BadData unless these moments were measured and are finite."""
        for name in names:
            value = getattr(self, name)
            if value is None:
                raise BadData(
                    f"statistics of site {self.site!r}",
                    f"no {name}",
                    f"{name} measured",
                    do=f"probe with want including {name!r}",
                )
            if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
                raise BadData(
                    f"statistics of site {self.site!r}: {name}", "NaN or infinity", "finite values",
                    do="check the data and the loss for NaN",
                )  # fmt: skip

    @property
    def targets(self) -> dict[str, tuple[slice, slice]]:
        """Per target group its columns of g (rows of `best_move`) and of c, in the order of M."""
        found: dict[str, tuple[slice, slice]] = {}
        row = column = 0
        for block in self.fan_out:
            if block.group in found:
                continue
            width = sum(c.width for c in self.feeding if c.group == block.group)
            found[block.group] = (slice(row, row + block.outputs), slice(column, column + width))
            row, column = row + block.outputs, column + width
        return found

    @cached_property
    def best_move(self) -> Tensor:
        """dW* = -M^T S_in^+ `[g, c]`: the best change of the weights that already feed the targets."""
        solved = self._solved
        assert self.M is not None
        move = torch.zeros_like(self.M.mT)
        for name, (g, c) in self.targets.items():
            move[g, c] = -solved[name].solution.mT
        return move

    @cached_property
    def _solved(self) -> dict[str, Solution]:
        """S_in^+ M of every target."""
        self.need("S_in", "M")
        assert self.S_in is not None and self.M is not None
        return {name: pseudo_solve(self.S_in[c, c], self.M[c, g]) for name, (g, c) in self.targets.items()}

    @property
    def singular(self) -> tuple[str, ...]:
        """Notes: the targets whose S_in is singular, so that dW* came from a pseudo-inverse."""
        sizes = {name: c.stop - c.start for name, (_, c) in self.targets.items()}
        return tuple(
            f"S_in of {name!r} is singular: {found.note}"
            for name, found in self._solved.items()
            if found.rank < sizes[name]
        )

    @cached_property
    def N(self) -> Tensor:
        """E[b v_perp^T] = -M_prev + C S_in^+ M `[b, g taps]`: what is left of the desired move after dW*."""
        if self.residual is not None:
            return self.residual
        self.need("M_prev", "C", "S_in", "M")
        assert self.M_prev is not None and self.C is not None
        left, features = [], self.C.shape[0]
        column = 0
        for block in self.fan_out:
            g, c = self.targets[block.group]
            width = c.stop - c.start
            held = self.C[:, column : column + block.taps * width].reshape(features, block.taps, width)
            column += block.taps * width
            left.append((held @ self.best_move[g, c].mT).mT.reshape(features, block.width))
        return -self.M_prev - torch.cat(left, 1)

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both sets of samples together, exactly."""
        same = (self.site, self.structure, self.fan_in, self.fan_out, self.feeding)
        if same != (other.site, other.structure, other.fan_in, other.fan_out, other.feeding):
            raise StaleMorphism(f"statistics of site {self.site!r}", "statistics of another site or structure")
        if self.residual is not None or other.residual is not None:
            raise BadData(
                f"statistics of site {self.site!r}",
                "N measured with the dW* of one part",
                "C in both parts",
                do="probe with want including 'C'",
            )
        n = self.n + other.n
        moments: dict[str, Any] = {}
        for name in MOMENTS:
            ours, theirs = getattr(self, name), getattr(other, name)
            if (ours is None) != (theirs is None):
                raise BadData(
                    f"statistics of site {self.site!r}",
                    f"{name} in one part only",
                    "the same moments in both",
                )
            moments[name] = None if ours is None else (self.n * ours + other.n * theirs) / n
        return replace(self, n=n, **moments)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name} {tuple(getattr(self, f.name).shape)}"
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        )
        return f"<Statistics of {self.site!r} over {self.n} samples: {shown}>"


MOMENTS = ("S", "M_prev", "S_in", "M", "C", "E")
