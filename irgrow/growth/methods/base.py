"""What all growth methods share: the protocol, and folding columns of statistics back into weight slices.

alpha `[F, k]` are fan-in weights (rows as the columns of b), omega `[G, k]` fan-out weights (rows as the
columns of M_prev), one column per new unit.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics


@runtime_checkable
class Method(Protocol):
    """How to grow: a value with `units` and `needs` (the moments it reads) whose `propose` is pure.

    One of your own works everywhere:

        @dataclass(frozen=True)
        class Copy:                                    # new units like the mean feature, silent at first
            units: int = 1
            needs: tuple[str, ...] = ("S",)

            def propose(self, statistics):
                alpha = statistics.S[:, -1:].expand(-1, self.units)
                omega = alpha.new_zeros(sum(b.width for b in statistics.fan_out), self.units)
                return proposal(self, statistics, alpha, omega)
    """

    @property
    def units(self) -> int: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def propose(self, statistics: Statistics) -> Proposal: ...


def proposal(
    method: object,
    statistics: Statistics,
    alpha: Tensor,
    omega: Tensor,
    *,
    move: Tensor | None = None,
    singular_values: Tensor | None = None,
    predicted_gain: float | None = None,
    gain_unit: str = "loss",
    notes: tuple[str, ...] = (),
) -> Proposal:
    """The proposal with these columns, each folded into the slice of its bundle. `move` `[g, c]` is a dW*."""
    if getattr(method, "taps", "full") == "centre" and any(
        b.tap is None and len(b.shape) == 3 and b.taps > 1 for b in statistics.fan_out
    ):
        who = f"{type(method).__name__}: site {statistics.site!r}"
        raise Refused(who, "statistics of all taps", "of the centre tap", do="probe with taps='centre'")
    units, at = alpha.shape[1], 0
    fan_in, bias = {}, None
    for block in statistics.fan_in:
        rows = alpha[at : at + block.width].mT
        at += block.width
        kind, owner = block.name.split(".")
        if kind == "bias":
            bias = rows.reshape(units)
        else:
            fan_in[owner] = rows.reshape(units, *block.shape)
    fan_out, at = {}, 0
    for block in statistics.fan_out:
        rows = omega[at : at + block.width].reshape(block.outputs, block.taps, units).mT  # [out, units, taps]
        at += block.width
        if block.tap is not None:
            full = rows.new_zeros(block.outputs, units, torch.Size(block.shape[1:]).numel())
            full[:, :, block.tap] = rows[:, :, 0]
            rows = full
        shape = (block.outputs, units, *block.shape[1:]) if len(block.shape) == 3 else (block.outputs, -1)
        fan_out[block.name.split(".")[1]] = rows.reshape(shape)
    return Proposal(
        statistics.site,
        statistics.structure,
        type(method).__name__,
        fan_in,
        fan_out,
        bias,
        {} if move is None else fold_move(statistics, move),
        singular_values,
        predicted_gain,
        None,
        gain_unit,
        (*statistics.notes, *notes),
    )


def fold_move(statistics: Statistics, move: Tensor) -> dict[str, Tensor]:
    """A change `[g, c]` of what feeds the targets, as a change of each tensor by its name."""
    found = {}
    for name, (g, c) in statistics.targets.items():
        at = c.start
        for block in statistics.feeding:
            if block.group == name:
                found[block.name] = move[g, at : at + block.width].reshape(g.stop - g.start, *block.shape)
                at += block.width
    return found


def require_first_order(method: object, statistics: Statistics) -> None:
    """Refused unless a new unit with small weights changes its targets to first order: sigma(0) = 0, sigma'(0) != 0."""
    who = f"{type(method).__name__}: site {statistics.site!r}"
    if statistics.at_zero == 0 and statistics.slope != 0:
        return
    found = f"sigma(0) = {statistics.at_zero:.3g}" if statistics.at_zero else "sigma'(0) = 0"
    raise Refused(
        who,
        f"activation {statistics.activation} with {found}",
        "sigma(0) = 0 and sigma'(0) != 0",
        do="use Random, or another activation",
    )


def require_choice(method: object, field: str, choices: tuple[str, ...]) -> None:
    """UnknownName unless an option is one of its choices."""
    value = getattr(method, field)
    if value not in choices:
        raise UnknownName(f"{type(method).__name__}: {field} {value!r}", expected=f"one of {', '.join(choices)}")


def require_units(method: Method) -> None:
    """Refused unless at least one unit is asked for."""
    if not isinstance(method.units, int) or method.units < 1:
        raise Refused(f"{type(method).__name__}: units", method.units, "at least 1")


def columns(statistics: Statistics) -> int:
    """How many columns M_prev has."""
    return sum(block.width for block in statistics.fan_out)
